"""Which experts belong into one composite when all experts together do not fit the engine's rank.

Every expert goes into exactly one group, and groups into as few composites as this allows, so that all of them can
stay loaded and a decision inside a group costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from router.adapter import Adapter
from router.lowrank import inner_products

Similarity = NDArray[np.float64]  # (n, n), symmetric, 1 for the same


def weight_similarity(adapters: Sequence[Adapter]) -> Similarity:
    """(n, n) cosines of the experts' dW over all modules, as in model-based clustering (MBC, Ostapenko et al. 2024).

    MBC clusters the factors A and B themselves, which depend on how dW happens to be factored; dW does not. It is never
    formed: one product of the stacked factors for each module. An expert that changes nothing is like no other.
    """
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for module in sorted({module for adapter in adapters for module in adapter.modules}):
        total += inner_products([adapter.factors(module) for adapter in adapters])
    return _cosines(total.numpy())


def prototype_similarity(prototypes: Sequence[NDArray[np.float32]]) -> Similarity:
    """(n, n) cosines of the mean prototypes; every expert has a matrix (rows, d)."""
    centroids = np.stack([np.asarray(each, np.float64).mean(0) for each in prototypes])  # (n, d)
    return _cosines(centroids @ centroids.T)


def _cosines(products: Similarity) -> Similarity:
    lengths = np.sqrt(np.diagonal(products))
    lengths = np.where(lengths > 0, lengths, np.inf)
    cosines: Similarity = np.clip(products / lengths[:, None] / lengths, -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def cluster(similarity: Similarity, rows: Sequence[int], max_rank: int, least: float = -np.inf) -> list[list[int]]:
    """Groups of expert numbers; the rows of a group's members sum to at most `max_rank`.

    Average linkage with a capacity: merge the two most similar groups that still fit together, until none do. Any two
    groups that are left are over the limit together, so there are fewer than twice as many as there must be. Groups
    less similar than `least` are not merged. An expert that has more rows than fit is alone. Ties go to the first.
    """
    groups: list[list[int]] = [[i] for i in range(len(rows))]
    totals = np.array(similarity, np.float64)  # sums of similarities between the members of two groups
    size, weight = np.ones(len(rows)), np.asarray(rows, np.float64)

    def links(i: int) -> NDArray[np.float64]:
        """(n,) mean similarity of group i to the groups that it fits with; -inf to others, and to those gone."""
        fits = (size > 0) & (weight[i] + weight <= max_rank)
        fits[i] = False
        return np.where(fits, totals[i] / (size[i] * np.maximum(size, 1)), -np.inf)

    linkage = np.array([links(i) for i in range(len(rows))])
    while linkage.size and np.isfinite(best := linkage.max()) and best >= least:
        i, j = (int(each) for each in np.unravel_index(np.argmax(linkage), linkage.shape))
        groups[i], groups[j] = sorted(groups[i] + groups[j]), []
        totals[i] += totals[j]
        totals[:, i] += totals[:, j]
        size[i], weight[i], size[j] = size[i] + size[j], weight[i] + weight[j], 0
        linkage[j] = linkage[:, j] = -np.inf
        linkage[i] = linkage[:, i] = links(i)
    return sorted(group for group in groups if group)
