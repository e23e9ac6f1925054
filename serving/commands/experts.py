"""`moerge expert`: register, look up and change experts on a running server."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from serving.commands.check import check
from serving.commands.common import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    Url,
    answer,
    client,
    err,
    fail,
    follow,
    out,
    print_json,
)
from serving.commands.stats import stats

app = typer.Typer(help="Register experts and look after them.", no_args_is_help=True)
app.command()(check)
app.command()(stats)

Name = Annotated[str, typer.Argument(help="The expert's name.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name to serve it under: lower case, digits, '.', '_', '-'.")],
    source: Annotated[str, typer.Argument(help="A PEFT folder, or hub:org/repo[@revision][#subfolder].")],
    samples: Annotated[
        Path | None, typer.Option(help="Prompts it was made for: JSONL of {prompt, answer}, or a line each.")
    ] = None,
    description: Annotated[
        str | None, typer.Option(help="What it is good at; the model card's when not given.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Its licence.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    private: Annotated[bool, typer.Option(help="For its owner only.")] = False,
    new_version: Annotated[bool, typer.Option(help="Add a version to a name that exists.")] = False,
    stage: Annotated[bool, typer.Option(help="Keep it aside until it is promoted.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Register an expert; it is used from the next request on."""
    from adapters_registry.lora import KEPT

    about: dict[str, Any] = {
        "name": name,
        "description": description,
        "licence": licence,
        "tags": tag,
        "samples": read_samples(samples) if samples else [],
        "visibility": "private" if private else "public",
        "new_version": new_version,
        "stage": stage,
    }
    with ExitStack() as stack, client(url, api_key) as http:
        if source.startswith("hub:"):
            request: dict[str, Any] = {"json": {**about, "source": hub_reference(source)}}
        else:
            folder = Path(source).expanduser()
            files = [folder / each for each in KEPT if (folder / each).is_file()]
            files += sorted(folder.glob("adapter_model*.bin"))  # refused by the server, with the reason
            if not files:
                fail(f"{folder} is not a PEFT folder: it has none of {', '.join(KEPT)}.")
            opened = [("files", (path.name, stack.enter_context(path.open("rb")))) for path in files]
            request = {"files": opened, "data": {"expert": json.dumps(about)}}
        expert = follow(http, "/v1/experts", "expert", quiet=as_json, shown="moerge expert list", **request)
    if as_json:
        print_json(expert)
    else:
        for check in expert["checks"]:
            err.print(
                f"{check['name']}: {check['detail']}", style="green" if check["passed"] else "yellow", markup=False
            )
        err.print(f"{name} version {expert['version']} is {expert['state']}.", style="bold", markup=False)
    if expert["state"] == "quarantined":
        raise typer.Exit(1)


def hub_reference(source: str) -> dict[str, str | None]:
    rest, _, subfolder = source.removeprefix("hub:").partition("#")
    repo, _, revision = rest.partition("@")
    return {"hub": repo, "revision": revision or None, "subfolder": subfolder or None}


def read_samples(path: Path) -> list[Any]:
    """JSON objects or strings, one a line; a line that is not JSON is a prompt as it stands."""
    samples: list[Any] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {error}")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith(("{", '"')):
            samples.append(line)
            continue
        try:
            samples.append(json.loads(line))
        except ValueError as error:
            fail(f"{path}:{number}: not JSON: {error}")
    return samples


@app.command("list")
def list_experts(
    state: Annotated[
        list[str] | None, typer.Option(help="active, staged, retired or quarantined; may be repeated.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the experts."""
    with client(url, api_key) as http:
        found = answer(http.get("/v1/experts", params={"state": state} if state else None))["data"]
    if as_json:
        print_json(found)
        return
    table = Table()
    table.add_column("name", min_width=max((len(each["name"]) for each in found), default=4))  # never cut
    for title in ("version", "state", "rank", "samples", "loaded", "source", "description"):
        table.add_column(title)
    for each in found:
        loaded = "yes" if each["loaded"] else ""
        row = (each["name"], each["version"], each["state"], each["rank"], each["samples"], loaded, each["source"])
        table.add_row(*map(str, row), each["description"][:60])
    out.print(table)


@app.command()
def show(
    name: Name,
    version: Annotated[int | None, typer.Option(help="The active one when not given.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show one expert: its versions, checks and samples."""
    with client(url, api_key) as http:
        versions = answer(http.get(f"/v1/experts/{name}/versions"))["data"]
        number = version or next((v["version"] for v in versions if v["state"] == "active"), versions[-1]["version"])
        expert = answer(http.get(f"/v1/experts/{name}", params={"version": number}))
    if as_json:
        print_json({**expert, "versions": versions})
        return
    table = Table(show_header=False, box=None)
    for key, value in expert.items():
        if key == "checks":
            value = "\n".join(f"{c['name']}: {'passed' if c['passed'] else 'failed'}, {c['detail']}" for c in value)
        elif key == "sample_prompts":
            value = "\n".join(each["prompt"][:100] for each in value[:5])
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in ("", None) and key != "object":
            table.add_row(key, str(value))
    table.add_row("versions", ", ".join(f"{v['version']} ({v['state']})" for v in versions))
    out.print(table)


@app.command()
def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="The version to serve.")],
    force: Annotated[bool, typer.Option(help="Also out of quarantine, and whatever its checks say.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a version the active one."""
    change(url, api_key, "POST", f"/v1/experts/{name}/promote", {"version": version, "force": force})


@app.command()
def rollback(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Return to the version that was active before."""
    change(url, api_key, "POST", f"/v1/experts/{name}/rollback")


@app.command()
def retire(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Take an expert out of service, keeping it in the registry."""
    change(url, api_key, "POST", f"/v1/experts/{name}/retire")


def change(url: str, api_key: str | None, method: str, path: str, body: dict[str, Any] | None = None) -> None:
    with client(url, api_key) as http:
        expert = answer(http.request(method, path, json=body))
    for warning in expert.get("warnings", ()):
        err.print(f"Its checks object. {warning}", style="yellow", markup=False, soft_wrap=True)
    err.print(f"{expert['name']} version {expert['version']} is {expert['state']}.", markup=False)


@app.command()
def remove(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Only this version.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Forget an expert, or one of its versions, for good."""
    what = f"{name} version {version}" if version else f"{name} with all its versions"
    if not yes:
        typer.confirm(f"Remove {what}?", abort=True)
    with client(url, api_key) as http:
        answer(http.delete(f"/v1/experts/{name}", params={"version": version} if version else None))
    err.print(f"{what} is removed.", markup=False)
