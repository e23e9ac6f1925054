from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner, Result

from eval.cli import app
from eval.compare_cli import Metric
from eval.records import read_records, read_run, write_run
from eval.sections import FIGURES
from tests.eval.runs import made, records_of, run_of

Command = Callable[..., Result]
MakeRun = Callable[..., Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr("eval.compare_cli.out._width", 300)
    return lambda *args: CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)


@pytest.fixture
def table(run: Command) -> Command:
    return lambda *args: run("table", "--resamples", 100, *args)


@pytest.fixture
def compare(run: Command) -> Command:
    return lambda *args: run("compare", "--resamples", 100, *args)


@pytest.fixture
def gate(run: Command) -> Command:
    return lambda a, b, *args: run("gate", "--resamples", 100, "--baseline", a, "--candidate", b, *args)


def test_a_table_shows_every_regime_and_router(table: Command, make_run: MakeRun) -> None:
    result = table(make_run())
    assert result.exit_code == 0, result.output
    for text in ("in-distribution", "semi-ood", "ood", "fusion", "retrieval", "best-per-query", "top-1", "FLOPs/token"):
        assert text in result.stdout
    assert "22 prompts, 3 tasks; [low, high]: 95%, of other prompts of these tasks." in result.stdout


def test_a_narrow_terminal_has_the_columns_beneath_each_other(
    table: Command, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run()
    wide = table(folder, "--where", "regime=ood").stdout
    monkeypatch.setattr("eval.compare_cli.out._width", 60)
    narrow = table(folder, "--where", "regime=ood").stdout
    assert wide.count("best-per-query") == 1
    assert narrow.count("best-per-query") > 2
    assert all(column in narrow for column in ("score", "Kemeny", "p95 ms", "FLOPs/token"))
    assert "…" not in narrow


@pytest.mark.parametrize("form", ["--json", "--csv", "--markdown"])
def test_programs_get_it_whole(table: Command, make_run: MakeRun, form: str) -> None:
    result = table(make_run(), form, "--where", "tag=odd", "--by", "task")
    assert result.exit_code == 0
    if form == "--json":
        assert list(json.loads(result.stdout)["slices"]) == ["task=add", "task=reverse", "task=vowels"]
    else:
        assert "tag=odd, task=add" in result.stdout


def test_an_incomplete_run_shows_it_and_is_no_success(table: Command, compare: Command, make_run: MakeRun) -> None:
    folder = make_run(missing=["5 answers of fusion: timed out"])
    for options in ((), ("--csv",), ("--json",)):
        result = table(folder, *options)
        assert result.exit_code == 3
        assert "INCOMPLETE: 5 answers of fusion: timed out" in result.stderr
    assert "INCOMPLETE" in table(folder).stdout
    result = compare(folder, make_run("b"))
    assert result.exit_code == 3
    assert "run is incomplete: 5 answers of fusion: timed out." in result.stderr


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["table", "{a}/none"], "holds no run.json"),
        (["table", "{a}", "--where", "colour=red"], "'colour=red': no slice"),
        (["table", "{a}", "--where", "task=none"], "tasks: add, reverse, strange, vowels"),
        (["table", "{a}", "--baseline", "knn"], "No router 'knn' to compare with. There are: base,"),
        (["compare", "{a}", "{a}:none"], "no such router in the run"),
        (["compare", "{a}", "{a}", "--regime", "odd"], "No regime odd"),
        (["gate", "--baseline", "{a}", "--candidate", "{a}", "--router", "none"], "has no router none"),
        (["gate", "--baseline", "{a}", "--candidate", "{a}", "--metric", "top1", "--regime", "ood"], "'top1' in both"),
    ],
)
def test_bad_input_ends_with_a_line_and_2(run: Command, make_run: MakeRun, args: list[str], why: str) -> None:
    folder = make_run("a")
    result = run(*(word.format(a=folder) for word in args))
    assert result.exit_code == 2
    assert why in result.stderr
    assert result.stdout == ""


def test_a_broken_line_is_named(table: Command, make_run: MakeRun) -> None:
    folder = make_run()
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"router": 3\n')
    result = table(folder)
    assert result.exit_code == 2
    assert "samples.jsonl:" in result.stderr


def test_a_comparison_shows_both_and_the_difference(compare: Command, make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b", skill={"fusion": 0.0}, routers=["fusion", "knn"])
    result = compare(a, b)
    assert result.exit_code == 0
    assert "▼" in result.stdout
    assert "Routers that only" in result.stderr
    document = json.loads(compare(a, b, "--json", "--router", "fusion").stdout)
    assert [pair["regime"] for pair in document["pairs"]] == ["in-distribution", "semi-ood", "ood"]
    assert {pair["mark"] for pair in document["pairs"]} == {"worse"}


def test_two_routers_of_a_run(compare: Command, make_run: MakeRun) -> None:
    folder = make_run()
    result = compare(f"{folder}:fusion", f"{folder}:retrieval")
    assert result.exit_code == 0
    assert "fusion > retrieval" in result.stdout


def test_a_gate_passes_what_is_no_worse(gate: Command, make_run: MakeRun) -> None:
    folder = make_run("a", skill={"fusion": 0.2})
    assert gate(folder, folder).exit_code == 0
    result = gate(folder, make_run("b", skill={"fusion": 1.0}))
    assert result.exit_code == 0, result.output
    assert "All 6 pass." in result.stderr


def test_a_gate_fails_what_is_worse(gate: Command, make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b", skill={"fusion": 0.1})
    result = gate(a, b)
    assert result.exit_code == 1
    assert "3 of 6 fail." in result.stderr
    assert "worse by" in result.stdout
    assert gate(a, b, "--router", "retrieval").exit_code == 0
    assert gate(a, b, "--max-regression", 0.9).exit_code == 0
    document = json.loads(gate(a, b, "--json", "--regime", "ood").stdout)
    assert document["passed"] is False
    assert [(each["router"], each["passed"]) for each in document["verdicts"]] == [
        ("retrieval", True),
        ("fusion", False),
    ]


def test_routers_without_the_figure_are_named(gate: Command, make_run: MakeRun) -> None:
    folder = make_run()
    result = gate(folder, folder, "--metric", "top1")
    assert result.exit_code == 0
    assert "Not judged, for 'top1' says nothing about them in both: semi-ood, retrieval; semi-ood" in result.stderr


def test_references_are_watched_only_when_they_are_named(gate: Command, make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b", skill={"oracle": 0.1})
    assert gate(a, b).exit_code == 0
    assert gate(a, b, "--router", "oracle").exit_code == 1


def test_a_strict_gate_wants_to_be_shown(gate: Command, tmp_path: Path) -> None:
    records = list(records_of(tasks=("add",), regimes=("ood",), examples=40, strange=0))
    rows = [n for n, record in enumerate(records) if record.router == "fusion"]
    right = [n for n in rows if records[n].score]
    wrong = [n for n in rows if not records[n].score]
    swapped = list(records)
    for n, score in ((right[0], 0.0), (wrong[0], 1.0)):  # one lost, one won
        swapped[n] = records[n].model_copy(update={"score": score})
    a, b = made(tmp_path / "a", records), made(tmp_path / "b", swapped)
    assert gate(a, b, "--router", "fusion").exit_code == 0
    result = gate(a, b, "--router", "fusion", "--strict")
    assert result.exit_code == 1
    assert "may be worse by" in result.stdout


def test_an_incomplete_run_never_passes_a_gate(gate: Command, make_run: MakeRun) -> None:
    whole, broken = make_run("a"), make_run("b", missing=["an answer of base"])
    for first, second in ((whole, broken), (broken, whole)):
        result = gate(first, second)
        assert result.exit_code == 3
        assert "INCOMPLETE: this gate does not pass." in result.stderr
    assert json.loads(gate(whole, broken, "--json").stdout)["passed"] is False


def test_what_a_candidate_left_out_cannot_pass(gate: Command, make_run: MakeRun) -> None:
    whole = make_run("a")
    for name, options in {"b": {"routers": ["fusion"]}, "c": {"examples": 5}, "d": {"regimes": ["ood"]}}.items():
        result = gate(whole, make_run(name, **options))
        assert result.exit_code == 3, result.output
        assert "The candidate lacks" in result.stderr
    assert gate(whole, make_run("e", routers=["fusion"]), "--router", "fusion").exit_code == 0
    assert gate(whole, make_run("f", regimes=["ood"]), "--regime", "ood").exit_code == 0


def test_a_run_that_lost_samples_does_not_pass_though_it_says_it_is_complete(gate: Command, make_run: MakeRun) -> None:
    whole, lost = make_run("a"), make_run("b")
    records = [r for r in read_records(lost) if (r.router, r.regime, r.example) != ("fusion", "ood", "add/1")]
    write_run(lost, read_run(lost), records)
    result = gate(whole, lost)
    assert result.exit_code == 3
    assert "ood, fusion: 1 prompts that only one of both has answered" in result.stderr


def test_two_routers_pass_a_gate(gate: Command, make_run: MakeRun) -> None:
    folder = make_run(skill={"fusion": 0.99, "retrieval": 0.2})
    assert gate(f"{folder}:retrieval", f"{folder}:fusion").exit_code == 0
    assert gate(f"{folder}:fusion", f"{folder}:retrieval").exit_code == 1


def test_a_run_of_references_has_no_routers_to_watch(gate: Command, tmp_path: Path) -> None:
    records = list(records_of([]))
    folder = made(tmp_path / "run", records, run_of(records))
    result = gate(folder, folder)
    assert result.exit_code == 2
    assert "only references" in result.stderr


def test_every_figure_but_abstaining_can_be_watched() -> None:
    assert set(get_args(Metric)) == set(FIGURES) - {"abstained"}


def test_tables_do_not_wait_for_pytorch() -> None:
    code = "import sys, eval.table, eval.table_text, eval.comparing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
