"""`moerge serve`. Whatever takes long to import is imported when the command runs."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters_registry.errors import RegistryError
from router.errors import RouterError
from serving.commands.common import err, fail
from serving.engine import EngineError

if TYPE_CHECKING:
    from adapters_registry.proposal import Proposal
    from serving.config import Settings


def serve(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML configuration file.")] = None,
    manifest: Annotated[Path | None, typer.Option(help="Base model and experts to serve, in one YAML file.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Folder or Hub id of the base model.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; beyond loopback, API keys are needed.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the registry.")] = None,
    slots: Annotated[int | None, typer.Option(help="Experts in one batch.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Largest adapter rank: 8, 16, 32, 64, ... 512.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the configuration, print it, and exit.")] = False,
) -> None:
    """Serve the base model and its experts behind an OpenAI-compatible API."""
    from serving.config import ConfigError, load_settings

    options = {
        "manifest": manifest,
        "base_model": {"path": base_model},
        "server": {"host": host, "port": port},
        "engine": {"slots": slots, "max_rank": max_rank},
        "registry": {"data_dir": data_dir},
    }
    try:
        settings = load_settings(config, options)
        configure_logging(settings)
        from serving import run  # imports torch: not before the configuration is known to be good

        plan = run.make_plan(settings)
        if check:
            typer.echo(plan.settings.model_dump_json(indent=2))
            err.print(
                f"The configuration is good: {plan.base.served_name}, {len(plan.proposals)} experts in the manifest."
            )
            return
        run.check_keys(plan)
        started = time.monotonic()
        where = f"http://{settings.server.host}:{settings.server.port}"
        err.print(f"Starting {plan.base.served_name} on {where}; the engine takes a minute on a CPU ...")

        def on_expert(position: int, proposal: Proposal, outcome: str) -> None:
            good = outcome in ("kept", "active", "staged")
            style = "green" if good else "yellow"
            err.print(f"  [{position}/{len(plan.proposals)}] {proposal.name}: {outcome}", style=style, markup=False)

        def on_ready(service: object) -> None:
            err.print(
                f"Ready in {time.monotonic() - started:.0f} s: {where}/v1 (OpenAI API), {where}/docs", style="bold"
            )

        run.serve(plan, on_ready, on_expert)
    except (ConfigError, RegistryError, RouterError, EngineError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        err.print("Stopped.")


def configure_logging(settings: Settings) -> None:
    """Our own log lines on standard error; libraries speak from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("moerge").setLevel(settings.log_level.upper())
