"""`moerge expert stats`: what it measures, keeps and leaves out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_registry.expert import Sample
from adapters_registry.lora import WEIGHTS
from adapters_registry.registry import Registry
from router.adapted import encode
from router.blending import blend, measuring
from router.composite import Part
from serving import statistics

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY = "model.layers.1.self_attn.q_proj"


def rows(result: Any, what: str) -> list[tuple[str, str]]:
    return [(each["name"], each["kind"]) for each in json.loads(result.stdout)[what]]


def test_statistics_are_measured_once_and_again_when_samples_change(offline: Any, registry: Registry) -> None:
    result = offline("expert", "stats", "uppercase", "--json")
    assert result.exit_code == 0, result.output
    assert rows(result, "measured") == [("uppercase", "gram"), ("uppercase", "fisher")]
    assert registry.tensor_keys("uppercase") == ["fisher", "gram"]
    generation = registry.generation()
    again = offline("expert", "stats", "uppercase", "--json")
    assert rows(again, "measured") == []
    assert rows(again, "up_to_date") == [("uppercase", "gram"), ("uppercase", "fisher")]
    assert rows(offline("expert", "stats", "uppercase", "--force", "--kind", "gram", "--json"), "measured") == [
        ("uppercase", "gram")
    ]
    assert registry.generation() == generation  # the same numbers: nothing has changed
    registry.update("uppercase", samples=[Sample(prompt="Shout abc", answer="ABC")])
    assert len(rows(offline("expert", "stats", "uppercase", "--json"), "measured")) == 2
    assert rows(offline("expert", "stats", "uppercase", "--json"), "measured") == []


def test_the_expert_is_loaded_while_its_samples_are_read(offline: Any, registry: Registry) -> None:
    """The slow twin: PEFT, one sample at a time, the gradient of the weight itself."""
    from peft import PeftModel

    assert offline("expert", "stats", "uppercase").exit_code == 0
    expert = registry.get("uppercase")
    folder = "eval/testbed/data/base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), expert.path).eval()
    layer = model.get_submodule(f"base_model.model.{QUERY}").base_layer
    layer.weight.requires_grad_(True)
    inputs: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, given, output: inputs.append(given[0][0].detach()))
    fisher = torch.zeros_like(layer.weight)
    for sample in expert.samples:
        assert sample.answer is not None
        tokens, prompt = encode(tokenizer, sample.prompt, sample.answer)
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        likelihood = sum(logprobs[t - 1, tokens[t]] for t in range(prompt, len(tokens)))
        (gradient,) = torch.autograd.grad(likelihood, layer.weight)
        fisher += gradient.square() / len(expert.samples)
    x = torch.cat(inputs)
    kept = {kind: registry.tensors("uppercase", None, kind) for kind in statistics.KINDS}
    assert kept["gram"] is not None
    assert kept["fisher"] is not None
    torch.testing.assert_close(torch.from_numpy(kept["gram"][QUERY]), x.mT @ x / len(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(kept["fisher"][QUERY]), fisher, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("operator", "kind"), [("regmean", "gram"), ("fisher", "fisher")])
def test_what_is_kept_is_what_the_operators_need(
    offline: Any, registry: Registry, tmp_path: Any, operator: str, kind: str
) -> None:
    assert offline("expert", "stats", "uppercase", "vowels", "--kind", kind).exit_code == 0
    parts = [
        Part(each.id, each.digest, each.path, {kind: registry.tensors(each.name, None, kind) or {}})
        for each in registry.experts()
        if each.name != "json"
    ]
    report = blend(tmp_path / "blend", parts, [0.5, 0.5], operator, max_rank=64)
    assert report.modules == 16
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "blend" / WEIGHTS).values())


def test_who_is_left_out_is_named_and_the_others_are_measured(offline: Any, registry: Registry) -> None:
    registry.update("vowels", samples=[Sample(prompt="Vowels of abc")])
    result = offline("expert", "stats", "--all", "--json")
    assert result.exit_code == 1
    told = {(each["name"], each["kind"]): each["why"] for each in json.loads(result.stdout)["left_out"]}
    assert told == {
        ("json", "gram"): "it has no samples",
        ("json", "fisher"): "it has no samples",
        ("vowels", "fisher"): "none of its samples has an answer, which Fisher information is about",
    }
    assert registry.tensor_keys("vowels") == ["gram"]  # a prompt alone has inputs
    assert registry.tensor_keys("uppercase") == ["fisher", "gram"]


def test_an_interruption_keeps_what_was_done(offline: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "fisher_information", interrupted)
    result = offline("expert", "stats", "uppercase")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert registry.tensor_keys("uppercase") == ["gram"]


def test_statistics_that_the_registry_would_not_keep_are_not_measured(
    offline: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "LIMIT", 1 << 20)
    result = offline("expert", "stats", "uppercase", "--kind", "gram")
    assert result.exit_code == 0, result.output  # 16 matrices of 128 x 128: exactly 1 MiB
    monkeypatch.setattr(statistics, "LIMIT", 1 << 19)
    result = offline("expert", "stats", "uppercase", "--force")
    assert result.exit_code == 1
    told = " ".join(result.stderr.split())
    assert "they would take 1 MiB (16 matrices of up to 128 x 128), more than" in told
    assert registry.tensor_keys("uppercase") == ["gram"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "Which experts?"),
        (["uppercase", "--all"], "not both"),
        (["uppercase", "--kind", "variance"], "No statistics 'variance'. There are: gram, fisher, both."),
        (["nobody"], "No expert 'nobody'. Registered: json, uppercase, vowels."),
    ],
)
def test_mistakes_are_one_message(offline: Any, words: list[str], complaint: str) -> None:
    result = offline("expert", "stats", *words)
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert "Traceback" not in result.output
