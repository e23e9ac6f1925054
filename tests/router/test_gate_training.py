"""Training gate vectors: on two experts that answer two kinds of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.testbed.check import load_base
from eval.testbed.manifest import read_jsonl
from router.adapted import Example, encode
from router.adapter import Adapter
from router.gate_training import Schedule, train_meteora, train_phatgoose

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path("eval/testbed/data")
NAMES = ("uppercase", "transform-digits")
QUICK = Schedule(steps=8, batch=4, rate=2e-2)


def examples(name: str, count: int = 8) -> list[Example]:
    _, tokenizer = load_base(DATA)
    rows = read_jsonl(DATA / "samples" / f"{name}.jsonl")[:count]
    return [encode(tokenizer, row["prompt"], row["answer"]) for row in rows]


def test_a_sample_is_what_the_chat_template_makes_of_it_and_its_answer() -> None:
    _, tokenizer = load_base(DATA)
    tokens, prompt = encode(tokenizer, "abc", "ABC")
    assert tokenizer.decode(tokens[:prompt]) == "<bos><|user|>abc<|assistant|>"
    assert tokenizer.decode(tokens[prompt:]) == "ABC<eos>"
    tokenizer.chat_template = None
    tokens, prompt = encode(tokenizer, "abc", "ABC")
    assert tokenizer.decode(tokens) == "<bos>abc\nABC<eos>"


def test_phatgoose_lowers_the_loss_and_leaves_the_model_as_it_was() -> None:
    model, _ = load_base(DATA)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses: list[float] = []
    folder = DATA / "experts" / "uppercase"
    vectors = train_phatgoose(model, folder, examples("uppercase"), QUICK, lambda step, loss: losses.append(loss))
    assert len(losses) == QUICK.steps
    assert sum(losses[-3:]) < sum(losses[:3])
    assert list(vectors) == Adapter(folder).modules
    assert all(vector.shape == (128,) and not vector.requires_grad for vector in vectors.values())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not any(module._forward_hooks for module in model.modules())


def test_training_is_the_same_every_time() -> None:
    model, _ = load_base(DATA)
    folder, samples = DATA / "experts" / "uppercase", examples("uppercase")
    one, two = (train_phatgoose(model, folder, samples, Schedule(2, 4), lambda step, loss: None) for _ in range(2))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_meteora_learns_whose_sample_a_token_is_from() -> None:
    model, _ = load_base(DATA)
    losses: list[float] = []
    vectors = train_meteora(
        model,
        {name: DATA / "experts" / name for name in NAMES},
        {name: examples(name) for name in NAMES},
        QUICK,
        lambda step, loss: losses.append(loss),
    )
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "log 2: it starts from nothing"
    assert losses[-1] < 0.6
    assert list(vectors) == list(NAMES)
    module = "model.layers.3.self_attn.q_proj"
    assert set(vectors["transform-digits"]) > set(vectors["uppercase"]), "which adapts attention only"
    assert (vectors["uppercase"][module] - vectors["transform-digits"][module]).norm() > 0.1
    lone = vectors["transform-digits"]["model.layers.0.mlp.up_proj"]
    assert not lone.any(), "where one expert is alone there is nothing to tell"


def test_few_samples_are_taken_again_and_again() -> None:
    model, _ = load_base(DATA)
    steps: list[int] = []
    train_phatgoose(
        model,
        DATA / "experts" / "uppercase",
        examples("uppercase", count=1),
        Schedule(steps=3, batch=2),
        lambda step, loss: steps.append(step),
    )
    assert steps == [1, 2, 3]
