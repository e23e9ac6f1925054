"""The command line: `moerge`. Commands of other packages join through the entry points `moerge.commands`."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from serving.commands import ask, bench, blend_search, blends, doctor, experts, gates, groups, keys, router, serve

app = typer.Typer(
    name="moerge",
    help="A MoErging inference router: many LoRA experts behind one OpenAI-compatible API.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version(value: bool) -> None:
    if value:
        typer.echo(f"moerge {metadata.version('moerge')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options that all commands share."""


app.command("serve")(serve.serve)
app.command("route")(ask.route)
app.command("chat")(ask.chat)
app.command("doctor")(doctor.doctor)
app.add_typer(experts.app, name="expert")
blends.app.command("search")(blend_search.search)
app.add_typer(blends.app, name="blend")
app.add_typer(keys.app, name="keys")
app.add_typer(gates.app, name="gates")
app.add_typer(groups.app, name="groups")
app.add_typer(router.app, name="router")
app.add_typer(bench.app, name="bench")
for entry in sorted(metadata.entry_points(group="moerge.commands"), key=lambda entry: entry.name):
    try:
        app.add_typer(entry.load(), name=entry.name)
    except ImportError as error:  # somebody's broken extension must not take the command line down
        typer.echo(f"moerge {entry.name} is not available: {error}", err=True)


if __name__ == "__main__":
    sys.exit(app())
