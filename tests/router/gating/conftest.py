"""Raw experts, written as PEFT folders, composed, and read back as an engine would; and the slow twin of all gates.

The twin loops over tokens, modules and experts on dense dW = s B A in float64. It is written from the papers' equations
and the factors as they were trained; it knows nothing of rank rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from router.composite import Part, check_composite, compose, statistics_key
from router.gating import gate_of
from router.gating.gate import Gate, Step, Table
from router.gating.layout import TABLES, Layout

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
D_IN, D_OUT = 24, {MODULES[0]: 24, MODULES[1]: 10, MODULES[2]: 10}


@dataclass
class RawExpert:
    """Factors as PEFT stores them: module -> (B, A), and what B A is multiplied with."""

    factors: dict[str, tuple[Tensor, Tensor]]
    alpha: float = 8.0
    rslora: bool = False
    vectors: dict[str, Tensor] = field(default_factory=dict)
    _deltas: dict[str, Tensor] = field(default_factory=dict)
    _directions: dict[str, Tensor] = field(default_factory=dict)

    def delta(self, module: str) -> Tensor | None:
        if module in self.factors and module not in self._deltas:
            B, A = (factor.double() for factor in self.factors[module])
            r = A.shape[0]
            self._deltas[module] = self.alpha / (math.sqrt(r) if self.rslora else r) * B @ A
        return self._deltas.get(module)

    def directions(self, module: str) -> Tensor:
        """(rank, d_in) right singular vectors of dW"""
        if module not in self._directions:
            dW = self.delta(module)
            assert dW is not None
            self._directions[module] = torch.linalg.svd(dW).Vh[: int(torch.linalg.matrix_rank(dW))]
        return self._directions[module]

    def save(self, folder: Path) -> Path:
        """As PEFT would; ranks that differ between modules become a rank_pattern."""
        folder.mkdir(parents=True)
        ranks = {module: A.shape[0] for module, (_, A) in self.factors.items()}
        r = max(ranks.values())
        config = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
            "alpha_pattern": {},
            "base_model_name_or_path": "org/base",
            "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for module, (B, A) in self.factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = A
            tensors[f"base_model.model.{module}.lora_B.weight"] = B
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder


def random_expert(
    seed: int,
    ranks: int | Sequence[int],
    modules: Sequence[str] = MODULES,
    *,
    rslora: bool = False,
    alpha: float = 8.0,
    zero: Sequence[str] = (),
) -> RawExpert:
    """`zero`: modules that have factors, but B is zero there as before training."""
    random = torch.Generator().manual_seed(seed)
    each = [ranks] * len(modules) if isinstance(ranks, int) else ranks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    factors = {}
    for m, r in zip(modules, each, strict=True):
        factors[m] = (normal(D_OUT[m], r) / 2 * (m not in zero), normal(r, D_IN) / 5)
    return RawExpert(factors, alpha, rslora, vectors={module: normal(D_IN) for module in modules})


@dataclass
class Twin:
    """`neutral` are inputs (N, d_in) that statistics are measured on; one Twin serves one gate and its settings."""

    experts: Sequence[RawExpert]
    modules: Sequence[str]
    neutral: Tensor
    _statistics: dict[tuple[int, str], tuple[float, float]] = field(default_factory=dict)

    def score(self, gate: str, settings: dict[str, Any], expert: RawExpert, module: str, x: Tensor) -> float | None:
        """One expert's raw score for one input x (d_in,); None when it does not adapt the module."""
        dW = expert.delta(module)
        if dW is None or not dW.any():
            return None
        full = x
        if settings.get("centred"):
            x = x - self.neutral.mean(0)
        if gate == "arrow":
            score = abs(float(expert.directions(module)[0] @ x))
        elif gate in ("spectr", "lag") and settings.get("singular_values", True):
            score = float((dW @ x).norm())
        elif gate in ("spectr", "lag", "smile"):
            most = settings.get("k_gate", 16) if gate == "smile" else None
            score = float((expert.directions(module)[:most] @ x).norm())
        elif gate == "phatgoose":
            score = float(layer_norm(x) @ layer_norm(expert.vectors[module].double())) / math.sqrt(len(x))
        else:
            assert gate == "meteora"
            score = float(expert.vectors[module].double() @ x)
        length = max(float(full.norm()), 1e-12)
        divisor = {"unit": length, "rms": length / math.sqrt(len(x))}
        return score / divisor.get(settings.get("normalise", "none"), 1.0)

    def statistics(self, gate: str, settings: dict[str, Any], expert: RawExpert, module: str) -> tuple[float, float]:
        """Mean and standard deviation of the raw score over the neutral inputs."""
        if (known := self._statistics.get((id(expert), module))) is not None:
            return known
        plain = {**settings, "normalise": "none"}
        scores = torch.tensor([self.score(gate, plain, expert, module, x) for x in self.neutral], dtype=torch.float64)
        self._statistics[id(expert), module] = float(scores.mean()), float(scores.std(correction=0))
        return self._statistics[id(expert), module]

    def scores(self, gate: str, settings: dict[str, Any], x: Tensor) -> list[list[float | None]]:
        """[module][expert] for one input, z-scored if so set."""
        table: list[list[float | None]] = []
        for module in self.modules:
            row: list[float | None] = []
            for expert in self.experts:
                score = self.score(gate, settings, expert, module, x)
                if score is not None and settings.get("normalise") == "zscore":
                    mean, deviation = self.statistics(gate, settings, expert, module)
                    score = (score - mean) / deviation
                row.append(score)
            table.append(row)
        if settings.get("shared"):
            for k in range(len(self.experts)):
                seen = [row[k] for row in table if row[k] is not None]
                for row in table:
                    row[k] = None if row[k] is None else sum(seen) / len(seen)
        return table

    def weights(self, gate: str, settings: dict[str, Any], x: Tensor) -> Tensor:
        """(n, K) for one input."""
        scores = self.scores(gate, settings, x)
        first = {name: settings[name] for name in ("shared", "centred") if name in settings}
        arrow = self.scores("arrow", first, x) if gate == "lag" else None
        default = {"phatgoose": 2, "meteora": 2, "lag": 20}.get(gate)
        k = settings.get("top_k", default) or len(self.experts)
        rows = []
        for j, row in enumerate(scores):
            there = [i for i, score in enumerate(row) if score is not None]
            if arrow is not None:
                there = sorted(there, key=lambda i: -arrow[j][i])[:k]
            best = sorted(there, key=lambda i: -row[i])[: 1 if gate == "lag" else k]
            powers = {i: math.exp(row[i] / settings.get("temperature", 1.0)) for i in best}
            rows.append([powers[i] / sum(powers.values()) if i in powers else 0.0 for i in range(len(row))])
        return torch.tensor(rows, dtype=torch.float64)

    def output(self, weights: Tensor, x: Tensor) -> list[Tensor]:
        """sum_k g_k dW_k x for every module, from weights (n, K) and one input."""
        outputs = []
        for j, module in enumerate(self.modules):
            total = torch.zeros(D_OUT[module], dtype=torch.float64)
            for k, expert in enumerate(self.experts):
                dW = expert.delta(module)
                if dW is not None:
                    total += weights[j, k] * (dW @ x)
            outputs.append(total)
        return outputs


def layer_norm(x: Tensor) -> Tensor:
    spread = x.std(correction=0)
    return (x - x.mean()) / spread if spread > 0 else torch.zeros_like(x)


@dataclass
class Engine:
    """One group of modules of a composite, computed as an engine does: shrink, gate, expand."""

    layout: Layout
    gate: Gate
    table: Table
    A: list[Tensor]  # (R, d_in) of every module
    B: list[Tensor]  # (d_out, R)

    def shrink(self, x: Tensor) -> Tensor:
        """(t, d_in) -> z (t, n, R)"""
        return torch.stack([x @ A.T for A in self.A], 1)

    def step(self, x: Tensor, **given: Any) -> Step:
        return Step(
            length=x.norm(dim=-1)[:, None, None],
            spread=x.std(-1, correction=0)[:, None, None],
            d_in=x.shape[-1],
            **given,
        )

    def __call__(self, x: Tensor, **given: Any) -> tuple[Tensor, list[Tensor]]:
        """(t, d_in) -> weights (t, n, K) and the modules' outputs (t, d_out)"""
        z = self.shrink(x)
        weights = self.gate(z, self.table, self.step(x, **given))
        return weights, [z[:, j] @ B.T for j, B in enumerate(self.B)]


def read(folder: Path, modules: Sequence[str] = MODULES) -> Engine:
    layout = check_composite(folder)
    weights, tables = load_file(folder / "adapter_model.safetensors"), load_file(folder / TABLES)
    present = sorted(name.split(".lora_A")[0] for name in weights if "lora_A" in name)
    there = [module for module in modules if f"base_model.model.{module}" in present]
    K, R = len(layout.members), layout.rank
    blank = {"present": torch.ones(K, dtype=torch.bool), "scale": torch.ones(R), "centre": torch.zeros(R)}
    blank |= {"mean": torch.zeros(K), "deviation": torch.ones(K)}
    stacked = {
        name: torch.stack([tables.get(f"{module}.{name}", other) for module in there])
        if any(f"{module}.{name}" in tables for module in there)
        else None
        for name, other in blank.items()
    }
    factors = [[weights[f"base_model.model.{m}.lora_{side}.weight"] for m in there] for side in "AB"]
    return Engine(layout, gate_of(layout), Table(0, layout, **stacked), *factors)


@dataclass
class Workshop:
    """Builds composites below a folder of its own."""

    folder: Path
    count: int = field(default=0)

    def parts(self, experts: Sequence[RawExpert], tensors: Sequence[Mapping[str, Any]] | None = None) -> list[Part]:
        self.count += 1
        parts = []
        for k, expert in enumerate(experts):
            path = expert.save(self.folder / f"{self.count}" / f"expert{k}")
            digest = hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
            stored: dict[str, Any] = {"phatgoose": expert.vectors, "meteora": expert.vectors}
            parts.append(Part(f"expert{k}@{self.count}", digest, path, {**stored, **(tensors[k] if tensors else {})}))
        return parts

    def engine(
        self,
        experts: Sequence[RawExpert],
        gate: str,
        settings: Mapping[str, Any] | None = None,
        tensors: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Engine:
        parts = self.parts(experts, tensors)
        folder = self.folder / f"{self.count}" / "composite"
        modules = options.pop("modules", MODULES)
        compose(folder, parts, gate, settings or {}, **{"max_rank": 512, **options})
        return read(folder, modules)

    def statistics(self, twin: Twin, gate: str, settings: dict[str, Any]) -> list[dict[str, Any]] | None:
        """What a calibration stores with every expert: moments of the twin's scores, and the mean z that it reads off
        a composite which is not calibrated yet.
        """
        zscore, centred = settings.get("normalise") == "zscore", settings.get("centred", False)
        if not (zscore or centred):
            return None
        plain = self.engine(twin.experts, gate, {**settings, "normalise": "none", "centred": False})
        layout = plain.layout.model_copy(update={"settings": {**plain.layout.settings, **settings}})
        key = statistics_key(gate_of(layout))
        assert key is not None
        z = plain.shrink(twin.neutral.float()).mean(0)  # (n, R)
        stored = []
        for expert, start, rows in zip(twin.experts, layout.starts, layout.blocks, strict=True):
            found = {}
            for j, module in enumerate(MODULES):
                if (dW := expert.delta(module)) is not None:
                    mean, deviation = twin.statistics(gate, settings, expert, module) if dW.any() else (0.0, 0.0)
                    found[f"{module}.mean"] = torch.tensor(mean)
                    found[f"{module}.deviation"] = torch.tensor(deviation)
                    found[f"{module}.centre"] = z[j, start : start + rows]
            stored.append({key: found})
        return stored


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    torch.set_num_threads(1)
    return Workshop(tmp_path)


MakeExpert = Callable[..., RawExpert]


@pytest.fixture(scope="session")
def make_raw() -> MakeExpert:
    return random_expert


@pytest.fixture(scope="session")
def make_twin() -> Callable[..., Twin]:
    return Twin
