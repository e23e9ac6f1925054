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

    Only r directions, at most as many as the members' ranks together, have S above zero; V_i^T = S^-1 U^T dW_i is
    (r, d_in): in low rank throughout. The side-by-side matrix is B diag(A_1, ..., A_n) with B = [s_1 B_1 ... s_n B_n].
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
        U, S, _ = svd(Factors(B=B, A=R))
        S = S[S > 0]
        U = U[:, : len(S)]
        basis = (U / S).mT  # (r, d_out): S^-1 U^T
        aligned = [keep_largest((basis @ part.B) @ part.A, self.settings.density) for part in parts]
        return Factors(B=U * S, A=elect(aligned, [share.weight for share in shares], self.settings.mean))
