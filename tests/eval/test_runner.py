"""A run of a suite: equal questions once, what is missing is said, and going on is as if nothing had happened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters_registry.expert import Expert, Sample, State
from adapters_registry.manifest import BaseRef
from eval.asking import Ask, EngineGone, Prompt
from eval.cache import Cache
from eval.encodings import Remembering
from eval.examples import Example
from eval.questions import adapter_of
from eval.recipe import Recipe
from eval.records import REFERENCES, Record, Run, TaskInfo, read_examples, read_records, read_run
from eval.runner import BadRun, Setup, run
from eval.suite import Blend, RouterEntry, Suite
from tests.eval.strangers import InProcess
from tests.router.conftest import WordsEncoder

Prompts = dict[str, Sequence[str]]
SAMPLES: Prompts = {
    "maths": ("add two numbers", "multiply numbers"),
    "poetry": ("write a poem", "rhyme a verse"),
    "code": ("write a program", "fix the bug"),
}
ASKED: Prompts = {
    "maths": ("add three numbers", "multiply these numbers"),
    "poetry": ("write a verse", "rhyme a poem"),
    "code": ("fix the program", "write the bug"),
}
ROUTERS = (
    RouterEntry(name="retrieval", family="selection", method="retrieval"),
    RouterEntry(name="mixture", family="mixture", method="retrieval", settings={"top_k": 2, "threshold": -1}),
    RouterEntry(name="all by ties", family="blend", blend=Blend(operator="ties")),
    RouterEntry(name="arrow", family="gate", method="arrow"),
    RouterEntry(name="auto", family="endpoint", model="auto"),
)


def expert(name: str) -> Expert:
    return Expert(
        name=name,
        version=1,
        digest=hashlib.sha256(name.encode()).hexdigest(),
        state=State.ACTIVE,
        path=Path(name),
        base_model="base",
        rank=8,
        target_modules=("q_proj",),
        source="test",
        samples=tuple(Sample(prompt=text) for text in SAMPLES[name]),
    )


def example(name: str, text: str, number: int) -> Example:
    """Right is what the expert says."""
    return Example(
        id=f"{name}/{number}", task=name, owners=(name,), prompt=Prompt(text=text), answers=(f"{name}: {text}",)
    )


EXAMPLES = (
    *(example(name, text, number) for name, texts in ASKED.items() for number, text in enumerate(texts)),
    Example(
        id="both/0",
        task="both",
        owners=("maths", "poetry"),
        prompt=Prompt(text="rhyme three numbers"),
        answers=("poetry: rhyme three numbers",),
    ),
    Example(id="strange/0", task="strange", prompt=Prompt(text="how is the weather"), metric="none"),
)


def tell(what: str, done: int, total: int) -> None:
    return


@pytest.fixture
def setup() -> Setup:
    suite = Suite(
        name="small",
        path=Path("small.yaml"),
        base_model=BaseRef(name="base", model="base"),
        experts=(),
        tasks=(),
        routers=ROUTERS,
    )
    return Setup(
        suite=suite,
        experts=[expert(name) for name in SAMPLES],
        examples=EXAMPLES,
        tasks=[TaskInfo(name=name, metric="exact_match") for name in (*SAMPLES, "both", "strange")],
        encoder=Remembering(WordsEncoder()),
        engine_id="in process",
        random={"random-weights-0": "digest"},
    )


@pytest.fixture
def go(setup: Setup, tmp_path: Path) -> Callable[..., Run]:
    """go(engine, "folder", cache folder and changes of the setup): the run that is written to the folder."""

    def start(engine: InProcess, out: str = "out", cache: str = "out", **changes: Any) -> Run:
        with Cache(tmp_path / cache / "cache.sqlite") as kept:
            return run(replace(setup, **changes), lambda: engine, kept, tmp_path / out, tell)

    return start


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., list[Record]]:
    def read(router: str, regime: str = "in-distribution", out: str = "out") -> list[Record]:
        found = read_records(tmp_path / out)
        return [each for each in found if (each.router, each.regime) == (router, regime)]

    return read


def mean(records: Sequence[Record]) -> float:
    scores = [each.score for each in records if each.score is not None]
    return sum(scores) / len(scores)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("run.json", "samples.jsonl", "examples.jsonl")}


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [each.model_dump(exclude={"route_ms", "answer_ms"}) for each in read_records(folder)]


def test_a_run_has_every_row_for_every_example_and_is_complete(go, rows, tmp_path):
    done = go(InProcess())
    assert done.complete
    assert done.missing == ()
    assert done == read_run(tmp_path / "out")
    assert done.expected == len(list(read_records(tmp_path / "out")))
    names = [each.name for each in done.routers]
    assert names == [*REFERENCES, *(f"expert:{name}" for name in sorted(SAMPLES)), *(each.name for each in ROUTERS)]
    assert {each.router for each in read_records(tmp_path / "out")} == set(names)
    for name in (*REFERENCES, "retrieval", "mixture", "arrow"):
        assert len(rows(name)) == 8
        assert len(rows(name, "ood")) == len(rows(name, "semi-ood")) == 7
    assert len(rows("expert:maths")) == 7
    assert len(rows("auto")) == 8
    assert rows("auto", "ood") == []
    assert tuple(read_examples(tmp_path / "out")) == EXAMPLES


def test_scores_are_what_the_answers_deserve(go, rows):
    go(InProcess())
    assert mean(rows("oracle")) == 1
    assert mean(rows("best-per-query")) == 1
    assert mean(rows("base")) == 0
    assert mean(rows("retrieval")) == pytest.approx(sum(each.rank == 1 for each in rows("retrieval")) / 7, abs=0.2)
    assert mean(rows("best-per-query", "ood")) == 0  # the composition has two owners, and neither may answer
    (both,) = (each for each in rows("oracle") if each.task == "both")
    assert both.experts == (("poetry", 1.0),)
    (strange,) = (each for each in rows("retrieval") if each.task == "strange")
    assert (strange.score, strange.error, strange.answer, strange.tokens) == (None, None, "", 0)
    (asked,) = (each for each in rows("auto") if each.task == "strange")
    assert (asked.kind, asked.experts, asked.adapter) == ("select", (("maths", 1.0),), "maths")


def test_equal_questions_are_asked_once(go):
    engine = InProcess()
    done = go(engine)
    told = [(each.recipe, each.prompt.text, each.traced) for each in engine.asked]
    assert len(told) == len(set(told))
    assert len(told) < done.expected / 2
    nothing_right = [each for each in engine.asked if each.prompt.text == "how is the weather"]
    assert [(each.recipe.kind, each.max_tokens) for each in nothing_right] == [("model", 1)]


def test_the_same_run_again_asks_nobody_and_writes_the_same_bytes(go, tmp_path):
    first = InProcess()
    go(first)
    before = content(tmp_path / "out")
    again = InProcess()
    go(again)
    assert again.opened == 0
    assert content(tmp_path / "out") == before


def test_a_run_whose_engine_went_is_incomplete_and_goes_on_as_if_nothing_had_happened(go, tmp_path):
    whole = InProcess()
    go(whole, "whole", "whole")
    broken = InProcess(most=20)
    partly = go(broken)
    assert not partly.complete
    assert "questions were not asked: it fell over" in partly.missing[0]
    assert len(partly.missing) == 2
    assert partly.missing[1].endswith("records have no score: their questions were not asked")
    rest = InProcess()
    done = go(rest)
    assert done.complete
    assert len(broken.asked) + len(rest.asked) == len(whole.asked)
    assert without_times(tmp_path / "out") == without_times(tmp_path / "whole")
    assert done == read_run(tmp_path / "whole")


def test_an_engine_that_never_answers_leaves_nothing_behind(go, tmp_path):
    with pytest.raises(EngineGone, match="fell over"):
        go(InProcess(most=0))
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_refused_blend_is_said_and_harms_no_other_row(go, rows):
    def refuse(ask: Ask) -> str | None:
        return "too much rank" if ask.recipe.operator == "ties" else None

    done = go(InProcess(refuse))
    assert not done.complete
    assert len(done.missing) == 3
    assert done.missing[0] == "all by ties, in-distribution: 7 without a score: too much rank"
    assert {each.error for each in rows("all by ties") if each.task != "strange"} == {"too much rank"}
    assert mean(rows("oracle")) == 1
    again = InProcess()
    assert go(again).complete  # an error is not kept
    assert {each.recipe.operator for each in again.asked} == {"ties"}


def test_another_engine_or_another_expert_is_another_question(go, setup):
    go(InProcess())
    other = InProcess()
    go(other, engine_id="another")
    assert len(other.asked) > 50
    changed = setup.experts[0].model_copy(update={"digest": "0" * 64})
    engine = InProcess()
    go(engine, experts=[changed, *setup.experts[1:]])
    assert engine.asked
    assert all("maths" in each.recipe.names or each.recipe.kind == "model" for each in engine.asked)


def test_time_runs_out(go):
    done = go(InProcess(), minutes=1e-9)
    assert not done.complete
    assert "the time limit of 1e-09 minutes came" in done.missing[0]


def test_traces_of_gates_are_kept_without_what_changes_from_run_to_run(go):
    done = go(InProcess())
    assert {each["router"] for each in done.traces} == {"arrow"}
    assert len({each["example"] for each in done.traces}) == len(done.traces) == 3
    assert all(set(each["trace"]) == {"experts", "weights"} for each in done.traces)
    assert done.traces[0]["trace"]["weights"] == [[0.3333]]
    assert done.traces[0]["prompt"] == "add three numbers"


def test_an_example_that_its_metric_cannot_score_is_named_before_anything_is_asked(go):
    engine = InProcess()
    wrong = EXAMPLES[0].model_copy(update={"metric": "accuracy"})
    with pytest.raises(BadRun, match="maths/0"):
        go(engine, examples=(wrong, *EXAMPLES[1:]))
    assert engine.opened == 0


def test_programs_that_may_not_run_are_not_asked_for(go):
    engine = InProcess()
    code = EXAMPLES[0].model_copy(update={"metric": "pass@1", "tests": "pass"})
    with pytest.raises(BadRun, match="--allow-code"):
        go(engine, examples=(code, *EXAMPLES[1:]))
    assert engine.opened == 0


def test_choices_are_asked_and_scored_by_their_log_likelihoods(go, rows):
    chosen = EXAMPLES[0].model_copy(update={"metric": "accuracy", "choices": ("long one", "no"), "gold": 1})
    go(InProcess(), examples=(chosen, *EXAMPLES[1:]))
    assert rows("base")[0].score == 1  # the stand-in prefers what is short


def test_seeds_count_where_answers_are_drawn(go, setup):
    drawn = EXAMPLES[0].model_copy(update={"temperature": 0.7})
    engine = InProcess()
    suite = setup.suite.model_copy(update={"seeds": (3, 4)})
    go(engine, examples=(drawn, *EXAMPLES[1:]), suite=suite)
    assert {each.seed for each in engine.asked if each.temperature == 0} == {0}
    assert {each.seed for each in engine.asked if each.temperature} <= {3, 4}


def test_a_composite_is_the_same_adapter_whatever_its_weights():
    def gate(weight: float) -> Recipe:
        return Recipe(kind="gate", gate="constant", experts=(("a", weight), ("b", 1 - weight)))

    assert adapter_of(gate(0.3)) == adapter_of(gate(0.6)) != adapter_of(Recipe.blend({"a": 0.3, "b": 0.7}))
    assert adapter_of(Recipe.blend({"a": 0.3, "b": 0.7})) != adapter_of(Recipe.blend({"a": 0.6, "b": 0.4}))
    assert adapter_of(Recipe()) == ""
    assert adapter_of(Recipe.expert("a")) == "a"
