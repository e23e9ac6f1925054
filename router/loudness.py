"""How much an adapter changes the base model: norms of dW = B A, in all, by module and by layer, beside its peers'.

An adapter that is much louder than its peers drowns them in blends and composites, and may break the base model; one
that is much quieter does little. Norms vary by factors, so they are compared by their logarithms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from router.adapter import Adapter
from router.lowrank import singular_values
from router.peers import robust_z

#: The spread of log norms that is of no interest: a tenth louder or quieter.
USUAL = 0.1
#: Where modules are that are in no layer: the output's, say.
OUTSIDE = -1

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Loudness:
    """Norms of dW by module, scale included.

    frobenius  the root of the sum of squares: how much is changed in all
    spectral   the largest singular value: by how much it can lengthen a token's vector
    """

    frobenius: Mapping[str, float]
    spectral: Mapping[str, float]

    @property
    def norm(self) -> float:
        """Frobenius, of the whole adapter."""
        return math.hypot(*self.frobenius.values())

    @property
    def peak(self) -> float:
        """The largest spectral norm of any module."""
        return max(self.spectral.values(), key=_or_infinite, default=0.0)

    def layers(self) -> dict[int, float]:
        """Frobenius norm by layer, in their order; what is in no layer is at OUTSIDE."""
        squares: dict[int, float] = {}
        for module, norm in self.frobenius.items():
            squares[layer_of(module)] = squares.get(layer_of(module), 0.0) + norm**2
        return {layer: math.sqrt(squares[layer]) for layer in sorted(squares)}

    def json(self) -> dict[str, Any]:
        return {
            "norm": self.norm,
            "peak": self.peak,
            "layers": {str(layer): norm for layer, norm in self.layers().items()},
            "frobenius": dict(self.frobenius),
            "spectral": dict(self.spectral),
        }


@dataclass(frozen=True)
class Standing:
    """Robust z of log norms beside the peers'; None: too few peers to judge by (`router.peers.FEW`).

    norm    of the whole adapter's Frobenius norm
    peak    of its largest spectral norm
    layers  of each layer's Frobenius norm, beside the peers that adapt that layer
    """

    norm: float | None
    peak: float | None
    layers: Mapping[int, float | None]

    @property
    def loudest(self) -> float | None:
        """The largest of them all."""
        found = [z for z in (self.norm, self.peak, *self.layers.values()) if z is not None]
        return max(found, default=None)

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"layers": {str(layer): z for layer, z in self.layers.items()}}


def loudness(adapter: Adapter) -> Loudness:
    """One module is in memory at a time. Singular values are those of a core of the rank's size, never dW's."""
    frobenius, spectral = {}, {}
    for module in adapter.modules:
        factors = adapter.factors(module)
        if factors is None or not factors.B.isfinite().all() or not factors.A.isfinite().all():
            frobenius[module] = spectral[module] = math.nan
            continue
        values = singular_values(factors)  # (r,), the largest first
        frobenius[module], spectral[module] = float(values.square().sum().sqrt()), float(values[0])
    return Loudness(frobenius, spectral)


def against(mine: Loudness, peers: Sequence[Loudness]) -> Standing:
    """How loud an adapter is beside its peers. Peers that change nothing in all, or in a layer, do not count there."""
    layers = [peer.layers() for peer in peers]
    return Standing(
        norm=_z(mine.norm, [peer.norm for peer in peers]),
        peak=_z(mine.peak, [peer.peak for peer in peers]),
        layers={
            layer: _z(norm, [there[layer] for there in layers if layer in there])
            for layer, norm in mine.layers().items()
        },
    )


def layer_of(module: str) -> int:
    """`model.layers.3.self_attn.q_proj` -> 3: the first number in its path."""
    found = _LAYER.search(module)
    return int(found[1]) if found else OUTSIDE


def _z(norm: float, peers: Sequence[float]) -> float | None:
    return robust_z(_log(norm), [_log(peer) for peer in peers], least=USUAL)


def _or_infinite(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm


def _log(norm: float) -> float:
    return math.log(norm) if norm > 0 else -math.inf if norm == 0 else math.nan
