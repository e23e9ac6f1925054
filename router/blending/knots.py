"""KnOTS: merge in a basis that all members share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from router.blending.elementwise import Electing, Pruned, elect, keep_largest
from router.blending.operator import Operator, Share
from router.lowrank import Factors, svd, triangle
from router.taxonomy import Reference


class KnOTS(Operator):
    """[dW_1 ... dW_n] = U S [V_1^T ... V_n^T]; the V_i^T are merged by TIES, and U S V^T is the result.

    Only a rank r of directions, the members' ranks summed, has S above zero, and V_i^T = S^-1 U^T dW_i, (r, d_in): in
    low rank throughout. The side-by-side matrix is B diag(A_1, ..., A_n) with B = [s_1 B_1 ... s_n B_n].
    """

    class Settings(Pruned, Electing):
        pass

    formula = "U S TIES(V_1 ... V_n) of the SVD of [dW_1 ... dW_n]"
    reference = Reference(title="KnOTS (Stoica et al. 2025)", url="https://arxiv.org/abs/2410.19735")
    exact = True
    relative = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        parts = [share.factors for share in shares]
        B = torch.cat([part.B for part in parts], 1).double()  # (d_out, r)
        # B diag(A_i) has the left singular vectors and values of B diag(R_i^T), with A_i^T = Q_i R_i.
        R: Tensor = torch.block_diag(*(triangle(part.A.double().mT).mT for part in parts))  # type: ignore[no-untyped-call]
        shared = svd(Factors(B=B, A=R))
        US = shared.U * shared.S  # (d_out, r)
        inverse = torch.where(shared.S > 0, 1 / shared.S, 0.0)[:, None]
        basis = inverse * shared.U.mT  # (r, d_out)
        aligned = [keep_largest((basis @ part.B) @ part.A, self.settings.density) for part in parts]
        return Factors(B=US, A=elect(aligned, [share.weight for share in shares], self.settings.mean))
