"""A PEFT LoRA folder as low-rank factors, module by module."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from adapters_registry.lora import CONFIG, WEIGHTS, Layout, LoraConfig
from router.lowrank import Factors


class Adapter:
    """The factors of an expert; tensors are read when they are asked for. `folder` must hold a valid adapter.

    Raises OSError, ValueError or SafetensorError when it does not.
    """

    def __init__(self, folder: Path) -> None:
        self.config = LoraConfig.model_validate_json((folder / CONFIG).read_bytes())
        self._path = folder / WEIGHTS
        self.names = Layout()
        with safe_open(self._path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                self.names.add(name, tuple(file.get_slice(name).get_shape()))

    @property
    def modules(self) -> list[str]:
        return self.names.modules

    def rank(self, module: str) -> int:
        """The true rank of a module, 0 when it is not adapted."""
        return self.names.A[module][1][0] if module in self.names.A else 0

    def shape(self, module: str) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.names.B[module][1][0], self.names.A[module][1][1]

    def factors(self, module: str) -> Factors | None:
        """dW = B A with the scale in B, in the file's own precision times float64; None when it is not adapted."""
        if module not in self.names.A:
            return None
        A, B = (self._file.get_tensor(side[module][0]) for side in (self.names.A, self.names.B))
        return Factors(B=B.double() * self.config.scaling(module), A=A.double())

    @cached_property
    def _file(self) -> Any:
        return safe_open(self._path, framework="pt")

    def dense(self, module: str) -> Tensor | None:
        """dW itself, (d_out, d_in) in float64: for tests and small models."""
        factors = self.factors(module)
        return None if factors is None else factors.B @ factors.A
