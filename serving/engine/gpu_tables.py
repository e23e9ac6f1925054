"""What the GPU's gate kernel knows of the composites in vLLM's slots, in tensors that never move.

A composite is reduced to numbers that fit every gate of the family (the equation is in `serving.engine.kernels`), so
filling a slot is a copy into these tensors and needs no new CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from router.gating import gate_of
from router.gating.constant import Constant
from router.gating.gate import Gate, ScoreGate, Table
from router.gating.lag import LAG
from router.gating.layout import Layout

#: Kinds of score. NONE: a plain adapter, z stays as it is.
NONE, MAGNITUDE, SIGNED, LENGTH, FILTERED, CONSTANT = range(6)
KINDS = {
    "arrow": MAGNITUDE,
    "phatgoose": SIGNED,
    "meteora": SIGNED,
    "spectr": LENGTH,
    "smile": LENGTH,
    "lag": FILTERED,
    "constant": CONSTANT,
}
#: Columns of `Tables.plan`.
KIND, MEMBERS, TOP_K, CANDIDATES, MEASURE, SHARED = range(6)
#: What a score is divided by: columns of `Tables.measures` are these, then these times the spread of x.
DIVISORS = ("none", "unit", "rms")
#: Tables with a part for each group of modules, in the kernel's order.
CONSTANTS = ("present", "centre", "head", "body", "mean", "rescale")
#: Most experts of one composite: the kernel compares all pairs of them in registers.
MOST_EXPERTS = 32


class NotOnGpu(ValueError):
    """A composite that the GPU path cannot serve, with the reason."""


def refuse(layout: Layout, tensor_parallel: int = 1) -> None:
    """Raise NotOnGpu when the kernel cannot do what this layout asks for."""
    if layout.gate not in KINDS:
        raise NotOnGpu(f"Gate '{layout.gate}' is served on CPUs only. On GPUs: {', '.join(KINDS)}.")
    if len(layout.members) > MOST_EXPERTS:
        raise NotOnGpu(f"A composite of {len(layout.members)} experts; on GPUs at most {MOST_EXPERTS}.")
    gate = gate_of(layout)
    if tensor_parallel > 1 and (gate.needs_spread or gate.needs_length):
        raise NotOnGpu(
            f"Gate '{layout.gate}' with these settings measures the whole input of a module, of which each of the "
            f"{tensor_parallel} GPUs may hold a part. Use one GPU, or a gate and normalisation without measures."
        )


class Tables:
    """S slots, G groups of modules, N modules in the largest, K experts, R rank rows, T tokens of the largest step.

    plan      (S, 6) int32      kind, members, top k, candidates, measure, shared
    expert    (S, R) int32      the expert of every row; -1: none
    row       (S, K) int32      the row that an expert's score reads
    default   (S, K)            weights of a constant gate for requests that bring none
    present   (G, S, N, K)      1 where the expert adapts the module
    centre    (G, S, N, R)      taken from z before it is scored
    head      (G, S, N, K)      factor of z[row]
    body      (G, S, N, R)      factor of z before a block's length is taken
    mean, rescale (G, S, N, K)  s <- (s - mean) * rescale
    measures  (T, 6)            of each token's x: 1, its length, its root mean square, and these times its spread
    given     (T, K)            weights that a token's request brought; NaN: none
    """

    def __init__(self, slots: int, sizes: Sequence[int], rank: int, tokens: int, device: torch.device | str) -> None:
        S, G, N, K, R = slots, len(sizes), max(sizes), min(MOST_EXPERTS, rank), rank

        def table(*shape: int, fill: float = 0, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.plan = table(S, SHARED + 1, dtype=torch.int32)
        self.expert = table(S, R, fill=-1, dtype=torch.int32)
        self.row = table(S, K, dtype=torch.int32)
        self.default = table(S, K)
        self.present, self.head = table(G, S, N, K), table(G, S, N, K)
        self.centre, self.body = table(G, S, N, R), table(G, S, N, R)
        self.mean, self.rescale = table(G, S, N, K), table(G, S, N, K)
        self.measures = table(tokens, 2 * len(DIVISORS), fill=1)
        self.given = table(tokens, K, fill=float("nan"))

    def of(self, group: int) -> list[Tensor]:
        """What the kernel reads for one group of modules, in its order."""
        ours = (self.plan, self.expert, self.row, self.default)
        return [*ours, *(getattr(self, name)[group] for name in CONSTANTS)]

    def clear(self, slot: int) -> None:
        """The slot holds a plain adapter, or nothing."""
        self.plan[slot] = 0

    def fill(self, slot: int, layout: Layout, places: Mapping[int, tuple[Sequence[int], Table]]) -> None:
        """The slot holds a composite. `places`: for each group that it adapts, which of the group's modules, and the
        constants of those. Raises NotOnGpu.
        """
        refuse(layout)
        gate, K, total = gate_of(layout), len(layout.members), sum(layout.blocks)
        self.clear(slot)
        self.expert[slot] = -1
        self.expert[slot, :total] = gate.blocks.owner.to(self.expert)
        self.row[slot, :K] = (total + torch.arange(K) if gate.extra else gate.blocks.first).to(self.row)
        if isinstance(gate, Constant):
            self.default[slot, :K] = gate.default.to(self.default)
        for name in CONSTANTS:
            table = getattr(self, name)
            new = torch.zeros_like(table[:, slot], device="cpu")  # (G, N, K or R)
            for index, (modules, constants) in places.items():
                value = torch.as_tensor(constant(name, gate, constants)).float()
                new[index, list(modules), : value.shape[-1] if value.ndim else None] = value
            table[:, slot] = new.to(table.device)
        self.plan[slot] = torch.tensor(plan(gate)).to(self.plan)


def constant(name: str, gate: Gate, table: Table) -> Tensor | float:
    """One of CONSTANTS for the modules of a group: (n, K), (n, R), (R,) or one number for all."""
    scored = isinstance(gate, ScoreGate)
    zscored = scored and gate.settings.normalise == "zscore"
    match name:
        case "present":
            return torch.ones(len(gate.layout.members)) if table.present is None else table.present
        case "head":
            return 1 / table.loudest if isinstance(gate, LAG) and gate.needs_scale else 1.0
        case "body":
            return gate.blocks.member.sum(1)
        case "centre":
            return table.centre if scored and gate.settings.centred and table.centre is not None else 0.0
        case "mean":
            return table.mean if zscored and table.mean is not None else 0.0
        case "rescale":
            deviation = table.deviation if zscored and table.deviation is not None else 1.0
            return 1 / (deviation * gate.settings.temperature) if scored else 1.0
    raise KeyError(name)


def plan(gate: Gate) -> list[int]:
    """The row of `Tables.plan` for a gate."""
    K, kind = len(gate.layout.members), KINDS[gate.layout.gate]
    if not isinstance(gate, ScoreGate):
        return [kind, K, K, K, 0, 0]
    normalise = gate.settings.normalise
    measure = DIVISORS.index(normalise) if normalise in DIVISORS else 0
    top_k, candidates = (1, gate.k) if isinstance(gate, LAG) else (gate.k, K)
    return [kind, K, top_k, candidates, measure + len(DIVISORS) * gate.needs_spread, int(gate.settings.shared)]
