"""What pictures show, against counting by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from eval.examples import Example
from eval.records import ExpertInfo, Record, Run, TaskInfo, read_examples, read_records, read_run
from eval.report.examples import LENGTH, Oracle, cut, losses, who
from eval.report.figures import BASE, Tally, gates
from eval.report.gallery import confusions, matrix
from tests.eval.report.runs import GATED, Made


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> tuple[Run, list[Record], dict[str, Example]]:
    folder = Made(experts=4, routers=3).write(tmp_path_factory.mktemp("run"))
    examples = {example.id: example for example in read_examples(folder)}
    return read_run(folder), list(read_records(folder)), examples


@pytest.fixture(scope="module")
def tally(read) -> Tally:
    run, records, _ = read
    result = Tally(run)
    for record in records:
        result.add(record)
    return result


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def test_the_matrix_holds_mean_scores_of_experts_and_of_the_base_model(read, tally):
    run, records, _ = read
    grid = tally.matrix()
    assert grid.rows == tuple(task.name for task in run.tasks if task.owners)
    assert grid.columns == (BASE, *(expert.name for expert in run.experts))
    for (row, task), (column, name) in product(enumerate(grid.rows), enumerate(grid.columns)):
        router = "base" if name == BASE else f"expert:{name}"
        found = [r.score for r in records if (r.router, r.task, r.regime) == (router, task, "in-distribution")]
        assert grid.values[row, column] == pytest.approx(mean(found))
    assert {(grid.rows[row], grid.columns[column]) for row, column in grid.own} == {
        (task.name, owner) for task in run.tasks for owner in task.owners
    }


def test_rows_of_a_confusion_are_shares_of_prompts(read, tally):
    _, records, _ = read
    for router in ("router-00", "uniform", "base"):
        grid = tally.confusion(router)
        np.testing.assert_allclose(grid.values.sum(axis=1), 1)
        asked = [r for r in records if (r.router, r.task, r.regime) == (router, "task 01", "in-distribution")]
        for column, name in enumerate(grid.columns):
            part = [dict(r.experts or ((BASE, 1.0),)).get(name, 0.0) for r in asked]
            assert grid.values[grid.rows.index("task 01"), column] == pytest.approx(mean(part))


def test_confusions_in_words_leave_out_who_was_right(tally):
    assert confusions(tally.confusion("oracle")) == "Every prompt went to the right expert."
    told = confusions(tally.confusion("best-single"))
    assert told.count(" to expert-00") == 3  # of three named, and only of tasks that are not its own
    assert "task 00 to" not in told


def curve_by_hand(records: list[Record], limit: float) -> tuple[float, float, float]:
    """Share answered, their mean score, false accepts: of those who are at least so sure."""
    inside = [r for r in records if r.score is not None]
    outside = [r for r in records if not r.owners]
    answered = [r.score for r in inside if r.kind != "base" and r.confidence >= limit]
    accepted = [r for r in outside if r.kind != "base" and r.confidence >= limit]
    return len(answered) / len(inside), mean(answered), len(accepted) / len(outside)


def test_a_curve_of_abstention_is_what_limits_on_the_confidence_would_give(read, tally):
    _, records, _ = read
    own = [r for r in records if (r.router, r.regime) == ("router-01", "in-distribution")]
    curve = tally.abstention("in-distribution", "router-01")
    assert curve is not None
    limits = [*sorted({r.confidence for r in own if r.score is not None and r.kind != "base"}, reverse=True), 0.0]
    expected = [curve_by_hand(own, limit) for limit in limits]
    got = list(zip(curve.answered, curve.score, curve.accepted, strict=True))
    assert len(got) == len(expected)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_there_is_no_curve_without_confidence(tally):
    assert tally.abstention("in-distribution", "uniform") is None
    assert tally.abstention("ood", "nobody") is None


def test_equal_confidence_is_answered_together():
    run = Run(suite="s", digest="d", tasks=Made(experts=1).tasks)
    tally = Tally(run)
    for number, (sure, score) in enumerate([(0.9, 1.0), (0.5, 0.0), (0.5, 1.0)]):
        tally.add(
            Record(router="r", regime="ood", example=f"task 00/{number}", task="task 00", owners=("expert-00",),
                   kind="select", confidence=sure, score=score)
        )  # fmt: skip
    curve = tally.abstention("ood", "r")
    assert curve is not None
    assert curve.answered == (0.3333, 1.0, 1.0)
    assert curve.score == (1.0, 0.6667, 0.6667)
    assert curve.accepted == ()


def test_gates_are_means_over_prompts_by_group_and_name():
    trace = {"gate": "g", "tokens": 2, "evidence": []}
    traces = [
        {"router": GATED, "prompt": "one", "trace": {**trace, "experts": ["b@1", "a@1"], "groups": ["x", "", "y"],
                                                     "weights": [[0.2, 0.8], [0, 0], [1.0, 0.0]], "top": [1, 0]}},
        {"router": GATED, "prompt": "two", "trace": {**trace, "experts": ["c@1", "a@1"], "groups": ["x"],
                                                     "weights": [[0.5, 0.5]], "top": [0]}},
        {"router": GATED, "prompt": "three", "trace": None},
    ]  # fmt: skip
    [found] = gates(Run(suite="s", digest="d", traces=traces))
    assert found.weights.columns == ("a", "b", "c")
    assert found.weights.rows == ("x", "y")
    np.testing.assert_allclose(found.weights.values, [[0.65, 0.1, 0.25], [0.0, 1.0, 0.0]])
    assert found.tokens == (("one", (0, 1)), ("two", (2,)))


def test_losses_are_all_prompts_on_which_the_oracle_is_better(read):
    run, records, examples = read
    oracle = Oracle()
    for record in records:
        oracle.add(record)
    found = losses(records, oracle, ["router-00", "router-01"], examples)
    assert [(each.router, each.regime) for each in found] == [
        (router, regime) for router in ("router-00", "router-01") for regime in run.regimes
    ]
    best = {(r.regime, r.example): r.score for r in records if r.router == "oracle"}
    for each in found:
        own = [r for r in records if (r.router, r.regime) == (each.router, each.regime) and r.score is not None]
        assert each.compared == len(own)
        assert each.count == sum(r.score < best[r.regime, r.example] for r in own)
        assert all(lost.oracle.score > lost.router.score and lost.right == ("right",) for lost in each.worst)


def test_the_worst_of_every_task_come_before_the_second_of_any():
    rows = [
        Record(router=router, regime="ood", example=f"{task}/{k}", task=task, owners=("e",), score=score, answer=str(k))
        for task, scores in {"a": (0.0, 0.1, 0.2), "b": (0.5,)}.items()
        for k, own in enumerate(scores)
        for router, score in (("oracle", 1.0), ("r", own))
    ]
    oracle = Oracle()
    for record in rows:
        oracle.add(record)
    [found] = losses(rows, oracle, ["r"], {})
    assert [lost.example for lost in found.worst] == ["a/0", "b/0", "a/1", "a/2"]
    assert found.worst[0].prompt == ""
    assert found.worst[0].right == ()


def test_a_router_that_loses_nothing_is_there_with_nothing_lost(read):
    _, records, examples = read
    oracle = Oracle()
    for record in records:
        oracle.add(record)
    found = losses(records, oracle, ["oracle"], examples)
    assert [(each.count, each.worst) for each in found] == [(0, ())] * 3


def test_scores_without_a_scale_are_in_no_curve_and_no_heat_map():
    tasks = [TaskInfo(name=name, metric=name, owners=("e",)) for name in ("exact_match", "log_likelihood")]
    tally = Tally(Run(suite="s", digest="d", experts=(ExpertInfo(name="e"),), tasks=tuple(tasks)))
    for number, (task, score) in enumerate([("exact_match", 1.0), ("exact_match", 0.0), ("log_likelihood", -7.0)] * 2):
        for router in ("r", "expert:e"):
            tally.add(
                Record(router=router, regime="in-distribution", example=f"{task}/{number}", task=task, owners=("e",),
                       metric=task, kind="select", experts=(("e", 1.0),), confidence=0.9 - number / 10, score=score)
            )  # fmt: skip
    curve = tally.abstention("in-distribution", "r")
    assert curve is not None
    assert (curve.answered[-1], curve.score[-1]) == (1.0, 0.5)
    shown = tally.matrix().only([True, False])
    assert (shown.rows, shown.own) == (("exact_match",), ((0, 1),))
    pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")
    picture = matrix(tally.matrix())
    assert picture is not None
    assert picture.caption.endswith("log_likelihood.")
    assert picture.grid is not None
    assert picture.grid.rows == shown.rows


def test_experts_stand_in_the_order_of_their_tasks():
    experts = [ExpertInfo(name=name) for name in ("spare", "b", "a")]
    tasks = [TaskInfo(name=name, metric="exact_match", owners=(name,)) for name in ("a", "b")]
    grid = Tally(Run(suite="s", digest="d", experts=tuple(experts), tasks=tuple(tasks))).confusion("r")
    assert grid.columns == (BASE, "a", "b", "spare")
    assert grid.own == ((0, 1), (1, 2))


def test_who_answered_in_words():
    def record(kind: str, **experts: float) -> Record:
        return Record(router="r", regime="ood", example="x", task="t", kind=kind, experts=tuple(experts.items()))

    assert who(record("base")) == "base model"
    assert who(record("select", sql=1.0)) == "sql"
    assert who(record("blend", sql=0.3, poetry=0.7)) == "poetry 0.7 + sql 0.3"
    assert who(record("blend", a=0.2, b=0.2, c=0.2, d=0.2, e=0.2)) == "a 0.2 + b 0.2 + c 0.2 + 2 more"


def test_long_texts_say_how_much_is_not_shown():
    assert cut("short") == "short"
    assert cut("x" * (LENGTH + 1234)).endswith("… (1,234 more characters)")
