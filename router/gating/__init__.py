"""Token-level gates, under the names that `auto:<gate>` uses."""

from __future__ import annotations

import torch

from router.gating import genknowsub
from router.gating.arrow import Arrow
from router.gating.constant import Constant
from router.gating.evidence import Evidence, Probe
from router.gating.gate import Gate
from router.gating.hilora import HiLoRA
from router.gating.lag import LAG
from router.gating.layout import Layout
from router.gating.meteora import Meteora
from router.gating.phatgoose import Phatgoose
from router.gating.smile import Smile
from router.gating.spectr import SpectR
from router.taxonomy import Taxonomy

GATES: dict[str, type[Gate]] = {
    "arrow": Arrow,
    "spectr": SpectR,
    "lag": LAG,
    "smile": Smile,
    "phatgoose": Phatgoose,
    "meteora": Meteora,
    "hilora": HiLoRA,
    "constant": Constant,
    "evidence": Evidence,
    "probe": Probe,
}


def gate_of(layout: Layout, device: torch.device | str = "cpu") -> Gate:
    """The gate that a composite's layout names.

    Raises KeyError for a name it does not know, and ValueError for settings that the gate has not or cannot take.
    """
    return GATES[layout.gate](layout, device)


def gates_table() -> str:
    """What every gate declares about itself, as a Markdown table: one row to a gate, and GenKnowSub's preparation."""
    head = ["gate", "score of expert k", "read from the buffer", "form", "an expert brings", "selection", "reference"]
    rows = [head, ["---"] * len(head)]
    rows += [
        [f"`{name}`", gate.equation, gate.reads, gate.form, _needs(gate), gate.taxonomy.selection, _cite(gate.taxonomy)]
        for name, gate in GATES.items()
    ]
    prepared = ["`genknowsub`", genknowsub.EQUATION, "as the gate", "as the gate", "nothing"]
    rows.append([*prepared, genknowsub.TAXONOMY.selection, _cite(genknowsub.TAXONOMY)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _needs(gate: type[Gate]) -> str:
    if gate.extra:
        return "a trained vector for each module"
    return "a calibration" if issubclass(gate, Probe) else "nothing"


def _cite(taxonomy: Taxonomy) -> str:
    reference = taxonomy.reference
    return "this project" if reference is None else f"[{reference.title}]({reference.url})"
