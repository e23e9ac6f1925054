"""Token-level gates, under the names that `auto:<gate>` uses."""

from __future__ import annotations

import torch

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
