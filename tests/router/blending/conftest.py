"""Shared by the tests of blending: what members bring to one module, at random; members as folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from adapters_registry.lora import WEIGHTS
from router.blending.operator import Share
from router.composite import Part

MakeShares = Callable[..., list[Share]]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_shares() -> MakeShares:
    """`make_shares(seed, weights, ranks, d_out, d_in, kind)`: members a, b, c ... of given weights and ranks."""

    def make(
        seed: int,
        weights: Sequence[float],
        ranks: Sequence[int] = (2,),
        d_out: int = 7,
        d_in: int = 6,
        statistic: str | None = None,
    ) -> list[Share]:
        random = torch.Generator().manual_seed(seed)
        shares = []
        for k, weight in enumerate(weights):
            r = ranks[k % len(ranks)]
            inputs = torch.randn(4 * d_in, d_in, generator=random)
            statistics = {
                "gram": inputs.mT @ inputs / len(inputs),
                "fisher": torch.rand(d_out, d_in, generator=random) + 0.1,
            }
            shares.append(
                Share(
                    id="abcdefgh"[k],
                    weight=weight,
                    B=torch.randn(d_out, r, generator=random),
                    A=torch.randn(r, d_in, generator=random),
                    scale=0.5 + k,
                    seed=100 * seed + k,
                    statistic=statistics.get(statistic or ""),
                )
            )
        return shares

    return make


@pytest.fixture(scope="session")
def part() -> Callable[..., Part]:
    """`part(folder, name)`: a folder as a member."""

    def make(folder: Path, name: str | None = None, **fields: object) -> Part:
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        return Part(id=name or f"{folder.name}@{digest[:12]}", digest=digest, path=folder, **fields)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def parts(adapters: list[Path], part: Callable[..., Part]) -> list[Part]:
    """Four members with different content, rank 4, on q_proj and v_proj of two layers."""
    return [part(folder) for folder in adapters]
