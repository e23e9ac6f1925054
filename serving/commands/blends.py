"""`moerge blend`: store several experts as one model on a running server, and look after such blends."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.table import Table

from serving.commands.common import DEFAULT_URL, ApiKey, AsJson, Url, answer, client, err, fail, out, print_json

app = typer.Typer(help="Merge experts into blends that are served as one model.", no_args_is_help=True)

Reference = Annotated[str, typer.Argument(help="A blend's name, or blend:<digest>.")]


@app.command()
def create(
    name: Annotated[str | None, typer.Argument(help="Its name; without one it is known by its content.")] = None,
    member: Annotated[
        list[str] | None,
        typer.Option("--member", "-m", help="NAME=WEIGHT of an expert or a blend, or NAME for equal weights; repeat."),
    ] = None,
    operator: Annotated[str, typer.Option(help="How they are merged.")] = "cat",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the operator's settings; may be repeated.")
    ] = None,
    description: Annotated[str, typer.Option(help="What it is good at.")] = "",
    private: Annotated[bool, typer.Option("--private", help="For its owner only.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="In place of the blend that has this name.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Merge experts into one model; it is used from the next request on."""
    names, weights = read_members(member or [])
    body: dict[str, Any] = {
        "name": name,
        "members": names,
        "weights": weights,
        "operator": operator,
        "settings": dict(read_setting(each) for each in settings or []),
        "description": description,
        "visibility": "private" if private else "public",
        "replace": replace,
    }
    with client(url, api_key) as http, err.status("Merging"):
        told(answer(http.post("/v1/blends", json=body)), as_json)


@app.command()
def renew(
    name: Annotated[str, typer.Argument(help="The blend's name.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a blend anew, with the same weights, of the active versions of its members."""
    with client(url, api_key) as http, err.status("Merging"):
        old = answer(http.get(f"/v1/blends/{path(name)}"))
        kept = {key: old[key] for key in ("name", "operator", "settings", "description", "visibility", "search")}
        members = {each["expert"]: each["weight"] for each in old["members"]}
        told(answer(http.post("/v1/blends", json={**kept, "members": members, "replace": True})), as_json)


def told(blend: dict[str, Any], as_json: bool) -> None:
    """What was stored, and what whoever stored it should know."""
    if as_json:
        print_json(blend)
        return
    err.print(
        f"{blend['name'] or blend['id']} is stored: {described(blend)}", style="bold", markup=False, soft_wrap=True
    )
    for note in noted(blend):
        err.print(note, style="yellow", markup=False, soft_wrap=True)


def read_members(given: list[str]) -> tuple[list[str], list[float] | None]:
    """Names, and their weights when they have any. Ends the command with a message for what is neither."""
    if not given:
        fail("Name its members: --member maths=0.6 --member chemistry=0.4")
    pairs = [each.partition("=") for each in given]
    names = [name.strip() for name, _, _ in pairs]
    written = [weight for _, sign, weight in pairs if sign]
    if not written:
        return names, None
    if len(written) < len(names):
        fail("Give every member a weight (--member maths=0.6), or none.")
    weights = []
    for each, text in zip(given, written, strict=True):
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            fail(f"--member {each}: '{text}' is no weight; write for example --member {each.partition('=')[0]}=0.5")
        weights.append(weight)
    return names, weights


def read_setting(given: str) -> tuple[str, Any]:
    """`density=0.3`, `mean=count`, `layers={"maths": "0-3"}`: JSON where it is JSON, otherwise text."""
    key, sign, text = given.partition("=")
    if not sign or not key.strip():
        fail(f"--set {given}: write for example --set density=0.3")
    try:
        return key.strip(), json.loads(text, parse_constant=str)  # NaN is for the server to refuse
    except ValueError:
        return key.strip(), text


@app.command("list")
def list_blends(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the stored blends."""
    with client(url, api_key) as http:
        found = answer(http.get("/v1/blends"))["data"]
    if as_json:
        print_json(found)
        return
    table = Table()
    table.add_column("model", min_width=max((len(label(each)) for each in found), default=5))  # never cut
    for title in ("operator", "members", "rank", "usable", "description"):
        table.add_column(title)
    for each in found:
        usable = "yes" if each["usable"] else "no"
        table.add_row(label(each), each["operator"], weighed(each), str(rank_of(each)), usable, each["description"])
    out.print(table)


@app.command()
def show(reference: Reference, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show one blend: what it is made of, what was lost, whose licences count."""
    with client(url, api_key) as http:
        blend = answer(http.get(f"/v1/blends/{path(reference)}"))
    if as_json:
        print_json(blend)
        return
    table = Table(show_header=False, box=None)
    for key in ("name", "id", "owner", "visibility", "description", "operator", "created_at", "loaded"):
        if blend[key] not in ("", None):
            table.add_row(key, str(blend[key]))
    for key in ("settings", "report", "search"):
        if blend[key]:
            table.add_row(key, json.dumps(blend[key]))
    table.add_row(
        "members", "\n".join(f"{m['expert']} version {m['version']}: {m['weight']:g}" for m in blend["members"])
    )
    if [each["id"] for each in blend["lineage"]] != [f"{m['expert']}@{m['digest'][:12]}" for m in blend["members"]]:
        table.add_row("made of", "\n".join(f"{each['name']}: {each['weight']:g}" for each in blend["lineage"]))
    licences = (f"{each['expert']}: {each['licence'] or 'not stated'}" for each in blend["licences"])
    table.add_row("licences", "\n".join(licences))
    table.add_row("usable", "yes" if blend["usable"] else "no: " + "; ".join(blend["problems"]))
    out.print(table)


@app.command()
def remove(
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Forget a blend; its members stay."""
    if not yes:
        typer.confirm(f"Remove {reference}?", abort=True)
    with client(url, api_key) as http:
        answer(http.delete(f"/v1/blends/{path(reference)}"))
    err.print(f"{reference} is removed.", markup=False)


def path(reference: str) -> str:
    from urllib.parse import quote

    return quote(reference, safe=":")


def label(blend: dict[str, Any]) -> str:
    return str(blend["name"] or blend["id"])


def weighed(blend: dict[str, Any]) -> str:
    return ", ".join(f"{each['expert']}={each['weight']:g}" for each in blend["members"])


def rank_of(blend: dict[str, Any]) -> Any:
    return blend["report"].get("rank", "")


def described(blend: dict[str, Any]) -> str:
    report = blend["report"]
    lost = f", {report['discarded']:.2%} of the energy cut off" if report["cut"] else ", nothing cut off"
    return f"{blend['operator']} of {weighed(blend)}; {blend['id']}, rank {report['rank']}{lost}."


def noted(blend: dict[str, Any]) -> list[str]:
    """What whoever made it should know about its licences."""
    return [
        f"{each['expert']}: licence {each['licence'] or 'not stated'} ({', '.join(each['notes'])})"
        for each in blend["licences"]
        if each["notes"]
    ]
