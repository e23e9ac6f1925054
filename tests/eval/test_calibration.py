"""Statistics over neutral prompts, against their definitions on dense updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eval.calibration import calibrate
from eval.testbed.check import load_base
from eval.twin import Composite, Twin, read_deltas

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path("eval/testbed/data")
EXPERTS = {name: DATA / "experts" / name for name in ("vowels", "roman", "uppercase")}
MODULE = "model.layers.1.self_attn.q_proj"
PROMPTS = [[1, 5, 40, 41, 42, 6], [1, 5, 60, 61, 6]]


def inputs_of(module: str) -> Tensor:
    """(tokens, d_in) what the base model feeds a module over all prompts."""
    model, _ = load_base(DATA)
    rows: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(inputs[0][0])

    model.get_submodule(module).register_forward_pre_hook(hook)
    with torch.inference_mode():
        for prompt in PROMPTS:
            model(input_ids=torch.tensor([prompt]))
    return torch.cat(rows)


def test_mean_and_deviation_are_those_of_the_score_over_all_tokens() -> None:
    model, _ = load_base(DATA)
    kept = calibrate(model, EXPERTS, PROMPTS, score="spectr")
    assert [list(each) for each in kept.values()] == [["statistics/scaled/spectr"]] * 3
    x = inputs_of(MODULE)
    for name, folder in EXPERTS.items():
        statistics = kept[name]["statistics/scaled/spectr"]
        scores = (x.double() @ read_deltas(folder)[0][MODULE].T).norm(dim=-1).float()
        torch.testing.assert_close(statistics[f"{MODULE}.mean"], scores.mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics[f"{MODULE}.deviation"], scores.std(correction=0), rtol=1e-4, atol=1e-6)


def test_a_centred_score_is_that_of_the_input_less_its_mean() -> None:
    model, _ = load_base(DATA)
    kept = calibrate(model, EXPERTS, PROMPTS, score="spectr", centred=True)
    x = inputs_of(MODULE)
    for name, folder in EXPERTS.items():
        (statistics,) = kept[name].values()
        scores = ((x - x.mean(0)).double() @ read_deltas(folder)[0][MODULE].T).norm(dim=-1).float()
        torch.testing.assert_close(statistics[f"{MODULE}.mean"], scores.mean(), rtol=1e-4, atol=1e-5)


def test_only_modules_that_an_expert_adapts_have_statistics() -> None:
    model, _ = load_base(DATA)
    kept = calibrate(model, EXPERTS, PROMPTS, score="arrow")
    names = {name: set(each["statistics/unit/arrow"]) for name, each in kept.items()}
    assert "model.layers.0.mlp.up_proj.mean" in names["roman"]
    assert not any(".mlp." in name for name in names["vowels"])


@pytest.mark.parametrize("score", ["arrow", "spectr", "smile"])
@pytest.mark.parametrize("centred", [False, True])
def test_evidence_over_the_neutral_prompts_themselves_adds_up_to_nothing(score: str, centred: bool) -> None:
    model, _ = load_base(DATA)
    settings = {"score": score, "centred": centred}
    kept = calibrate(model, EXPERTS, PROMPTS, **settings)
    twin = Twin(model, Composite.stack(EXPERTS, "probe", settings, kept))
    total = torch.zeros(3)
    for prompt in PROMPTS:
        twin.logprobs(prompt)
        total += torch.stack(list(twin.evidence.passed.values())).sum((0, 1))
    torch.testing.assert_close(total, torch.zeros(3), atol=0.05, rtol=0)


def test_a_prompt_does_not_count_for_its_owner() -> None:
    model, _ = load_base(DATA)
    everyone = calibrate(model, EXPERTS, PROMPTS, ["roman", "vowels"])
    second = calibrate(model, EXPERTS, PROMPTS[1:])
    name, key = f"{MODULE}.mean", "statistics/scaled/spectr"
    torch.testing.assert_close(everyone["roman"][key][name], second["roman"][key][name])
    assert not torch.equal(everyone["uppercase"][key][name], second["uppercase"][key][name])
