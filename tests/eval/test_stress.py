from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from eval.cli import app
from eval.encodings import Remembering
from eval.prompts import Prompts
from eval.routing import RouterSpec, measure
from eval.stress import ALL, HALVES, TWICE, Row, halves, made_up, parts, stress, trials
from router.encoder import Vectors

Run = Callable[..., Result]
COLOURS = ("red", "green", "blue", "grey", "pink", "teal")
SPEC = RouterSpec("nearest", "retrieval", {"threshold": 0.4})


class Colours:
    """How often each colour is said, and a little for everything else."""

    id, dim = "colours", 1 + len(COLOURS)

    def encode(self, texts: Sequence[str]) -> Vectors:
        counts = np.array([[*(text.count(each) for each in COLOURS), 0.1 * len(text.split())] for text in texts])
        unit: Vectors = (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)
        return unit


PROMPTS = Prompts(
    samples={each: tuple(f"{each} {'very ' * n}{each}" for n in range(6)) for each in COLOURS},
    test=tuple((each, f"{'so ' * n}{each}") for each in COLOURS[:5] for n in range(3)),
    ood=(("", "nothing here"), ("", "nor there at all")),
)


def rows_of(prompts: Prompts = PROMPTS, **options: object) -> dict[str, Row]:
    tried = trials(prompts, **{"counts": (2, 3), "times": 2, **options})  # type: ignore[arg-type]
    return {row.trial: row for row in stress(SPEC, prompts, Remembering(Colours()), tried, resamples=100)}


# The libraries


def test_every_trial_asks_every_prompt_once() -> None:
    for trial in trials(PROMPTS, counts=(2, 3, 4, 9), distractors={"extra": ("a",), "more": ("b",), "last": ("c",)}):
        asked = [number for part in trial.parts for number in part.asked]
        assert sorted(asked) == list(range(len(PROMPTS.test)))
        for part in trial.parts:
            assert {PROMPTS.test[number][0] for number in part.asked} <= part.samples.keys()
            assert len(part.samples) == trial.experts


def test_the_trials_that_there_are() -> None:
    names = [trial.name for trial in trials(PROMPTS, counts=(1, 2, 5, 6, 7))]
    assert names == [ALL, HALVES, TWICE, "60 distractors", "2 experts", "5 experts"]


def test_the_same_seed_draws_the_same() -> None:
    assert trials(PROMPTS, counts=(2,), seed=3) == trials(PROMPTS, counts=(2,), seed=3)
    assert trials(PROMPTS, counts=(2,), seed=3) != trials(PROMPTS, counts=(2,), seed=4)


def test_everyone_twice_has_each_sample_once() -> None:
    twice = next(trial for trial in trials(PROMPTS) if trial.name == TWICE)
    samples = twice.parts[0].samples
    assert twice.experts == 2 * len(COLOURS)
    assert Counter(text for texts in samples.values() for text in texts) == Counter(
        text for texts in PROMPTS.samples.values() for text in texts
    )
    assert set(twice.owner.values()) == set(COLOURS)
    assert all(name.startswith(owner) for name, owner in twice.owner.items())


def test_an_only_sample_and_none_are_in_both_halves() -> None:
    first, second = halves({"one": ("a",), "none": ()})
    assert first == {"one": ("a",), "none": ()}
    assert second == {"one (again)": ("a",), "none (again)": ()}


def test_made_up_experts_have_as_many_samples_as_is_usual() -> None:
    found = made_up(PROMPTS.samples, 12, Random(0))
    known = {text for texts in PROMPTS.samples.values() for text in texts}
    assert len(found) == 12
    assert list(found) == sorted(found)
    assert {len(set(texts)) for texts in found.values()} == {6}
    assert {text for texts in found.values() for text in texts} <= known


def test_small_libraries_have_tested_experts_first_and_large_ones_distractors_last() -> None:
    given = {**PROMPTS.samples, "extra": ("x",), "more": ("y",)}
    for n, others in ((2, set()), (4, set()), (6, {COLOURS[5]}), (7, {COLOURS[5]})):
        for part in parts(PROMPTS, given, n, Random(0)):
            assert len(part.samples) == n
            assert others <= part.samples.keys()
            assert len(part.samples.keys() - {"extra", "more"}) == min(n, 6)
            if n <= 5:
                assert COLOURS[5] not in part.samples


def test_given_distractors_are_taken_as_many_as_wanted_and_under_names_of_their_own() -> None:
    given = {"red": ("rouge",), **{f"extra-{n}": (f"text {n}",) for n in range(20)}}
    trial = trials(PROMPTS, counts=(), times=2, distractors=given)[-1]
    assert trial.name == "12 distractors"
    assert trial.parts[0].samples["red"] == PROMPTS.samples["red"]
    assert trial.parts[0].samples["red (distractor)"] == ("rouge",)


# The figures


def test_all_is_what_eval_routing_measures() -> None:
    found = rows_of()[ALL]
    measured = measure(SPEC, PROMPTS, Remembering(Colours()), resamples=100)
    for name in ("top1", "top3", "routed", "abstained", "false_accepts"):
        assert found.metrics[name] == measured.metrics[name]
    assert (found.control, found.change) == (None, None)


def test_a_duplicate_that_answers_is_right() -> None:
    found = rows_of()
    assert found[TWICE].metrics["top1"].value == found[HALVES].metrics["top1"].value == 1
    assert found[TWICE].metrics["top3"].value == 1
    assert found[TWICE].control == HALVES
    assert found[TWICE].change is not None


def test_an_expert_for_everything_costs_what_it_takes() -> None:
    """One distractor has all that is tested: every prompt is its own sample."""
    nearest = RouterSpec("nearest", "retrieval", {"scoring": "best", "threshold": 0.4})
    taken = tuple(text for _, text in PROMPTS.test[:6])
    tried = trials(PROMPTS, counts=(), distractors={"aaa": taken})
    rows = stress(nearest, PROMPTS, Remembering(Colours()), tried, resamples=100)
    row = rows[-1]
    assert row.change is not None
    assert row.change.value == pytest.approx(row.metrics["routed"].value - rows[0].metrics["routed"].value)
    assert row.change.value < 0
    assert row.change.low <= row.change.value <= row.change.high


def test_rows_as_json() -> None:
    for row in rows_of().values():
        said = json.loads(json.dumps(row.json()))
        assert said["trial"] == row.trial
        assert said["metrics"].keys() >= {"top1", "routed", "search_p50_ms", "search_p95_ms"}


# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setattr("router.encoder.load_encoder", lambda *args, **options: Colours())
    monkeypatch.setattr("eval.encodings.default_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, ["stress", *map(str, arguments)])


def written(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"task": task, "instance": text}) + "\n" for task, text in rows))
    return path


def test_the_command_prints_a_row_to_a_trial(run: Run, tmp_path: Path) -> None:
    register = [(task, text) for task, texts in PROMPTS.samples.items() for text in texts]
    files = (
        *("--register", written(tmp_path / "register.jsonl", register)),
        *("--test", written(tmp_path / "test.jsonl", PROMPTS.test)),
        *("--ood", written(tmp_path / "ood.jsonl", PROMPTS.ood)),
        *("--distractors", written(tmp_path / "more.jsonl", [("x", "a text"), ("x", "another"), ("y", "of none")])),
        *("--router", "retrieval", "--count", 2, "--resamples", 100),
    )
    shown = run(*files)
    assert shown.exit_code == 0, shown.output
    for name in (ALL, HALVES, TWICE, "2 distractors", "2 experts"):
        assert name in shown.stdout
    out = tmp_path / "out.json"
    assert run(*files, "--json", out).exit_code == 0
    said = json.loads(out.read_text())
    assert [row["experts"] for row in said["rows"]] == [6, 6, 12, 8, 2]
    more = tmp_path / "more.jsonl"
    assert said["ran"]["distractors"] == [{"file": str(more), "sha256": hashlib.sha256(more.read_bytes()).hexdigest()}]
    assert json.loads(run(*files, "--json", "-").stdout)["rows"][0]["trial"] == ALL


def test_what_cannot_be_measured_is_said(run: Run, tmp_path: Path) -> None:
    register = written(tmp_path / "register.jsonl", [("a", "red"), ("b", "blue")])
    assert "go together" in run("--register", register).stderr
    test = written(tmp_path / "test.jsonl", [("a", "red")])
    missing = run("--register", register, "--test", test, "--distractors", tmp_path / "none.jsonl")
    assert missing.exit_code == 2
    assert "none.jsonl" in missing.stderr
    assert "No router 'magic'" in run("--register", register, "--test", test, "--router", "magic").stderr
