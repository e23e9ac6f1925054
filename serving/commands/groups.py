"""`moerge groups`: experts whose composites a running server keeps loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from serving.commands.common import DEFAULT_URL, ApiKey, AsJson, Url, answer, client, out, print_json

app = typer.Typer(help="Group experts whose composites are loaded beforehand.", no_args_is_help=True)


@app.command()
def build(
    by: Annotated[str | None, typer.Option(help="Compare experts by their weights, or by prototypes.")] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="A gate to load the groups' composites for; may be repeated.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Group the experts of a running server anew, and load the groups' composites."""
    wanted = {key: value for key, value in (("by", by), ("gates", gate or None)) if value is not None}
    with client(url, api_key) as http:
        show_all(answer(http.post("/v1/groups/build", json=wanted)), as_json)


@app.command()
def show(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show the groups of a running server."""
    with client(url, api_key) as http:
        show_all(answer(http.get("/v1/groups")), as_json)


def show_all(body: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(body)
    elif not body["data"]:
        out.print("There are no groups. `moerge groups build` makes them.", markup=False)
    else:
        table = Table("experts", "rank", "loaded for", caption=f"by {body['by']}")
        for each in body["data"]:
            table.add_row(", ".join(each["experts"]), str(each["rank"]), ", ".join(each["gates"]) or "nothing")
        out.print(table)
