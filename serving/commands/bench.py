"""`moerge bench`: what routing costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from serving.commands.common import AsJson, err, fail, out, print_json

app = typer.Typer(help="Measure what this machine does.", no_args_is_help=True)


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

    Both kinds take turns in one run, with prompts that the server has not seen. Also: time to a decision, time
    from registering an expert to its first routed answer, and start-up time.
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
    out.print(f"POST /v1/experts to the first routed answer: {result['register_to_answer_s']:.2f} s")
    out.print(f"start-up: {result['startup_s']:.0f} s, with the manifest's experts registered")
