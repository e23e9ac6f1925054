"""Adapters with random weights, as large as an expert's: what of an expert's gain comes from being changed at all?"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters_registry.lora import CONFIG, WEIGHTS
from router.blending.plan import Source
from router.lowrank import Factors, inner_products


def random_weights(expert: Path, out: Path, seed: int) -> Path:
    """A PEFT folder with an expert's configuration, shapes and precision, and weights that nobody trained.

    A is drawn as PEFT draws it, B, which PEFT begins with zeros, from a normal distribution; B is then scaled so that
    in every module dW = B A has the Frobenius norm of the expert's. The same seed gives the same bytes. `out` appears
    when it is complete; what was there is replaced.
    """
    source = Source(expert)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in sorted(source.adapted):
        stored = Factors(*source.stored(module))
        drawn = Factors(
            B=torch.randn(stored.B.shape, generator=generator),
            A=nn.init.kaiming_uniform_(torch.empty(stored.A.shape), a=math.sqrt(5), generator=generator),
        )
        for side, tensor, like in (("A", drawn.A, stored.A), ("B", drawn.B * (norm(stored) / norm(drawn)), stored.B)):
            name, _ = getattr(source.names, side)[module]
            tensors[name] = tensor.to(like.dtype).contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        shutil.copyfile(expert / CONFIG, draft / CONFIG)
        save_file(tensors, draft / WEIGHTS)
        draft.chmod(0o755)  # mkdtemp's is private
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return out


def norm(factors: Factors) -> float:
    """Frobenius norm of B A, from products of its factors alone."""
    return float(inner_products([Factors(factors.B.double(), factors.A.double())])[0, 0].clamp(min=0).sqrt())
