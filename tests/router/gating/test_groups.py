from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.adapter import Adapter
from router.groups import cluster, prototype_similarity, weight_similarity
from router.similarity import cosine

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
quick = settings(max_examples=50, deadline=None, derandomize=True)


def test_the_similarity_of_weights_is_the_cosine_of_what_they_add(workshop: Any, make_raw: Any) -> None:
    raw = [
        make_raw(0, 4),
        make_raw(1, [3, 2], (Q, V), rslora=True),
        make_raw(2, 2, (K,)),
        make_raw(3, 2, zero=(Q, K, V)),
    ]
    adapters = [Adapter(part.path) for part in workshop.parts(raw)]
    shapes = {Q: (24, 24), K: (10, 24), V: (10, 24)}
    flat = []
    for expert in raw:
        deltas = [expert.delta(m) if m in expert.factors else torch.zeros(shapes[m]).double() for m in (Q, K, V)]
        flat.append(torch.cat([delta.flatten() for delta in deltas]).numpy())
    found = weight_similarity(adapters)
    for i, one in enumerate(flat):
        for j, other in enumerate(flat):
            lengths = np.linalg.norm(one) * np.linalg.norm(other)
            expected = 1.0 if i == j else (one @ other / lengths if lengths else 0.0)
            assert found[i, j] == pytest.approx(expected, abs=1e-9)
    assert cosine(adapters[0], adapters[1]) == pytest.approx(found[0, 1])


def test_the_same_change_is_found_however_it_is_factored(workshop: Any, make_raw: Any) -> None:
    one, other = make_raw(0, 3), make_raw(0, 3, alpha=1.0)
    random = torch.Generator().manual_seed(1)
    for module, (B, A) in other.factors.items():
        M = torch.randn(3, 3, generator=random)
        other.factors[module] = (B @ M, torch.linalg.inv(M) @ A)
    first, second = (Adapter(part.path) for part in workshop.parts([one, other]))
    assert cosine(first, second) == pytest.approx(1.0, abs=1e-5)


def test_similar_experts_come_together() -> None:
    similarity = np.eye(5)
    for i, j, value in [(0, 3, 0.9), (1, 4, 0.8), (1, 2, 0.7), (2, 4, 0.7)]:
        similarity[i, j] = similarity[j, i] = value
    assert cluster(similarity, [4] * 5, 12) == [[0, 3], [1, 2, 4]]
    assert cluster(similarity, [4] * 5, 8) == [[0, 3], [1, 4], [2]]
    assert cluster(-similarity, [4] * 5, 20) == [[0, 1, 2, 3, 4]]
    assert cluster(similarity, [4] * 5, 20, least=0.5) == [[0, 3], [1, 2, 4]]
    assert cluster(similarity, [4, 16, 4, 4, 4], 12) == [[0, 3], [1], [2, 4]]


def test_no_expert_no_group() -> None:
    assert cluster(np.zeros((0, 0)), [], 64) == []
    assert cluster(np.eye(1), [8], 64) == [[0]]


def test_prototypes_are_compared_by_their_mean() -> None:
    prototypes = [np.array(rows, np.float32) for rows in ([[1, 0], [0, 1]], [[2, 2]], [[1, -1]], [[0, 0]])]
    found = prototype_similarity(prototypes)
    assert found[0, 1] == pytest.approx(1.0)
    assert found[0, 2] == pytest.approx(0.0)
    assert found[3].tolist() == [0.0, 0.0, 0.0, 1.0]


@quick
@given(data=st.data(), n=st.integers(1, 9), limit=st.integers(1, 40))
def test_groups_partition_the_experts_fit_and_cannot_be_merged(data: Any, n: int, limit: int) -> None:
    rows = data.draw(st.lists(st.integers(1, 20), min_size=n, max_size=n))
    vectors = np.random.default_rng(data.draw(st.integers(0, 1000))).standard_normal((n, 4))
    groups = cluster(prototype_similarity(list(vectors[:, None].astype(np.float32))), rows, limit)
    assert sorted(i for group in groups for i in group) == list(range(n))
    totals = [sum(rows[i] for i in group) for group in groups]
    assert all(total <= limit or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    assert all(one + other > limit for k, one in enumerate(totals) for other in totals[k + 1 :])
