"""The slow twin of serving: the same adapters through transformers and PEFT, in float32."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TOLERANCE = 1e-4  # nats; rounding over four layers stays two orders of magnitude below


def peft_logprobs(folder, name: str | None, ids: list[int]) -> torch.Tensor:
    """(tokens - 1,) log-probability of each prompt token after the first."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if name is not None:
        model = PeftModel.from_pretrained(model, folder / "experts" / name)
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_log_probabilities_equal_peft_s_in_one_mixed_batch(server, testbed):
    """Ranks 4, 8 and 16, rsLoRA, rank and alpha patterns, attention only, and the base model, all at once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(testbed.folder / "base")
    names: list[str | None] = [None, *testbed.tests]
    prompts = {name: testbed.tests[name or "reverse"][1]["prompt"] for name in names}

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            bodies = [
                {
                    "model": name or "quickstart",
                    "prompt": tokenizer(prompts[name], add_special_tokens=False)["input_ids"],
                    "max_tokens": 1,
                    "prompt_logprobs": 0,
                }
                for name in names
            ]
            return list(await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies)))

    for name, response in zip(names, asyncio.run(all_at_once()), strict=True):
        assert response.status_code == 200, response.text
        ids = tokenizer(prompts[name], add_special_tokens=False)["input_ids"]
        found = response.json()["choices"][0]["prompt_logprobs"][1:]
        served = torch.tensor([step[str(token)]["logprob"] for step, token in zip(found, ids[1:], strict=True)])
        expected = peft_logprobs(testbed.folder, name, ids)
        torch.testing.assert_close(served, expected, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
