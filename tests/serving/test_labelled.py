"""Labelled sets: read with every mistake named, and judged as PEFT would answer them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_registry.expert import Sample
from router.adapted import Example, encode
from router.blending import blend
from router.composite import Part
from serving.labelled import BadRows, Judge, read_labelled

DATA = Path("eval/testbed/data")
MEMBERS = ("uppercase", "reverse", "vowels")


def test_rows_are_prompts_with_answers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n  \n{"answer": "é", "prompt": "c\\u2028"}', encoding="utf-8")
    assert read_labelled(path) == [Sample(prompt="a", answer="b"), Sample(prompt="c\u2028", answer="é")]


def test_every_bad_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"prompt": "good", "answer": "yes"}',
        b"not JSON",
        b"5",
        b'{"prompt": "no answer"}',
        b'{"prompt": "", "answer": "b"}',
        b"\xff",
        b'{"prompt": "a", "answer": ""}',
        b'{"prompt": "a", "answer": "b", "score": 1}',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(BadRows) as caught:
        read_labelled(path)
    told = str(caught.value).splitlines()
    expected = ["not JSON", "not an object", "no 'answer'", "prompt: ", "not UTF-8"]
    for number, (line, why) in enumerate(zip(told, expected, strict=False), start=2):
        assert line.startswith(f"{path}:{number}: ")
        assert why in line
    assert told[5:] == ["... and 2 more rows"]


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(BadRows, match="is empty"):
        read_labelled(tmp_path / "rows.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "base")


@pytest.fixture(scope="module")
def examples(tokenizer) -> list[Example]:
    """More than one pass of them."""
    rows = [
        json.loads(line) for name in MEMBERS for line in (DATA / "test" / f"{name}.jsonl").read_text().splitlines()[:8]
    ]
    return [encode(tokenizer, row["prompt"], row["answer"]) for row in rows]


@pytest.fixture(scope="module")
def peft():
    first, *others = MEMBERS
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(DATA / "base"), DATA / "experts" / first, adapter_name=first
    )
    for name in others:
        model.load_adapter(DATA / "experts" / name, adapter_name=name)
    return model.eval()


@torch.inference_mode()
def judged_by_peft(model, examples: Sequence[Example], eos: int) -> tuple[float, float]:
    """One row at a time; exactness by generating."""
    losses, right = [], 0
    for tokens, prompt in examples:
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        losses += [-float(logprobs[t - 1, tokens[t]]) for t in range(prompt, len(tokens))]
        made = model.generate(
            input_ids=torch.tensor([tokens[:prompt]]), max_new_tokens=len(tokens) - prompt, do_sample=False
        )
        right += made[0].tolist() == tokens
    return sum(losses) / len(losses), right / len(examples)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("weights", [(0.6, 0.4, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)])
def test_a_blend_is_judged_as_peft_answers(peft, examples, tokenizer, tmp_path, weights) -> None:
    parts = [Part(name, name, DATA / "experts" / name) for name in MEMBERS]
    model = AutoModelForCausalLM.from_pretrained(DATA / "base").eval()
    judge = Judge(model, examples, lambda w, folder: blend(folder, parts, w, max_rank=64), tmp_path / "blend")
    judged = judge(weights)
    assert not (tmp_path / "blend").exists()
    named = [(name, weight) for name, weight in zip(MEMBERS, weights, strict=True) if weight]
    if named:
        label = "-".join(name for name, _ in named)
        peft.add_weighted_adapter([n for n, _ in named], [w for _, w in named], label, combination_type="cat")
        peft.set_adapter(label)
        loss, exact = judged_by_peft(peft, examples, tokenizer.eos_token_id)
    else:
        with peft.disable_adapter():
            loss, exact = judged_by_peft(peft, examples, tokenizer.eos_token_id)
    assert judged.loss == pytest.approx(loss, abs=1e-4)
    assert judged.exact == exact
    assert not any(module._forward_hooks for module in model.modules())
