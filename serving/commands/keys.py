"""`moerge keys`: who may call. Works on the registry's database, so the first key needs no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from adapters_registry.errors import RegistryError
from serving.commands.common import AsJson, err, fail, out, print_json

if TYPE_CHECKING:
    from adapters_registry.keys import ApiKeys, Scope

app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML configuration file.")]
ManifestFile = Annotated[Path | None, typer.Option("--manifest", help="The manifest that is served.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the registry.")]


@contextmanager
def keys_of(config: Path | None, manifest: Path | None, data_dir: Path | None) -> Iterator[ApiKeys]:
    """The keys of the registry that `moerge serve` uses with the same options."""
    from serving import run
    from serving.config import ConfigError, load_settings

    try:
        settings = load_settings(config, {"manifest": manifest, "registry": {"data_dir": data_dir}})
        keys = run.open_keys(settings, run.make_plan(settings).base.served_name)
        try:
            yield keys
        finally:
            keys.close()
    except (ConfigError, RegistryError) as error:
        fail(str(error))


@app.command()
def create(
    owner: Annotated[str, typer.Option(help="Whose key: a tenant's name, or the operator's.")] = "operator",
    scope: Annotated[list[str] | None, typer.Option(help="infer or admin; may be repeated.")] = None,
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, this once. Keys of the owner `operator` see and change everything."""
    scopes: list[Scope] = []
    for each in scope or ["infer"]:
        if each not in ("infer", "admin"):
            fail(f"No scope '{each}'. There are infer (ask for answers) and admin (change the registry too).")
        scopes.append(each)  # type: ignore[arg-type]
    with keys_of(config, manifest, data_dir) as keys:
        info, token = keys.create(owner, scopes)
    if as_json:
        print_json({**info.model_dump(mode="json"), "key": token})
    else:
        err.print(f"Key {info.id} of {info.owner}: {', '.join(sorted(info.scopes))}. It cannot be shown again.")
        typer.echo(token)


@app.command("list")
def list_keys(
    config: Config = None, manifest: ManifestFile = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """List the keys, without their secrets."""
    with keys_of(config, manifest, data_dir) as keys:
        found = keys.list()
    if as_json:
        print_json([key.model_dump(mode="json") for key in found])
        return
    table = Table("id", "owner", "scopes", "created", "revoked")
    for key in found:
        revoked = f"{key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else ""
        table.add_row(key.id, key.owner, ", ".join(sorted(key.scopes)), f"{key.created_at:%Y-%m-%d %H:%M}", revoked)
    out.print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `moerge keys list` shows it.")],
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
) -> None:
    """Take a key out of force; a running server notices within seconds."""
    with keys_of(config, manifest, data_dir) as keys:
        info = keys.revoke(key_id)
    err.print(f"Key {info.id} of {info.owner} is revoked.")
