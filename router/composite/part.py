"""What goes into a composite, and how it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """One expert that goes into a composite.

    id          unique for name and content
    digest      sha256 of its content
    path        its PEFT folder
    tensors     stored with the expert, as arrays or tensors: a gate's name -> {module: (d_in,)}, and
                `statistics_key` -> {"<module>.mean": (), "<module>.deviation": (), "<module>.centre": (rows,)}
    base_model  what it was registered for; None: what its configuration says
    """

    id: str
    digest: str
    path: Path
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base_model: str | None = None


class CompositeError(ValueError):
    """A composite that cannot be built or read, with every reason."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        assert self.reasons, "a refusal needs a reason"
        super().__init__("\n".join(self.reasons))


def stored_tensor(value: Any) -> Tensor:
    """An array, which may be read-only, or a tensor as float32."""
    return value.float() if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=np.float32))


def stored_digest(part: Part) -> str:
    """sha256 (hex) of the tensors that come with a part."""
    digest = hashlib.sha256()
    for key, tensors in sorted(part.tensors.items()):
        for name, tensor in sorted(tensors.items()):
            array = np.ascontiguousarray(tensor, dtype=np.float32)
            digest.update(f"{key}\0{name}\0{array.shape}\0".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
