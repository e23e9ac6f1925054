"""Is this folder a blend that its own lineage describes? What somebody asks before a blend on disk is used again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from adapters_registry.lora import CONFIG, WEIGHTS
from router.adapter import Adapter
from router.blending.errors import BlendError
from router.blending.folder import LINEAGE


class LineageMember(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    digest: str
    weight: float


class Lineage(BaseModel):
    """What `blend.json` says: what a blend was made of, and what it became."""

    model_config = ConfigDict(frozen=True)

    format: int
    digest: str
    operator: str
    members: tuple[LineageMember, ...]
    rank: int
    modules: int


def read_lineage(folder: Path) -> Lineage:
    """Raises BlendError when the folder holds no lineage that can be read."""
    try:
        return Lineage.model_validate_json((folder / LINEAGE).read_bytes())
    except (OSError, ValidationError) as error:
        raise BlendError([f"{folder.name}: {LINEAGE} cannot be read: {error}"]) from error


def check_blend(folder: Path) -> Lineage:
    """The lineage of a blend's folder. Raises BlendError, which says what contradicts what.

    Reads the configuration, and the names and shapes of the tensors, which must fill their file exactly.
    """
    lineage = read_lineage(folder)
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        reasons = list(_contradictions(config, Adapter(folder), lineage))
    except (OSError, ValueError, SafetensorError) as error:
        reasons = [f"it cannot be read: {error}"]
    if reasons:
        raise BlendError(f"{folder.name}: {reason}" for reason in reasons)
    return lineage


def _contradictions(config: dict[str, object], adapter: Adapter, lineage: Lineage) -> Iterator[str]:
    for key in ("r", "lora_alpha"):
        if config.get(key) != lineage.rank:
            yield f"{CONFIG} says {key} = {config.get(key)!r}, {LINEAGE} rank {lineage.rank}"
    A, B = adapter.names.A, adapter.names.B
    if adapter.names.unexpected or adapter.names.embeddings or A.keys() != B.keys() or len(A) != lineage.modules:
        yield f"{WEIGHTS} does not hold the two factors of {lineage.modules} modules"
        return
    for module, (_, shape) in A.items():
        if shape[0] != lineage.rank or B[module][1][1] != lineage.rank:
            yield f"{module} has factors of {B[module][1]} and {shape}, {LINEAGE} rank {lineage.rank}"
