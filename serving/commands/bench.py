"""`moerge bench`: what routing and gates cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from serving.commands.common import AsJson, err, fail, out, print_json

app = typer.Typer(help="Measure what this machine does.", no_args_is_help=True)

BLENDED = {
    "cold": "merged by cat, built and loaded for the request",
    "warm": "the same blend again",
    "composite": "in a resident composite, weights in the request",
}


@app.callback()
def bench() -> None:
    """Measure what this machine does."""


@app.command("serve")
def bench_serve(
    manifest: Annotated[
        Path | None, typer.Option(help="What to serve; a random model of 100 M parameters when not given.")
    ] = None,
    requests: Annotated[int, typer.Option(min=8, help="Requests of each kind at each concurrency.")] = 96,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    concurrency: Annotated[list[int] | None, typer.Option(help="May be repeated; 1, 8 and 32 when not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a manifest and measure `auto` against the same engine with the expert named by the client.

    Both kinds take turns in one run, with prompts that the server has not seen. Also: time to a decision, what a
    blend of two experts adds to a request (at its first use, and later), time from registering an expert to its first
    routed answer, and start-up time.
    """
    from serving.bench import BenchFailed, bench_served

    try:
        result = bench_served(manifest, requests, tokens, concurrency or [1, 8, 32], err.print)
    except BenchFailed as error:
        fail(str(error))
    if as_json:
        print_json(result)
        return
    table = Table("concurrent", "named tok/s", "auto tok/s", "ratio", "named p50/p95 ms", "auto p50/p95 ms")
    for row in result["throughput"]:
        named, auto = row["named"], row["auto"]
        table.add_row(
            str(row["concurrency"]),
            f"{named['tokens_per_s']:.0f}",
            f"{auto['tokens_per_s']:.0f}",
            f"{row['ratio']:.3f}",
            f"{named['p50_ms']:.0f} / {named['p95_ms']:.0f}",
            f"{auto['p50_ms']:.0f} / {auto['p95_ms']:.0f}",
        )
    out.print(table)
    route = result["route_ms"]
    out.print(f"time to a decision, one at a time: p50 {route['p50']:.1f} ms, p95 {route['p95']:.1f} ms")
    if blend := result["blend"]:
        out.print(f"one token from one expert: p50 {blend['single_ms']['p50']:.1f} ms; from two,")
        for kind, what in BLENDED.items():
            took, added = blend[f"{kind}_ms"], blend["added_ms"][kind]
            out.print(f"  {what}: p50 {took['p50']:.1f} ms ({added:+.1f}), p95 {took['p95']:.1f} ms")
    out.print(f"POST /v1/experts to the first routed answer: {result['register_to_answer_s']:.2f} s")
    out.print(f"start-up: {result['startup_s']:.0f} s, with the manifest's experts registered")


@app.command("gated")
def bench_gated(
    batch: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated; 1, 8 and 32 when not given.")] = None,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of each answer.")] = 32,
    prefill: Annotated[int, typer.Option(min=0, help="Tokens of the long prompt; 0: none.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything takes its turn.")] = 4,
    gate: Annotated[list[str] | None, typer.Option(help="May be repeated; all that it knows when not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """What token-level gates cost: one adapter, a stack of four without a gate, every gate, stock vLLM and PEFT.

    All take turns in one run on a random model of 100 M parameters, with one thread each. `ratios` has the speed of
    one kind over another's, `arrow/stack@8` for instance: the median of the rounds' pairs. About ten minutes.
    """
    from serving import bench_gated as gated
    from serving.bench import BenchFailed

    gates = gate or list(gated.GATES)
    if unknown := [each for each in gates if each not in gated.GATES]:
        fail(f"No gate to measure: {', '.join(unknown)}. There are: {', '.join(gated.GATES)}.")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=err, transient=True) as progress:
            task = progress.add_task("", total=None)

            def tell(what: str, done: int, total: int) -> None:
                progress.update(task, description=what, completed=done, total=total or None)

            result = gated.bench_gated(sorted(batch or [1, 8, 32]), tokens, prefill, rounds, gates, tell)
    except BenchFailed as error:
        fail(str(error))
    if as_json:
        print_json(result)
    else:
        out.print(speeds(result))


def speeds(result: dict[str, Any]) -> Table:
    """Tokens/s of every kind at every piece of work, and how that compares with the stack without a gate."""
    table = Table("", *result["tokens_per_s"], caption="tokens/s (speed over the stack without a gate)")
    kinds = next(iter(result["tokens_per_s"].values()))
    for kind in kinds:
        cells = []
        for work, speed in result["tokens_per_s"].items():
            ratio = result["ratios"].get(f"{kind}/stack@{work}")
            cells.append(f"{speed[kind]:.4g}" + (f" ({ratio:.2f})" if ratio else ""))
        table.add_row(kind, *cells)
    return table


@app.command("kernel")
def bench_kernel(as_json: AsJson = False) -> None:
    """The GPU kernel of the gates against vLLM's own shrink and expand, at the shapes of a 7B model.

    Needs a GPU; without one it says so and measures nothing.
    """
    from serving.bench_kernel import Unavailable, bench_kernel

    try:
        rows = bench_kernel()
    except Unavailable as error:
        out.print(f"Nothing measured: {error}")
        return
    if as_json:
        print_json(rows)
        return
    table = Table("module", "tokens", "shrink + expand us", "gate us", "share")
    for row in rows:
        lora, gate = row["lora_us"], row["gate_us"]
        table.add_row(row["module"], str(row["tokens"]), f"{lora:.1f}", f"{gate:.1f}", f"{gate / lora:.2f}")
    out.print(table)


@app.command("blend")
def bench_blend_command(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model that low-rank operators merge.")] = 32,
    dense_layers: Annotated[
        int, typer.Option(min=0, help="Layers that operators on dense matrices merge; 0: one module.")
    ] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each low-rank operator; the median counts.")] = 3,
    peft: Annotated[bool, typer.Option(help="Also measure PEFT.")] = True,
    as_json: AsJson = False,
) -> None:
    """Merge four random adapters at the shapes of a 7B model with every operator, and with PEFT's own.

    No figure is scaled up: operators that form dense matrices, and PEFT's, are measured on fewer modules, and the
    output says on how many. A few minutes on two idle cores, most of them for PEFT.
    """
    from serving.bench_blend import Shape, bench_blend

    result = bench_blend(Shape(layers=layers), dense_layers, rounds, peft, err.print)
    if as_json:
        print_json(result)
        return
    table = Table(
        "operator",
        "modules",
        "s",
        "cpu s",
        "one module s",
        "cpu s",
        "PEFT: modules",
        "d",
        "ours s",
        "PEFT s",
        "ours / PEFT",
    )
    for name, seconds in result["seconds"].items():
        row = [name, str(result["measured"][name]), f"{seconds:.2f}", f"{result['cpu_seconds'][name]:.2f}"]
        row += [f"{result[figures][name]:.2f}" for figures in ("module_seconds", "module_cpu_seconds")]
        if both := result["compared"].get(name):
            ratio = result["ratios"][f"{name}/peft"]
            row += [str(both["modules"]), str(both["d"]), f"{both['ours']:.2f}", f"{both['peft']:.2f}", f"{ratio:.3f}"]
        table.add_row(*row)
    out.print(table)
    out.print(f"of {result['modules']} modules; nothing is scaled up")
