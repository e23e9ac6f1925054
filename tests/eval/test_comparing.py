from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from eval.columns import columns_of
from eval.comparing import CannotCompare, Change, Comparison, Pair, Side, compare, gate, sides
from eval.intervals import Estimate
from eval.records import NotARun, Record, Run
from eval.slices import BadSlice
from tests.eval.runs import made, records_of, run_of

MANY = tuple(f"t{n}" for n in range(12))


def side(name: str, records: Sequence[Record], router: str | None = None, run: Run | None = None) -> Side:
    return Side(name, run or run_of(records), columns_of(records), router)


def pair(found: Comparison, regime: str, name: str) -> Pair:
    return next(each for each in found.pairs if (each.regime, each.first) == (regime, name))


@pytest.fixture(scope="module")
def before() -> list[Record]:
    return list(records_of(tasks=MANY))


@pytest.fixture(scope="module")
def after() -> list[Record]:
    return list(records_of(tasks=MANY, seed=1, skill={"fusion": 1.0}))


def test_every_router_is_compared_on_the_same_prompts(before: list[Record], after: list[Record]) -> None:
    found = compare(side("a", before), side("b", list(reversed(after))), resamples=300)
    assert len(found.pairs) == 3 * 9
    assert found.complete
    assert not found.lacking
    for each in found.pairs:
        scores = [
            {r.example: r.score for r in records if (r.router, r.regime) == (each.first, each.regime) and r.owners}
            for records in (before, after)
        ]
        gained = [scores[1][example] - scores[0][example] for example in scores[0]]
        change = each.figures["score"]
        assert change.difference.value == pytest.approx(fmean(gained))
        assert (change.first, change.second) == pytest.approx(tuple(fmean(s.values()) for s in scores))
        by_task = np.array([fmean(gained[n * 6 : n * 6 + 6]) for n in range(12)])
        twin = bootstrap(
            [by_task], np.mean, n_resamples=300, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        assert (change.difference.low, change.difference.high) == pytest.approx(tuple(twin))
        assert each.prompts == (76 if each.regime == "in-distribution" else 72)
        assert each.left_out == 0
    assert pair(found, "ood", "fusion").mark == "better"


def test_a_run_does_not_differ_from_itself(before: list[Record]) -> None:
    found = compare(side("a", before), side("a", before), resamples=100)
    for each in found.pairs:
        assert each.q == 1
        assert not each.mark
        assert all(change.difference == Estimate(0, 0, 0) for change in each.figures.values())
    assert not found.notes


def test_two_routers_of_a_run_are_as_in_its_table(before: list[Record]) -> None:
    from eval.table import table

    found = compare(side("a:best-single", before, "best-single"), side("a:fusion", before, "fusion"))
    told = table(run_of(before), before)
    assert [(each.first, each.second) for each in found.pairs] == [("best-single", "fusion")] * 3
    assert found.pairs[0].name == "best-single > fusion"
    for each in found.pairs:
        row = told.regimes[each.regime].row("fusion")
        assert row is not None
        assert row.difference is not None
        assert each.figures["score"].difference == row.difference.estimate
        assert each.p == row.difference.p
        assert each.figures["p95_ms"].second == pytest.approx(row.figures["p95_ms"].value)
        assert each.figures["regret"].second == pytest.approx(row.figures["regret"].value)
        assert each.figures["normalised"].second == pytest.approx(row.figures["normalised"].value)


def test_one_router_of_one_run_is_the_same_of_the_other(before: list[Record], after: list[Record]) -> None:
    found = compare(side("a:fusion", before, "fusion"), side("b", after), resamples=100)
    assert {(each.first, each.second) for each in found.pairs} == {("fusion", "fusion")}


def test_only_what_both_have_answered_is_compared(before: list[Record], after: list[Record]) -> None:
    def fails(record: Record) -> bool:
        return (record.router, record.regime, record.task) == ("fusion", "ood", "t3")

    broken = [r.model_copy(update={"score": None, "error": "gone"}) if fails(r) else r for r in after]
    run = run_of(broken, missing=["6 answers of fusion"])
    found = compare(side("a", before), side("b", broken, run=run), resamples=100)
    rest = [[r for r in records if r.task != "t3"] for records in (before, after)]
    without = compare(side("a", rest[0]), side("b", rest[1]), resamples=100)
    assert not found.complete
    assert "b is incomplete: 6 answers of fusion." in found.notes
    each = pair(found, "ood", "fusion")
    assert (each.prompts, each.left_out) == (66, 6)
    for name in ("score", "abstained", "p50_ms", "tokens_per_s"):
        change, alone = each.figures[name], pair(without, "ood", "fusion").figures[name]
        assert (change.first, change.second) == pytest.approx((alone.first, alone.second))
        assert change.difference.low < change.difference.value < change.difference.high
    assert pair(found, "ood", "retrieval").prompts == 72
    assert any("ood, fusion: 6 prompts that only one" in each for each in found.lacking)


def test_what_only_one_has_is_named_and_left_out(before: list[Record]) -> None:
    fewer = [r for r in before if r.router != "retrieval" and r.regime != "ood" and r.example != "t0/1"]
    fewer = [r.model_copy(update={"length": 999}) if r.example == "t0/2" else r for r in fewer]
    run = run_of(fewer, digest="d2").model_copy(update={"resident": 7, "base": "other"})
    experts = tuple(each.model_copy(update={"digest": "new"}) for each in run.experts)
    found = compare(side("a", before), side("b", fewer, run=run.model_copy(update={"experts": experts[1:]})))
    notes = "\n".join(found.notes)
    assert "The suite is not the same in both: its digest is d1 and d2." in notes
    assert "The base models differ: tiny and other." in notes
    assert "Experts that are not the same in both: t1, t2, t3, t4, t5 and 6 more." in notes
    assert "Experts that only a has, left out: t0." in notes
    assert "Routers that only a has, left out: retrieval." in notes
    assert "Regimes that only a has, left out: ood." in notes
    assert "Prompts that only a has, left out: t0/1." in notes
    assert "1 prompts are not the same in both and left out: t0/2." in notes
    assert "Loads are counted for 2" in notes
    assert {each.regime for each in found.pairs} == {"in-distribution", "semi-ood"}
    assert "retrieval" not in {each.first for each in found.pairs}
    assert pair(found, "semi-ood", "fusion").prompts == 70
    lacking = "\n".join(found.lacking)
    assert "2 prompts: t0/1, t0/2" in lacking
    assert "in-distribution: retrieval" in lacking
    assert "ood: base, oracle" in lacking


def test_what_the_second_has_more_is_nothing_that_it_lacks(before: list[Record]) -> None:
    fewer = [r for r in before if r.router != "retrieval" and r.regime != "ood" and r.example != "t0/1"]
    found = compare(side("a", fewer), side("b", before), resamples=100)
    assert found.lacking == ()
    assert "Routers that only b has, left out: retrieval." in found.notes


def test_of_a_slice_only_its_prompts_are_compared(before: list[Record], after: list[Record]) -> None:
    found = compare(side("a", before), side("b", after), where="tag=odd, regime=ood", routers=["fusion"])
    assert [(each.regime, each.first, each.prompts) for each in found.pairs] == [("ood", "fusion", 36)]
    odd = [[r for r in records if "odd" in r.tags] for records in (before, after)]
    alone = compare(side("a", odd[0]), side("b", odd[1]), regimes=["ood"], routers=["fusion"])
    assert found.pairs == alone.pairs


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"routers": ["knn"]}, "a has no router knn. It has: base,"),
        ({"regimes": ["odd"]}, "No regime odd. There are: in-distribution"),
        ({"where": "task=none"}, "no prompt in common in the slice task=none"),
        ({"regimes": ["ood"], "where": "regime=semi-ood"}, "No router has records"),
    ],
)
def test_nothing_to_compare_is_said(before: list[Record], options: dict[str, Any], why: str) -> None:
    with pytest.raises(CannotCompare, match=why):
        compare(side("a", before), side("b", before), **options)
    with pytest.raises(BadSlice):
        compare(side("a", before), side("b", before), where="even")


def test_log_likelihoods_alone_have_no_score() -> None:
    records = list(records_of(metrics=dict.fromkeys(("add", "reverse", "vowels"), "log_likelihood")))
    found = compare(side("a", records), side("b", records), resamples=100)
    assert all("score" not in each.figures and each.p is None and each.mark == "" for each in found.pairs)
    assert "abstained" in found.pairs[0].figures


def test_json_has_every_figure(before: list[Record]) -> None:
    document = compare(side("a", before), side("b", before), resamples=100).json()
    assert document["pairs"][0]["figures"]["top1"] is None
    assert set(document["pairs"][0]["figures"]["score"]) == {"first", "second", "difference"}


# What a user names


def test_a_folder_and_one_router_of_it(make_run: Callable[..., Path]) -> None:
    folder = make_run(routers=["fusion", "retrieval:scoring=best"])
    whole, one, two = sides(str(folder), f"{folder}:fusion", f"{folder}:retrieval:scoring=best")
    assert (whole.router, one.router, two.router) == (None, "fusion", "retrieval:scoring=best")
    assert whole.columns is one.columns
    with pytest.raises(CannotCompare, match=r":knn: no such router in the run. There are: base,"):
        sides(f"{folder}:knn")
    with pytest.raises(NotARun, match=r"holds no run\.json"):
        sides(str(folder.parent / "other"))


def test_a_folder_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    folder = made(tmp_path / "a:b", list(records_of()))
    assert sides(str(folder))[0].router is None
    assert sides(f"{folder}:fusion")[0].router == "fusion"


# The gate


def changed(value: float, low: float, high: float, metric: str = "score") -> Pair:
    change = Change(0.5, 0.5 + value, Estimate(value, low, high))
    return Pair("ood", "fusion", "fusion", 10, 0, {metric: change}, 0.5, 0.5)


@pytest.mark.parametrize(
    ("interval", "passes", "strictly"),
    [
        ((0.02, 0.01, 0.03), True, True),
        ((0.0, 0.0, 0.0), True, True),
        ((-0.01, -0.01, -0.01), True, True),  # the most that is allowed
        ((-0.01 - 1e-12, -0.01 - 1e-12, -0.01), True, True),  # so is this, but for a sum in another order
        ((0.02, -0.02, 0.06), True, False),  # better, but who knows
        ((-0.005, -0.03, 0.02), True, False),
        ((-0.02, -0.04, 0.0), False, False),
        ((-0.04, -0.05, -0.02), False, False),
    ],
)
def test_a_gate_fails_on_a_loss_and_strictly_on_a_possible_one(
    interval: tuple[float, float, float], passes: bool, strictly: bool
) -> None:
    pairs = [changed(*interval)]
    assert [each.passed for each in gate(pairs, "score", 0.01)] == [passes]
    assert [each.passed for each in gate(pairs, "score", 0.01, strict=True)] == [strictly]


def test_a_verdict_says_whether_it_is_sure() -> None:
    sure, perhaps, possible = (
        gate([changed(*each)], "score", 0.01, strict=True)[0].reason
        for each in ((-0.04, -0.05, -0.02), (-0.02, -0.04, 0.0), (0.0, -0.03, 0.03))
    )
    assert sure == "worse by 0.040, surely"
    assert perhaps == "worse by 0.020, perhaps by chance of these prompts"
    assert possible == "may be worse by 0.030 on other prompts"


@pytest.mark.parametrize(("metric", "passes"), [("p95_ms", False), ("false_accepts", False), ("top1", True)])
def test_more_is_worse_for_some_figures(metric: str, passes: bool) -> None:
    verdicts = gate([changed(0.3, 0.2, 0.5, metric)], metric, 0.01)
    assert [each.passed for each in verdicts] == [passes]
    assert verdicts[0].gain == (Estimate(0.3, 0.2, 0.5) if passes else Estimate(-0.3, -0.5, -0.2))
    assert gate([changed(0.3, 0.2, 0.5, metric)], "score", 0.01) == []
