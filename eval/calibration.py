"""What scores are on prompts that no expert is for: the statistics that z-scores and centred scores need.

    kept = calibrate(model, {"a": folder_a, "b": folder_b}, prompts, score="spectr")
    Composite.stack(experts, "evidence", {"score": "spectr"}, kept)

The slow twin of the calibration that a server does through its engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.twin import Composite, Seen, Twin, statistics_key
from router.gating import gate_of
from router.gating.gate import Step, Table

FLOOR = 1e-6  # a deviation under this is taken for it


def calibrate(
    model: PreTrainedModel,
    experts: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    owners: Sequence[str] | None = None,
    **settings: Any,
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Tensors to keep with each expert, `kept[id][key]`, from what the base model reads in neutral prompts.

    Every token of every prompt counts once, but not for the prompt's owner if there is one. `settings` are those of
    the probe: `score`, `centred`, `k_gate`.
    For each expert and module it adapts: `mean` and `deviation` () of its raw score, `centre` (rows,) of its z.
    """
    composite = Composite.stack(experts, "probe", {**settings, "normalise": "none", "centred": False})
    zs = collect(model, composite, prompts)
    layout = composite.layout.model_copy(update={"settings": settings})
    scorer, key = gate_of(layout).scorer, statistics_key(layout)  # type: ignore[attr-defined]
    assert key is not None
    edges = [(start, start + member.rows) for start, member in zip(layout.starts, layout.members, strict=True)]
    owned = owners or [""] * len(prompts)
    foreign = torch.tensor([[owner != member.id for member in layout.members] for owner in owned])
    counts = foreign.repeat_interleave(torch.tensor([len(prompt) for prompt in prompts]), 0)  # (tokens, K)
    kept: dict[str, dict[str, dict[str, Tensor]]] = {member.id: {key: {}} for member in layout.members}
    for module, z in zs.items():  # (tokens, R)
        centres = torch.cat([z[counts[:, k], first:last].mean(0) for k, (first, last) in enumerate(edges)])  # (R,)
        raw = scorer.raw(z[:, None], Table(0, layout, centre=centres[None]), Step())[:, 0]  # (tokens, K)
        for k, (member, (first, last)) in enumerate(zip(layout.members, edges, strict=True)):
            if composite.tables[f"{module}.present"][k]:
                statistics = kept[member.id][key]
                statistics[f"{module}.mean"] = raw[counts[:, k], k].mean()
                statistics[f"{module}.deviation"] = raw[counts[:, k], k].std(correction=0).clamp_min(FLOOR)
                statistics[f"{module}.centre"] = centres[first:last].clone()
    return kept


def collect(model: PreTrainedModel, composite: Composite, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """z (tokens, R) of every module the composite adapts, over all tokens of all prompts, read by the base model."""
    zs: dict[str, list[Tensor]] = defaultdict(list)

    def watch(seen: Seen) -> None:
        for i, module in enumerate(seen.modules):
            if module in composite.factors:
                zs[module].append(seen.z[0, :, i])

    twin = Twin(model, composite, watch=watch)
    for prompt in prompts:
        twin.logprobs(prompt)
    return {module: torch.cat(parts) for module, parts in zs.items()}
