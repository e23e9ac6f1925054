"""`moerge route` and `moerge chat`: ask a running server."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from serving.commands.common import DEFAULT_URL, ApiKey, AsJson, Url, answer, client, err, fail, out, print_json

Model = Annotated[str, typer.Option("--model", "-m", help="auto, auto:<method>, an expert, a blend, the base model.")]


def route(
    prompt: Annotated[str, typer.Argument(help="What a user would ask.")],
    model: Model = "auto",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Read the prompt once; show how a gate weighs it.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Explain which expert would answer, without generating."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    with client(url, api_key) as http:
        body = answer(http.post("/v1/route", json={"model": model, "messages": messages, "trace": trace}))
    if as_json:
        print_json(body)
        return
    decision = body["decision"]
    chosen = ", ".join(f"{each['expert']} ({each['weight']:.2f})" for each in decision["experts"])
    kind = f"{decision['kind']} by {decision['operator']}" if decision["operator"] else decision["kind"]
    out.print(f"{kind}: {chosen or 'the base model'}", style="bold", markup=False)
    if decision["reason"]:
        out.print(decision["reason"], markup=False)
    timings = ", ".join(f"{name} {value:.1f} ms" for name, value in decision["timings"].items())
    out.print(f"confidence {decision['confidence']:.2f}; {timings}")
    table = Table("candidate", "score")
    for each in decision["candidates"][:10]:
        table.add_row(f"{each['expert']} v{each['version']}", f"{each['score']:.3f}")
    if decision["threshold"] is not None:
        table.caption = f"threshold {decision['threshold']:.3f}"
    out.print(table)
    if body["trace"]:
        show_trace(body["trace"])


def show_trace(trace: dict[str, Any]) -> None:
    """Mean weights over all layers, and on how many tokens each expert had the largest weight."""
    rows = trace["weights"]
    table = Table("expert", "mean weight", "tokens", "evidence", caption=f"{trace['gate']}, {trace['tokens']} tokens")
    for k, name in enumerate(trace["experts"]):
        mean = sum(row[k] for row in rows) / max(len(rows), 1)
        table.add_row(name, f"{mean:.3f}", str(trace["top"].count(k)), f"{trace['evidence'][k]:.1f}")
    out.print(table)


def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    model: Model = "auto",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Ask, and see who answered. Ctrl-D ends a conversation."""
    import openai

    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    limits = {
        key: value for key, value in (("max_tokens", max_tokens), ("temperature", temperature)) if value is not None
    }
    asker: Any = openai.OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=api_key or "none", max_retries=1)
    try:
        while True:
            question = prompt if prompt is not None else input("> " if sys.stdin.isatty() else "")
            messages.append({"role": "user", "content": question})
            raw = asker.chat.completions.with_raw_response.create(
                model=model,
                messages=messages,
                stream=True,
                **limits,
            )
            said = ""
            for chunk in raw.parse():
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece:
                    said += piece
                    typer.echo(piece, nl=False)
            typer.echo()
            who = raw.headers.get("x-moerge-experts") or "the base model"
            err.print(f"({who}, confidence {raw.headers.get('x-moerge-confidence', '?')})", style="dim", markup=False)
            messages.append({"role": "assistant", "content": said})
            if prompt is not None:
                return
    except (EOFError, KeyboardInterrupt):
        err.print()
    except openai.APIConnectionError:
        fail(f"No server at {url}. Start one with `moerge serve`, or say where it is with --url or MOERGE_URL.")
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        fail(str(body.get("message", error.message)))
