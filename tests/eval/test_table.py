"""The table of hand-made runs, against plain loops over their records."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from eval.columns import columns_of
from eval.records import REFERENCES, Record, Regime, RouterInfo, Run, read_records, read_run
from eval.scoring import METRICS
from eval.sections import FIGURES, Row, Section
from eval.slices import BadSlice
from eval.table import Table, table
from eval.table_text import COLUMNS, csv_text, markdown, short
from tests.eval.runs import TASKS, records_of, run_of

MANY = tuple(f"t{n}" for n in range(12))


def told(records: Sequence[Record], **options: Any) -> Table:
    return table(run_of(records), records, **{"resamples": 100, **options})


def by_hand(records: Sequence[Record], name: str, regime: Regime, resident: int) -> dict[str, float]:
    """Every figure of a row without seeds or gaps, by loops."""
    mine = [record for record in records if record.router == name and record.regime == regime]
    owned, strange = [r for r in mine if r.owners], [r for r in mine if not r.owners]
    best = {r.example: r.score for r in records if r.router == "best-per-query" and r.regime == regime}
    oracle = [r for r in records if r.router == "oracle" and r.regime == "in-distribution"]

    def mean(some: Sequence[Record], task: str) -> float:
        return fmean(record.score for record in some if record.task == task and record.score is not None)

    def quantile(share: float) -> float:
        waited = sorted((r.route_ms or 0) + (r.answer_ms or 0) for r in owned)
        return next(each for n, each in enumerate(waited, 1) if n >= share * len(waited) - 1e-9)

    tasks = list(dict.fromkeys(r.task for r in owned))
    keep = lru_cache(resident)(lambda adapter: adapter)
    for record in mine:
        if record.adapter:
            keep(record.adapter)
    found = {
        "score": fmean(mean(owned, task) for task in tasks),
        "normalised": fmean(mean(owned, t) / mean(oracle, t) for t in tasks if mean(oracle, t)),
        "regret": fmean(best[r.example] - r.score for r in owned),
        "abstained": fmean(r.kind == "base" for r in owned),
        "p50_ms": quantile(0.5),
        "p95_ms": quantile(0.95),
        "tokens_per_s": sum(r.tokens for r in owned) / sum(r.answer_ms / 1000 for r in owned),
        "loads": keep.cache_info().misses,
        "flops": fmean(r.flops for r in owned),
    }
    if regime == "in-distribution":
        found["false_accepts"] = fmean(r.kind != "base" for r in strange)
        if any(r.ranked for r in owned):
            found |= {f"top{k}": fmean(0 < r.rank <= k for r in owned) for k in (1, 3)}
    return found


@pytest.mark.parametrize("tasks", [TASKS, MANY])
def test_every_figure_is_what_loops_over_the_records_find(tasks: Sequence[str]) -> None:
    records = list(records_of(tasks=tasks))
    made = told(records)
    assert list(made.regimes) == ["in-distribution", "semi-ood", "ood"]
    for regime, section in made.regimes.items():
        assert section.drawn == ("tasks" if tasks == MANY else "prompts")
        assert section.tasks == tasks
        for row in section.rows:
            figures = {name: figure.value for name, figure in row.figures.items()}
            assert figures == pytest.approx(by_hand(records, row.name, regime, resident=2))
            assert all(figure.low <= figure.value <= figure.high for figure in row.figures.values())
            assert list(figures) == [name for name in FIGURES if name in figures]
            expected = len(tasks) * 6 + (4 if regime == "in-distribution" else 0)
            assert row.counts == {"expected": expected, "answered": expected, "missing": 0, "errors": 0}


def test_references_come_first_then_families_as_the_run_has_them() -> None:
    records = list(records_of(["b", "a", "d", "c"]))
    run = run_of(records)
    families = {"b": "mixture", "a": "gate", "d": "mixture", "c": "selection"}
    routers = [info.model_copy(update={"family": families.get(info.name, info.family)}) for info in run.routers]
    made = table(run.model_copy(update={"routers": tuple(reversed(routers))}), records, resamples=100)
    for section in made.regimes.values():
        assert [row.name for row in section.rows] == [*REFERENCES, "c", "d", "b", "a"]


def test_a_router_that_has_only_one_regime_is_absent_from_the_others() -> None:
    records = [r for r in records_of(["auto", "fusion"]) if r.router != "auto" or r.regime == "in-distribution"]
    made = told(records)
    assert made.regimes["in-distribution"].row("auto") is not None
    assert made.regimes["ood"].row("auto") is None
    assert made.regimes["ood"].absent == ("auto",)
    assert "No records of: auto." in markdown(made)


def test_seeds_are_averaged_prompt_by_prompt() -> None:
    records = list(records_of(seeds={"random": (0, 1, 2)}))
    row = told(records).regimes["ood"].row("random")
    assert row is not None
    single = [[r for r in records if r.seed == seed or r.router != "random"] for seed in range(3)]
    expected = [by_hand(each, "random", "ood", 2) for each in single]
    for name in ("score", "regret", "abstained", "loads"):
        assert row.figures[name].value == pytest.approx(fmean(each[name] for each in expected))
    assert row.counts["expected"] == row.counts["answered"] == 3 * 18


def test_differences_are_of_the_same_prompts_and_corrected_for_the_number_of_routers() -> None:
    names = [f"r{n}" for n in range(6)]
    records = list(records_of(names, MANY, examples=5, skill={"r0": 0.5, "r1": 0.95, "r2": 0.02}))
    section = told(records, baseline="r5").regimes["in-distribution"]
    scores: dict[str, dict[str, float]] = {name: {} for name in (*names, "base")}
    for record in records:
        if record.regime == "in-distribution" and record.owners and record.router in scores:
            scores[record.router][record.example] = record.score or 0.0
    for name in (*names[:5], "base"):
        difference = (section.row(name) or Row(RouterInfo(name=name))).difference
        assert difference is not None
        gained = [scores[name][example] - scores["r5"][example] for example in scores["r5"]]
        assert difference.estimate.value == pytest.approx(fmean(gained))
        assert difference.prompts == 60
        assert difference.q >= difference.p
    rows = {row.name: row for row in section.rows}
    assert rows["r5"].difference is None
    compared = [each for name in names[:5] if (each := rows[name].difference)]
    np.testing.assert_allclose([each.q for each in compared], false_discovery_control([each.p for each in compared]))
    assert [each.mark for each in compared[1:3]] == ["better", "worse"]
    assert "▲" in markdown(told(records, baseline="r5"))


def test_an_interval_of_a_difference_is_narrower_than_those_of_its_scores() -> None:
    records = list(records_of(["a", "b"], MANY, examples=20))
    copy = [r.model_copy(update={"router": "b"}) for r in records if r.router == "a"]
    for n in range(0, len(copy), 19):
        copy[n] = copy[n].model_copy(update={"score": 0.0})
    made = told([r for r in records if r.router != "b"] + copy, baseline="a")
    row = made.regimes["ood"].row("b")
    assert row is not None
    assert row.difference is not None
    told_ = row.difference.estimate
    assert told_.low <= told_.value <= 0
    assert told_.high - told_.low < (row.figures["score"].high - row.figures["score"].low) / 2


def test_without_the_baseline_there_is_nothing_to_compare_with() -> None:
    made = told([r for r in records_of() if r.router != "best-single"])
    assert all(row.difference is None for section in made.regimes.values() for row in section.rows)
    assert "nothing to compare with the baseline 'best-single'" in markdown(made)


def test_log_likelihoods_are_ranked_but_not_averaged() -> None:
    mixed = list(records_of(metrics={"vowels": "log_likelihood"}))
    made, without = told(mixed), told([r for r in mixed if r.task != "vowels"])
    for regime, section in made.regimes.items():
        assert "vowels" in section.left_out
        assert section.ranked == 3
        for row, other in zip(section.rows, without.regimes[regime].rows, strict=True):
            for name in ("score", "normalised", "regret"):
                assert row.figures[name] == other.figures[name]
            assert row.tasks["vowels"] < 0
    assert "vowels: its metric is not from 0 to 1" in markdown(made)
    assert METRICS["log_likelihood"].needs == "likelihood"


def test_tasks_in_which_the_oracle_has_nothing_say_nothing_about_shares_of_it() -> None:
    records = [
        r.model_copy(update={"score": 0.0}) if (r.router, r.task) == ("oracle", "add") else r for r in records_of()
    ]
    section = told(records).regimes["ood"]
    assert section.left_out == {"add": "the oracle scores 0: it is not in normalised"}
    row = section.row("fusion")
    assert row is not None
    assert row.figures["normalised"].value == pytest.approx(by_hand(records, "fusion", "ood", 2)["normalised"])
    assert row.figures["score"].value == pytest.approx(by_hand(records, "fusion", "ood", 2)["score"])


def test_rows_that_know_what_is_right_have_no_place() -> None:
    section = told(list(records_of(skill={"fusion": 1.0, "base": 0.0}))).regimes["semi-ood"]
    rows = {row.name: row for row in section.rows}
    assert rows["oracle"].borda_place is None
    assert rows["best-per-query"].kemeny_place is None
    assert (rows["fusion"].borda_place, rows["fusion"].kemeny_place) == (1, 1)
    assert rows["base"].borda_place == 7
    assert section.exact
    places = [row.kemeny_place for row in section.rows if row.kemeny_place]
    assert min(places) == 1
    assert max(places) <= len(places)


def test_equal_routers_share_their_places() -> None:
    records = list(records_of(["a", "b", "c"], skill={"a": 1, "b": 1, "c": 1}))
    rows = {row.name: row for row in told(records).regimes["ood"].rows}
    assert {(rows[name].borda_place, rows[name].kemeny_place) for name in "abc"} == {(1, 1)}


@pytest.mark.parametrize("where", ["tag=odd", "task=reverse", "expert!=add", "length<=34", "tag=even, task!=add"])
def test_a_slice_is_the_table_of_its_records(where: str) -> None:
    records = list(records_of())
    wanted = {
        "tag=odd": lambda r: "odd" in r.tags,
        "task=reverse": lambda r: r.task == "reverse",
        "expert!=add": lambda r: "add" not in r.owners,
        "length<=34": lambda r: r.length <= 34,
        "tag=even, task!=add": lambda r: "even" in r.tags and r.task != "add",
    }[where]
    alone = [record for record in records if wanted(record)]
    sliced = told(records, where=where)
    assert sliced.where == where
    assert sliced.regimes == table(run_of(alone), alone, resamples=100).regimes | {
        regime: section for regime, section in sliced.regimes.items() if not section.rows
    }


def test_slices_beside_the_whole_are_slices_on_their_own() -> None:
    records = list(records_of())
    made = told(records, by="task", where=["tag=even"])
    assert list(made.slices) == ["task=add", "task=reverse", "task=vowels"]
    for name, part in made.slices.items():
        assert part.regimes == told(records, where=["tag=even", name]).regimes
        assert part.where == f"tag=even, {name}"
    assert made.regimes == told(records, where="tag=even").regimes
    assert "task=vowels" in markdown(made)


def test_a_regime_may_be_all_that_is_wanted() -> None:
    made = told(list(records_of()), where="regime=ood", by="tag")
    assert list(made.regimes) == ["ood"]
    assert {tuple(part.regimes) for part in made.slices.values()} == {("ood",)}


def test_an_empty_slice_says_what_there_is() -> None:
    with pytest.raises(BadSlice, match=r"slice tag=strange.*tags: a, even, odd, r, v; tasks: add, reverse"):
        told(list(records_of()), where="tag=strange")


def test_what_is_missing_is_counted_and_shown(make_run: Callable[..., Path]) -> None:
    folder = make_run(missing=["2 answers of fusion: connection refused"])
    records = list(read_records(folder))
    broken = []
    for n, record in enumerate(r for r in records if (r.router, r.regime) == ("fusion", "ood")):
        if n == 3:
            broken.append(record.model_copy(update={"score": None, "error": "connection refused"}))
        elif n != 5:
            broken.append(record)
    whole = [r for r in records if (r.router, r.regime) != ("fusion", "ood")]
    made = table(read_run(folder), whole + broken, resamples=100)
    row = made.regimes["ood"].row("fusion")
    assert row is not None
    assert row.counts == {"expected": 18, "answered": 16, "missing": 2, "errors": 1}
    assert row.difference is not None
    assert row.difference.prompts == 16
    assert made.json()["complete"] is False
    assert markdown(made).startswith("**INCOMPLETE: 2 answers of fusion: connection refused**")
    assert "| fusion | 2 of 18 |" in markdown(made)
    assert {line["complete"] for line in csv.DictReader(io.StringIO(csv_text(made)))} == {"False"}


def test_a_run_that_says_it_is_complete_and_is_not_does_not_look_so() -> None:
    records = list(records_of())
    made = table(run_of(records), [r for r in records if r.example != "add/3" or r.router != "base"], resamples=100)
    assert made.complete
    assert markdown(made).startswith("**INCOMPLETE: records of base**")


def test_examples_that_no_record_is_about_are_missing_everywhere() -> None:
    records = list(records_of())
    made = table(run_of(records), [r for r in records if r.example != "add/3"], resamples=100)
    assert {row.counts["missing"] for section in made.regimes.values() for row in section.rows} == {1}


def test_a_run_without_records_has_an_empty_table() -> None:
    run = Run(suite="s", digest="d", missing=("everything",))
    made = table(run, [])
    assert [section.rows for section in made.regimes.values()] == [(), (), ()]
    assert markdown(made) == "**INCOMPLETE: everything**\n"
    assert json.loads(json.dumps(made.json(), allow_nan=False))["complete"] is False


def test_the_same_run_gives_the_same_bytes(make_run: Callable[..., Path]) -> None:
    folder = make_run(tasks=MANY)
    made = [table(read_run(folder), read_records(folder), by="tag") for _ in range(2)]
    columns = columns_of(read_records(folder))
    made.append(table(read_run(folder), columns, by="tag"))
    for write in (lambda t: json.dumps(t.json(), allow_nan=False), markdown, csv_text):
        assert len({write(each) for each in made}) == 1
    assert table(read_run(folder), columns, seed=1).json() != made[0].json()


def test_json_has_every_figure_of_every_row() -> None:
    document = told(list(records_of()), by="task").json()
    rows = document["regimes"]["ood"]["rows"]
    assert all(list(row["figures"]) == list(FIGURES) for row in rows)
    assert rows[0]["figures"]["top1"] is None
    assert set(rows[-1]["difference"]) == {"estimate", "p", "q", "prompts", "mark"}
    assert list(document["slices"]) == ["task=add", "task=reverse", "task=vowels", "task=strange"]


def test_csv_has_a_line_to_a_router_and_slice() -> None:
    made = told(list(records_of()), by="task", where="task!=strange")
    lines = list(csv.DictReader(io.StringIO(csv_text(made))))
    assert len(lines) == 4 * 3 * 9
    for line in lines:
        part = made if line["where"] == "task!=strange" else made.slices[line["where"].removeprefix("task!=strange, ")]
        row = part.regimes[line["regime"]].row(line["router"])  # type: ignore[index]
        assert row is not None
        assert float(line["score_low"]) == row.figures["score"].low
        assert (line["top1"] == "") == ("top1" not in row.figures)
        assert float(line["task:add"] or "nan") == pytest.approx(row.tasks.get("add", np.nan), nan_ok=True)


def test_markdown_shows_the_columns_that_are_wanted() -> None:
    made = told(list(records_of()), where="regime=ood")
    lines = markdown(made, columns=("router", "score", "top1", "p95_ms")).splitlines()
    assert lines[0] == "### ood (regime=ood)"
    assert lines[2:4] == ["| router | score | p95 ms |", "| --- | --- | --- |"]  # ood says nothing about top-1
    assert {line.count("|") for line in lines if line.startswith("|")} == {4}
    assert list(COLUMNS)[:5] == ["router", "missing", "score", "normalised", "difference"]


def test_names_do_not_break_a_table() -> None:
    made = told(list(records_of(["a|b"])), where="regime=ood")
    assert "| a\\|b |" in markdown(made)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1, "1"), (999.4, "999"), (999.9, "1 k"), (2.2e9, "2.2 G"), (-1.5e6, "-1.5 M")]
)
def test_large_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_a_section_finds_its_rows() -> None:
    section = Section("ood", (Row(RouterInfo(name="a")),))
    assert section.row("a") is section.rows[0]
    assert section.row("b") is None
