"""SpectR: the expert that would change the module's output most."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from router.gating.gate import WEIGHTS_ONLY, GateSettings, ScoreGate, Settings, Step, Table
from router.gating.layout import Form, Layout
from router.taxonomy import Reference, Taxonomy


class SpectRSettings(GateSettings):
    """singular_values  True: the length of the output, as in SpectR; False: of the input's part in the span of the
    expert's directions, all of which count the same, as in LAG's text
    """

    singular_values: bool = True


class SpectR(ScoreGate):
    """s_k = |s_k B_k A_k x| = |s_k S_k V_k^T x|, for U_k keeps lengths; or |V_k^T x|.

    In scaled form block k of z is s_k S_k V_k^T x, in unit form V_k^T x.
    """

    equation: ClassVar[str] = "`norm(s_k B_k A_k x)`; LAG's variant `norm(V_kᵀ x)`"
    reads: ClassVar[str] = "length of block k"
    taxonomy: ClassVar[Taxonomy] = replace(
        WEIGHTS_ONLY,
        reference=Reference(title="SpectR (Fleshman and Van Durme 2025)", url="https://arxiv.org/abs/2504.03454"),
    )
    Settings: ClassVar[type[Settings]] = SpectRSettings

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        self.form: Form
        self.name, self.form = ("spectr", "scaled") if self.settings.singular_values else ("span", "unit")

    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        return self.blocks.norms(z)
