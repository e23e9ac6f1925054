"""`moerge eval table`, `compare` and `gate`: what runs say, one by one and against each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table as Drawn

from eval.terminal import FAILED, INCOMPLETE, fail, out, progress_bar, say

if TYPE_CHECKING:
    from eval.asking import Tell
    from eval.comparing import Comparison, Pair, Side, Verdict
    from eval.table import Table

# As in eval.slices and eval.sections, which take seconds to import.
By = Literal["tag", "task", "expert", "length"]
Metric = Literal[
    "score",
    "normalised",
    "regret",
    "top1",
    "top3",
    "false_accepts",
    "p50_ms",
    "p95_ms",
    "tokens_per_s",
    "loads",
    "flops",
]  # abstaining is neither good nor bad

WHERE = Annotated[
    list[str] | None,
    typer.Option(help="Only these prompts: tag=X, task=X, expert=X, length<200, regime=ood, also !=; repeatable."),
]
ROUTER = Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")]
REGIME = Annotated[list[str] | None, typer.Option(help="Only in-distribution, semi-ood or ood; repeatable.")]
RESAMPLES = Annotated[int, typer.Option(min=100, help="Of the bootstrap.")]
SEED = Annotated[int, typer.Option(min=0, help="Of the bootstrap.")]
JSON = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def table(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `moerge eval run --out` made.")],
    where: WHERE = None,
    by: Annotated[By | None, typer.Option(help="Also a table for each.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="What routers are compared with; the suite says, if not given.")
    ] = None,
    resamples: RESAMPLES = 1000,
    seed: SEED = 0,
    as_json: JSON = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print every figure as CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
) -> None:
    """Show a run's table: every router in every regime, with intervals, of all prompts or a slice of them."""
    from eval.columns import columns_of
    from eval.records import read_records, read_run
    from eval.table import table as tabulate
    from eval.table_text import csv_text, incomplete, markdown

    with told() as tell:
        run = read_run(folder)
        columns = columns_of(read_records(folder), tell, run.expected)
        made = tabulate(run, columns, where=where, by=by, baseline=baseline, resamples=resamples, seed=seed)
    if as_json:
        typer.echo(json.dumps(made.json(), indent=1, ensure_ascii=False))
    elif as_csv or as_markdown:
        typer.echo(csv_text(made) if as_csv else markdown(made), nl=False)
    else:
        show(made)
    if warning := incomplete(made):
        say(warning)
        raise typer.Exit(INCOMPLETE)


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A run's folder, or FOLDER:ROUTER.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, or another router of the same.")],
    router: ROUTER = None,
    regime: REGIME = None,
    where: WHERE = None,
    resamples: RESAMPLES = 1000,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Compare two runs, or two routers, on the prompts that both answered: what B has more or less than A."""
    from eval.comparing import compare as paired
    from eval.comparing import sides

    with told() as tell:
        a, b = sides(first, second, tell=tell)
        found = paired(a, b, routers=router or (), regimes=regime or (), where=where, resamples=resamples, seed=seed)
    if as_json:
        typer.echo(json.dumps(found.json(), indent=1, ensure_ascii=False))
    else:
        differences(found)
    if not found.complete:
        say("INCOMPLETE: what is compared is not all of both runs.")
        raise typer.Exit(INCOMPLETE)


def gate(
    baseline: Annotated[str, typer.Option(help="The run that is known to be good: a folder, or FOLDER:ROUTER.")],
    candidate: Annotated[str, typer.Option(help="The run that must not be worse: the same.")],
    max_regression: Annotated[float, typer.Option(min=0, help="What may be lost, in the unit of the metric.")] = 0.01,
    router: Annotated[
        list[str] | None, typer.Option(help="Only this one; repeatable. All routers but references if not given.")
    ] = None,
    regime: REGIME = None,
    metric: Annotated[Metric, typer.Option(help="What is watched.")] = "score",
    where: WHERE = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail also where the interval does not rule out such a loss.")
    ] = False,
    resamples: RESAMPLES = 1000,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Fail (exit 1) when a router of the candidate is worse than in the baseline; exit 3 when a run is incomplete."""
    from eval.comparing import compare as paired
    from eval.comparing import gate as judged
    from eval.comparing import sides
    from eval.sections import CannotCompare

    with told() as tell:
        a, b = sides(baseline, candidate, tell=tell)
        found = paired(
            a, b, routers=_watched(a, b, router), regimes=regime or (), where=where, resamples=resamples, seed=seed
        )
        verdicts = judged(found.pairs, metric, max_regression, strict=strict)
        if not verdicts:
            raise CannotCompare(f"No router has '{metric}' in both; see `moerge eval compare`.")
    passed = all(each.passed for each in verdicts)
    if as_json:
        typer.echo(json.dumps(_judged(found, verdicts, metric, max_regression, strict), indent=1))
    else:
        _show_verdicts(found, verdicts, metric, max_regression)
    if not found.whole:
        raise typer.Exit(INCOMPLETE)
    if not passed:
        raise typer.Exit(FAILED)


def _watched(a: Side, b: Side, given: Sequence[str] | None) -> list[str]:
    from eval.records import REFERENCES
    from eval.sections import CannotCompare

    if a.router or b.router or given:
        return list(given or ())
    routers = [name for name in a.routers if name not in REFERENCES]
    if not routers:
        raise CannotCompare(f"{a.name} has only references; name what to watch with --router.")
    return routers


def _judged(found: Comparison, verdicts: Sequence[Verdict], metric: str, most: float, strict: bool) -> dict[str, Any]:
    return {
        "passed": found.whole and all(each.passed for each in verdicts),
        "complete": found.whole,
        "metric": metric,
        "max_regression": most,
        "strict": strict,
        "verdicts": [
            {
                "regime": each.pair.regime,
                "router": each.pair.name,
                "passed": each.passed,
                "reason": each.reason,
                "gain": each.gain.json(),
            }
            for each in verdicts
        ],
        "not_judged": _not_judged(found, metric),
        "comparison": found.json(),
    }


def _not_judged(found: Comparison, metric: str) -> list[str]:
    return [f"{pair.regime}, {pair.name}" for pair in found.pairs if metric not in pair.figures]


def show(made: Table) -> None:
    """Each regime's rows, the columns beneath each other where they do not fit beside each other."""
    from eval.table_text import cells, incomplete, notes

    if warning := incomplete(made):
        out.print(warning, style="bold red", markup=False, highlight=False)
    for regime, section in made.regimes.items():
        if section.rows:
            titles, rows = cells(section)
            _draw(f"{made.suite}: {regime}" + (f" ({made.where})" if made.where else ""), titles, rows)
            for line in notes(made, section):
                out.print(line, style="dim", markup=False, highlight=False)
    for each in made.slices.values():
        show(each)


def differences(found: Comparison) -> None:
    """What B has more than A, one table to a regime."""
    from eval.table_text import COLUMNS

    for regime in dict.fromkeys(pair.regime for pair in found.pairs):
        pairs = [pair for pair in found.pairs if pair.regime == regime]
        texts = [_compared(pair) for pair in pairs]
        names = [name for name in texts[0] if any(text[name] for text in texts)]
        titles = [COLUMNS[name][0] if name in COLUMNS else name for name in names]
        where = f" ({found.where})" if found.where else ""
        _draw(f"{regime}: A {found.first}, B {found.second}{where}", titles, [[t[n] for n in names] for t in texts])
    legend = "A, B: score; the rest: B - A. [low, high]: 95%, paired; ▲ better, ▼ worse (sign flips, corrected)."
    out.print(legend, style="dim", markup=False, highlight=False)
    for note in found.notes:
        say(note)


def _compared(pair: Pair) -> dict[str, str]:
    from eval.sections import FIGURES
    from eval.table_text import MARKS, estimate, short

    texts = {"router": pair.name, "prompts": str(pair.prompts), "A": "", "B": "", "score": ""}
    if score := pair.figures.get("score"):
        texts |= {"A": f"{score.first:.3f}", "B": f"{score.second:.3f}"}
        texts["score"] = estimate(score.difference, sign="+") + MARKS[pair.mark]
    for name in FIGURES:
        if name == "score":
            continue
        change = pair.figures.get(name)
        value = change.difference.value if change else 0.0
        if name in ("flops", "loads"):
            texts[name] = f"{'+' if value > 0 else ''}{short(value)}" if change else ""
        else:
            digits = 0 if name.endswith("_ms") else 1 if name == "tokens_per_s" else 3
            texts[name] = f"{value:+.{digits}f}" if change else ""
    return texts


def _show_verdicts(found: Comparison, verdicts: Sequence[Verdict], metric: str, most: float) -> None:
    from eval.table_text import estimate

    rows = [
        [
            each.pair.regime,
            each.pair.name,
            str(each.pair.prompts),
            f"{each.pair.figures[metric].first:.3f}",
            f"{each.pair.figures[metric].second:.3f}",
            estimate(each.gain, sign="+"),
            each.reason or "ok",
        ]
        for each in verdicts
    ]
    titles = ["regime", "router", "prompts", "baseline", "candidate", "gain", "verdict"]
    _draw(f"{metric}: at most {most:g} may be lost", titles, rows)
    for note in found.notes:
        say(note)
    if left := _not_judged(found, metric):
        say(f"Not judged, for '{metric}' says nothing about them in both: {'; '.join(left)}.")
    for what in found.lacking:
        say(f"The candidate lacks {what}.", "red")
    failed = sum(not each.passed for each in verdicts)
    if not found.whole:
        say("INCOMPLETE: this gate does not pass.", "bold red")
    say(f"{failed} of {len(verdicts)} fail." if failed else f"All {len(verdicts)} pass.", "red" if failed else "green")


def _draw(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table, or several with the same first column, as wide as the terminal is."""
    widths = [max(len(text) for text in column) + 3 for column in zip(titles, *rows, strict=True)]
    groups: list[list[int]] = [[]]
    for column in range(1, len(titles)):
        if groups[-1] and widths[0] + sum(widths[each] for each in [*groups[-1], column]) + 1 > out.width:
            groups.append([])
        groups[-1].append(column)
    for number, group in enumerate(groups):
        drawn = Drawn(title=title if not number else None, title_justify="left")
        drawn.add_column(titles[0], no_wrap=True)
        for column in group:
            drawn.add_column(titles[column], justify="right", no_wrap=True)
        for row in rows:
            drawn.add_row(*(row[column] for column in [0, *group]))
        out.print(drawn)


@contextmanager
def told() -> Iterator[Tell]:
    """A bar while records are read; what the user got wrong ends the command in one line."""
    from eval.records import NotARun
    from eval.sections import CannotCompare
    from eval.slices import BadSlice

    try:
        with progress_bar() as tell:
            yield tell
    except (NotARun, BadSlice, CannotCompare) as error:
        fail(str(error))
