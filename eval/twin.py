"""The slow twin of the gated engine: a composite on Transformers, with hooks where vLLM has its kernels.

    composite = Composite.read(folder)            # as router.composite writes it, or
    composite = Composite.stack({"a": folder_a, "b": folder_b}, "arrow", {"top_k": 2})
    twin = Twin(model, composite)                 # the model itself stays as it was outside of the calls below
    twin.logprobs(token_ids)                      # (T, vocabulary)
    twin.generate([token_ids, ...], limit=32)     # greedy

It defines what is right: for prompts and decoding, in batches or alone, with evidence carried from step to step.
`explicit=True` weighs by formulas on dense `dW x` instead of by `router.gating` on rank rows (`eval.explicit`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters_registry.lora import CONFIG, WEIGHTS, LoraConfig
from adapters_registry.lora import Layout as Names
from eval.explicit import Explicit
from eval.greedy import greedy, step
from router.gating import GATES, gate_of
from router.gating.gate import Step, Table
from router.gating.layout import KEY, TABLES, Layout, Member

#: Modules that share their input, in the order in which a decoder layer computes them.
SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

Deltas = dict[str, Tensor]  # module -> s B A, (d_out, d_in)
Kept = Mapping[str, Mapping[str, Tensor]]  # key -> tensors by name


def read_deltas(folder: Path) -> tuple[Deltas, int]:
    """An expert's dW = s B A for each module, formed in full, and its largest rank."""
    config = LoraConfig.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    tensors, names = load_file(folder / WEIGHTS), Names()
    for name, tensor in tensors.items():
        names.add(name, tuple(tensor.shape))
    factors = {module: (tensors[names.A[module][0]], tensors[names.B[module][0]]) for module in names.modules}
    deltas = {module: config.scaling(module) * (B.double() @ A.double()) for module, (A, B) in factors.items()}
    return deltas, max(A.shape[0] for A, _ in factors.values())


@dataclass(frozen=True, eq=False)
class Composite:
    """What a composite folder holds: the layout, A (R, d_in) and B (d_out, R) of every module, the gate's tables."""

    layout: Layout
    factors: dict[str, tuple[Tensor, Tensor]]
    tables: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        layout = Layout.model_validate(json.loads((folder / CONFIG).read_text(encoding="utf-8"))[KEY])
        tensors, names = load_file(folder / WEIGHTS), Names()
        for name, tensor in tensors.items():
            names.add(name, tuple(tensor.shape))
        factors = {module: (tensors[names.A[module][0]], tensors[names.B[module][0]]) for module in names.modules}
        return cls(layout, factors, load_file(folder / TABLES))

    @classmethod
    def stack(
        cls,
        experts: Mapping[str, Path],
        gate: str,
        settings: Mapping[str, Any] | None = None,
        kept: Mapping[str, Kept] | None = None,
    ) -> Self:
        """The slow twin of `router.composite`: every dW formed, and decomposed in float64.

        `experts` are folders by id; `kept[id][key]` are the tensors kept with an expert (`docs/registry.md`).
        """
        kept = kept or {}
        read = {name: read_deltas(folder) for name, folder in experts.items()}
        members = tuple(Member(id=name, rows=rank) for name, (_, rank) in read.items())
        layout = Layout(gate=gate, settings=dict(settings or {}), members=members)
        trained = GATES[gate].extra  # a vector kept under the gate's own name
        extra = len(members) if trained else 0
        layout = layout.model_copy(update={"form": gate_of(layout).form, "extra": extra})
        factors, tables = {}, {}
        for module in sorted({module for deltas, _ in read.values() for module in deltas}):
            some = next(deltas[module] for deltas, _ in read.values() if module in deltas)
            A, B, scale = [], [], []
            for deltas, rank in read.values():
                U, S, Vh = torch.linalg.svd(deltas.get(module, torch.zeros_like(some)), full_matrices=False)
                U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
                Vh = Vh * (1e-9 * S[0] < S)[:, None]  # a module's rank may be lower: the other directions are arbitrary
                A.append(Vh if layout.form == "unit" else S[:, None] * Vh)
                B.append(U * S if layout.form == "unit" else U)
                scale.append(S)
            for name in read if trained else ():
                vector = kept[name][gate].get(module)
                A.append(some.new_zeros(1, some.shape[1]) if vector is None else GATES[gate].row(vector.double())[None])
                B.append(torch.zeros(len(some), 1))
                scale.append(torch.ones(1))
            factors[module] = (torch.cat(A).float(), torch.cat(B, 1).float())
            tables[f"{module}.scale"] = torch.cat(scale).float()
            tables[f"{module}.present"] = torch.tensor([module in deltas for deltas, _ in read.values()])
        return cls(layout, factors, tables | _statistics(layout, list(factors), kept))


def _statistics(layout: Layout, modules: Sequence[str], kept: Mapping[str, Kept]) -> dict[str, Tensor]:
    """Mean and deviation (K,) of every module's score, and the centre (R,) of its z, from those of the experts."""
    key = statistics_key(layout)
    each = [kept.get(member.id, {}).get(key or "") for member in layout.members]
    if key is None or not all(each):
        return {}
    found: dict[str, Tensor] = {}
    for module in modules:
        for name, missing in (("mean", 0.0), ("deviation", 1.0), ("centre", 0.0)):
            shapes = [(member.rows,) if name == "centre" else (1,) for member in layout.members]
            values = [
                statistics.get(f"{module}.{name}", torch.full(shape, missing)).reshape(shape)
                for statistics, shape in zip(each, shapes, strict=True)
                if statistics is not None
            ]
            found[f"{module}.{name}"] = torch.cat(values).float()
    return found


def statistics_key(layout: Layout) -> str | None:
    """Where an expert keeps the statistics of the score that this gate normalises; None when it uses none."""
    gate = gate_of(layout)
    scorer = getattr(gate, "scorer", gate)
    name = getattr(scorer, "score_name", None)
    return None if name is None else f"statistics/{scorer.form}/{name}"


class Running:
    """Evidence of the requests in a batch: cumulative over tokens within each group, then over groups.

    add(g, score)[t] = sum over tokens t' <= t and groups g' <= g of decay^(t - t') score[t', g']. The engine's decay
    is 1; others are for experiments.
    """

    def __init__(self, decay: float = 1.0) -> None:
        self.decay = decay
        self.passed: dict[int, Tensor] = {}  # group -> (batch, K), of all tokens of earlier steps
        self.mask = torch.ones(0)

    def start(self, mask: Tensor) -> None:
        """A step begins; `mask` (batch, length) is 0 where there is only padding."""
        self.mask = mask
        self.depth = torch.zeros(())  # (batch, length, K), over the groups so far
        age = torch.arange(mask.shape[1])[:, None] - torch.arange(mask.shape[1])
        self.fade = (self.decay ** age.clamp(min=0).double()) * (age >= 0)  # (length, length)

    def add(self, index: int, score: Tensor) -> Tensor:
        score = score.view(*self.mask.shape, -1).double() * self.mask[..., None]  # (batch, length, K)
        sums = torch.einsum("ts,bsk->btk", self.fade, score)
        if index in self.passed:
            faded = self.decay * self.fade[:, 0]  # (length,)
            sums = sums + faded[:, None] * self.passed[index][:, None]
        self.passed[index] = sums[:, -1]
        self.depth = self.depth + sums
        return self.depth.flatten(0, 1).float()  # (batch * length, K)

    @property
    def total(self) -> Tensor:
        """(batch, K) all evidence after the last token."""
        return torch.stack(list(self.passed.values())).sum(0)


@dataclass(frozen=True, eq=False)
class Seen:
    """What passed one group in one step: z before its gate and the weights, (batch, length, n, R or K)."""

    index: int
    modules: tuple[str, ...]
    table: Table
    z: Tensor
    weights: Tensor


class Group:
    """Modules that share an input. The first of them weighs for all; each adds its own output."""

    def __init__(self, index: int, modules: Sequence[str], shapes: Sequence[torch.Size], composite: Composite) -> None:
        layout = composite.layout
        R, K = layout.rank, len(layout.members)
        self.modules = tuple(modules)
        empty = {
            m: (torch.zeros(R, d_in), torch.zeros(d_out, R)) for m, (d_out, d_in) in zip(modules, shapes, strict=True)
        }
        factors = {**empty, **{m: composite.factors[m] for m in modules if m in composite.factors}}
        self.A = torch.stack([factors[m][0].float() for m in modules])  # (n, R, d_in)
        self.B = [factors[m][1].float() for m in modules]  # n times (d_out, R)

        def gather(name: str, default: Tensor) -> Tensor | None:
            found = [composite.tables.get(f"{m}.{name}") for m in modules]
            if all(each is None for each in found):
                return None
            return torch.stack([default if each is None else each for each in found])

        adapted = torch.tensor([m in composite.factors for m in modules])
        present = gather("present", torch.ones(K, dtype=torch.bool))
        if present is None:
            present = torch.ones(len(modules), K, dtype=torch.bool)
        present &= adapted[:, None]
        self.table = Table(
            index=index,
            layout=layout,
            present=None if bool(present.all()) else present,
            scale=gather("scale", torch.ones(R)),
            mean=gather("mean", torch.zeros(K)),
            deviation=gather("deviation", torch.ones(K)),
            centre=gather("centre", torch.zeros(R)),
        )
        self.gated: Tensor | list[Tensor] = []


class Twin:
    """A model and a composite. `watch` is told what passes each group."""

    def __init__(
        self,
        model: PreTrainedModel,
        composite: Composite,
        *,
        explicit: bool = False,
        watch: Callable[[Seen], None] | None = None,
        decay: float = 1.0,
    ) -> None:
        self.model = model
        self.layout = composite.layout
        self.gate = gate_of(composite.layout)
        self.watch = watch
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        unknown = composite.factors.keys() - linear.keys()
        if unknown:
            raise ValueError(f"The model has no linear modules {', '.join(sorted(unknown))}.")
        self.groups = [
            Group(index, names, [linear[name].weight.shape for name in names], composite)
            for index, names in enumerate(groups_of(list(linear)))
            if not composite.factors.keys().isdisjoint(names)
        ]
        self.linear = linear
        self.explicit = Explicit(self.layout) if explicit else None
        self.decay = decay
        self.evidence = Running(decay)
        self.given: Tensor | None = None

    def _hook(self, group: Group, i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """Add module i's share of the composite to its output."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].float()  # (batch, length, d_in)
            if i == 0:
                group.gated = self._weigh(group, x)
            if isinstance(group.gated, Tensor):
                return output + (group.gated[:, i] @ group.B[i].T).view_as(output).to(output.dtype)
            return output + group.gated[i].view_as(output).to(output.dtype)

        return hook

    def _weigh(self, group: Group, x: Tensor) -> Tensor | list[Tensor]:
        """(batch, length, d_in) -> gated z (t, n, R); in explicit mode outputs, n times (t, d_out)."""
        flat = x.flatten(0, 1)
        step = Step(
            length=flat.norm(dim=-1)[:, None, None],
            spread=flat.std(dim=-1, correction=0)[:, None, None],
            given=None if self.given is None else self.given.repeat_interleave(x.shape[1], 0),
            evidence=self.evidence,
            d_in=x.shape[-1],
        )
        if self.explicit is not None:
            return self.explicit(flat, group.A, group.B, group.table, step)
        z = torch.einsum("td,nrd->tnr", flat, group.A).contiguous()
        before = z.clone() if self.watch else z
        weights = self.gate(z, group.table, step)
        if self.watch:
            z_before, w = (each.reshape(*x.shape[:2], *each.shape[1:]) for each in (before, weights))
            self.watch(Seen(group.table.index, group.modules, group.table, z_before, w))
        return z

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are in place, and evidence starts from nothing."""
        self.evidence = Running(self.decay)
        hooks = [
            self.linear[name].register_forward_hook(self._hook(group, i))
            for group in self.groups
            for i, name in enumerate(group.modules)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """One step. ids (batch, length); mask (batch, all so far) -> logits (batch, length, vocabulary), cache."""
        self.evidence.start(mask[:, -ids.shape[1] :].float())
        return step(self.model, ids, mask, cache)

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], given: Sequence[float] | None = None, chunks: int = 1) -> Tensor:
        """(T,) tokens of one request -> (T, vocabulary): what each token, and all before it, predict.

        In `chunks` steps with a KV cache between them; the result must not depend on how many.
        """
        self.given = None if given is None else torch.tensor([given])
        rows, cache, done = [], None, 0
        with self.attached():
            for chunk in torch.tensor([list(ids)]).tensor_split(chunks, 1):
                done += chunk.shape[1]
                logits, cache = self.forward(chunk, torch.ones(1, done, dtype=torch.long), cache)
                rows.append(logits[0].float().log_softmax(-1))
        return torch.cat(rows)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        limit: int = 32,
        eos: int | None = None,
        given: Sequence[Sequence[float]] | None = None,
    ) -> list[list[int]]:
        """The likeliest tokens after each prompt, at most `limit`, up to and without `eos`; all prompts in one batch.

        `given` are weights for each request, NaN where it brings none.
        """
        self.given = None if given is None else torch.tensor(given)
        with self.attached():
            return greedy(self.forward, prompts, limit=limit, eos=() if eos is None else (eos,))


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """Linear modules of a decoder by shared input, in the order of computation; others are left out."""
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    groups = [[f"{parent}.{leaf}" for leaf in shared] for parent in parents for shared in SHARED]
    return [group for group in groups if set(group) <= set(names)]
