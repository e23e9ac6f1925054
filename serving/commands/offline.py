"""What commands share that work in this process, on the registry's files: no server needs to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adapters_registry.errors import RegistryError
from serving.commands.common import err, fail

if TYPE_CHECKING:
    from adapters_registry.registry import Registry
    from serving.run import Plan

Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML configuration file.")]
ManifestFile = Annotated[Path | None, typer.Option("--manifest", help="The manifest that is served.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the registry.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]


@dataclass(frozen=True)
class Workplace:
    """The registry that `moerge serve` uses with the same options, and the plan that it would follow."""

    registry: Registry
    plan: Plan

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.plan.base.path, revision=self.plan.base.revision)

    def model(self, device: str) -> Any:
        """The base model, for inference."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        base = self.plan.base
        return AutoModelForCausalLM.from_pretrained(base.path, revision=base.revision).to(device).eval()


@contextmanager
def workplace(config: Path | None, manifest: Path | None, data_dir: Path | None) -> Iterator[Workplace]:
    """Ends the command with one message when the configuration or the registry does not allow it."""
    from serving import run
    from serving.config import ConfigError, load_settings

    try:
        settings = load_settings(config, {"manifest": manifest, "registry": {"data_dir": data_dir}})
        plan = run.make_plan(settings)
        from adapters_registry.registry import Registry

        with Registry.open(plan.data_dir, url=plan.database_url, base=plan.spec()) as registry:
            yield Workplace(registry, plan)
    except (ConfigError, RegistryError) as error:
        fail(str(error))


def progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description:>20.20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, transient=True)
