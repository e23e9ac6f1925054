"""`moerge doctor`: would a server start here? Each line is a check, with what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from serving.commands.common import AsJson, out, print_json

if TYPE_CHECKING:
    from serving.config import Settings


@dataclass(frozen=True)
class Finding:
    """`ok` None is a remark: nothing is wrong, but something could be better."""

    check: str
    ok: bool | None
    detail: str


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", (3, 11) <= sys.version_info < (3, 14), f"{version} (3.11 to 3.13 are supported)")


def torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", False, f"{error}. Run `make install`.")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Finding("torch", True, f"{torch.__version__}, {gpus} GPUs, {os.cpu_count()} cores")


def vllm() -> Finding:
    from serving.engine import private

    try:
        private.check_version()
        import vllm  # noqa: F401
    except (RuntimeError, ImportError) as error:
        return Finding("vllm", False, str(error))
    return Finding("vllm", True, f"{private.vllm_version()}, tested with this plugin")


def plugin() -> Finding:
    found = [entry.value for entry in metadata.entry_points(group="vllm.general_plugins") if entry.name == "moerge"]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found:
        return Finding("vllm plugin", False, "not registered: install the package itself (`make install`)")
    if allowed is not None and "moerge" not in allowed.split(","):
        return Finding("vllm plugin", False, f"VLLM_PLUGINS={allowed} keeps it out; add moerge, or unset it")
    return Finding("vllm plugin", True, found[0])


def cuda_builds() -> Finding:
    """On a CPU machine these packages want CUDA and break the import of transformers."""
    import torch

    names = ("torchvision", "torchaudio", "torchcodec")
    present = [name for name in names if any(metadata.distributions(name=name))]
    bad = bool(present) and not torch.cuda.is_available() and torch.version.cuda is None
    return Finding("cuda-only packages", not bad, f"remove {', '.join(present)}" if bad else "none in the way")


def encoder() -> Finding:
    from router.encoder import bundled_minilm

    try:
        folder = bundled_minilm()
    except Exception as error:
        return Finding("encoder", False, f"{error}")
    return Finding("encoder", True, f"packaged all-MiniLM-L6-v2 ({folder.name})")


def memory() -> Finding:
    free = psutil.virtual_memory().available / 2**30
    return Finding("memory", free > 4, f"{free:.1f} GiB available; the quickstart needs about 4")


def malloc() -> Finding:
    preload = os.environ.get("LD_PRELOAD", "")
    good = "tcmalloc" in preload
    return Finding("allocator", True if good else None, "tcmalloc" if good else "vLLM on a CPU is faster with tcmalloc")


def of_settings(settings: Settings) -> Iterator[Finding]:
    """What depends on the configuration: base model and manifest, the folder of the registry, the port."""
    from adapters_registry.errors import RegistryError
    from serving import run
    from serving.config import ConfigError

    try:
        plan = run.make_plan(settings)
        yield Finding("configuration", True, f"{plan.base.served_name}, {len(plan.proposals)} experts in the manifest")
        yield learned(plan.data_dir / "routers")
    except (ConfigError, RegistryError) as error:
        yield Finding("configuration", False, str(error))
    folder = settings.registry.data_dir.expanduser()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    yield Finding("registry folder", os.access(existing, os.W_OK), f"{folder} ({free_space(existing):.1f} GiB free)")
    with socket.socket(socket.AF_INET6 if ":" in settings.server.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.server.host, settings.server.port))
            yield Finding("port", True, f"{settings.server.host}:{settings.server.port} is free")
        except OSError as error:
            yield Finding("port", False, f"{settings.server.host}:{settings.server.port}: {error.strerror}")


def learned(folder: Path) -> Finding:
    from router.versions import RouterVersions

    active = RouterVersions(folder).active()
    number = active.learned.number
    good = f"version {number} is in force" if number else "nothing learned is in force"
    return Finding("router", not active.problems, " ".join(active.problems) or good)


def free_space(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 2**30


CHECKS: tuple[Callable[[], Finding], ...] = (python, torch, vllm, plugin, cuda_builds, encoder, memory, malloc)


def doctor(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML configuration file.")] = None,
    manifest: Annotated[Path | None, typer.Option(help="The manifest to serve.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and the configuration."""
    from serving.config import ConfigError, load_settings

    findings = [check() for check in CHECKS]
    try:
        findings += of_settings(load_settings(config, {"manifest": manifest}))
    except ConfigError as error:
        findings.append(Finding("configuration", False, str(error)))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    for finding in [] if as_json else findings:
        mark, style = {True: ("ok", "green"), False: ("NO", "red"), None: ("--", "yellow")}[finding.ok]
        out.print(f"{mark}  {finding.check}: {finding.detail}", style=style, markup=False, highlight=False)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)
