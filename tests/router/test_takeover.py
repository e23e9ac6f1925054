from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from adapters_registry.expert import Expert
from router import takeover as module
from router.encoder import Vectors
from router.library import Library, build
from router.takeover import SAME, Takeover, takeover

MakeExpert = Callable[..., Expert]
DIM, SAMPLES = 24, 10
NAMES = ("add", "count", "list", "rhyme", "sort")
LIMIT = 0.25


def around(axis: int, n: int, seed: int, noise: float = 0.12) -> Vectors:
    """(n, DIM) unit rows near one axis: prompts of one task."""
    rows = noise * np.random.default_rng(seed).standard_normal((n, DIM))
    rows[:, axis] += 1
    scaled: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


@pytest.fixture
def library(make_expert: MakeExpert) -> Library:
    groups = {name: around(k, SAMPLES, seed=k) for k, name in enumerate(NAMES)}
    experts = [make_expert(name, "a sample") for name in groups]
    stored = {expert.id: groups[expert.name] for expert in experts}
    return build(experts, lambda texts: np.zeros((0, DIM), np.float32), DIM, stored=stored)


def by_loop(library: Library, vectors: Vectors) -> tuple[dict[str, tuple[int, int]], int]:
    """The slow twin: every sample asked of a router without it, with and without the newcomer, by both rules."""
    groups = {expert.name: list(group) for expert, group in zip(library.experts, library.prototypes, strict=True)}
    lost: dict[str, list[list[bool]]] = {name: [] for name in groups}
    for name, group in groups.items():
        for j, sample in enumerate(group):
            there = {**groups, name: group[:j] + group[j + 1 :]}
            copied = any(float(sample @ each) >= SAME for each in vectors)
            new = [each for each in vectors if float(sample @ each) < SAME]
            row = []
            for rule in (centroid, nearest):
                scores = {other: rule(rows, sample) for other, rows in there.items()}
                mine = max(scores, key=lambda other: scores[other]) == name
                row.append(bool(new) and mine and rule(new, sample) > max(scores.values()))
            lost[name].append([*row, copied])
    counts = {name: np.array(rows).sum(axis=0).tolist() for name, rows in lost.items()}
    return {name: (max(a, b), c) for name, (a, b, c) in counts.items() if max(a, b, c)}, sum(map(len, lost.values()))


def centroid(rows: list[Vectors], sample: Vectors) -> float:
    total = np.sum(rows, axis=0, dtype=np.float64)
    return float(total @ sample / np.linalg.norm(total))


def nearest(rows: list[Vectors], sample: Vectors) -> float:
    return max(float(row @ sample) for row in rows)


@pytest.mark.parametrize("block", [512, 3])
@pytest.mark.parametrize("seed", range(4))
def test_what_changes_hands_is_what_a_loop_finds(
    library: Library, seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    rng = np.random.default_rng(seed)
    vectors = np.concatenate([around(k, 4, seed=seed + k, noise=0.1) for k in rng.integers(0, 5, 6)])
    vectors = np.concatenate([vectors, library.prototypes[1][:2]])
    found = takeover(library, "new", vectors)
    slow, samples = by_loop(library, vectors)
    assert found.samples == samples
    assert {loss.expert: (loss.captured, loss.copied) for loss in found.losses} == slow


def test_everybody_s_prompts_are_a_takeover(library: Library) -> None:
    copied = takeover(library, "poison", np.concatenate(library.prototypes))
    assert copied.value == 1
    assert "'add' (of 10 samples" in str(copied)
    assert "10 are its own too" in str(copied)
    fresh = np.concatenate([around(k, 60, seed=100 + k, noise=0.05) for k in range(5)])
    assert takeover(library, "poison", fresh).value > LIMIT  # no sample is anybody's, but they are nearer


def test_the_same_task_twice_is_told_and_is_no_takeover(library: Library) -> None:
    twin = takeover(library, "twin", around(2, SAMPLES, seed=77))
    assert twin.value == 0
    assert [loss.expert for loss in twin.losses] == ["list"]
    copy = takeover(library, "copy", library.prototypes[2])
    assert copy.value == 0
    assert copy.losses[0].copied == SAMPLES


def test_a_third_expert_for_one_task_is_no_takeover_either(make_expert: MakeExpert) -> None:
    groups = {"a": around(0, SAMPLES, 1), "b": around(0, SAMPLES, 2), "c": around(1, SAMPLES, 3)}
    experts = [make_expert(name, "a sample") for name in groups]
    stored = {expert.id: groups[expert.name] for expert in experts}
    library = build(experts, lambda texts: np.zeros((0, DIM), np.float32), DIM, stored=stored)
    both = takeover(library, "third", np.concatenate([groups["a"], groups["b"]]))
    assert [loss.share for loss in both.losses] == [1, 1]
    assert both.value == 0
    assert takeover(library, "all", np.concatenate(list(groups.values()))).value == 1


def test_another_task_takes_nothing(library: Library) -> None:
    found = takeover(library, "new", around(10, SAMPLES, seed=5))
    assert found == Takeover((), 5 * SAMPLES, 0.0, 0.0)
    assert str(found) == "takes none of 50 held-out samples of other experts"


def test_an_older_version_and_experts_of_others_do_not_count(library: Library) -> None:
    assert takeover(library, "list", library.prototypes[2]).losses == ()
    among = np.array([True, False, False, True, True])
    found = takeover(library, "poison", np.concatenate(library.prototypes), among)
    assert {loss.expert for loss in found.losses} == {"add", "rhyme", "sort"}


def test_one_sample_proves_nothing(library: Library) -> None:
    one = np.stack([group[0] for group in library.prototypes])
    found = takeover(library, "one-of-each", one)
    assert len(found.losses) == 5
    assert found.value == 0


@pytest.mark.parametrize("vectors", [np.zeros((0, DIM), np.float32), np.zeros((2, DIM), np.float32)])
def test_nothing_to_compare_is_no_takeover(library: Library, vectors: Vectors) -> None:
    assert takeover(library, "new", vectors).samples == 0


def test_the_first_expert_takes_nothing() -> None:
    empty = build([], lambda texts: np.zeros((0, DIM), np.float32), DIM)
    assert takeover(empty, "first", around(0, 3, 0)).value == 0


def test_what_inner_layers_say_does_not_count(library: Library) -> None:
    """An encoder's vectors may be longer than its sentence embeddings, which stand first."""
    rng = np.random.default_rng(0)

    def longer(rows: Vectors) -> Vectors:
        inner = rng.standard_normal(rows.shape)
        wide: Vectors = np.concatenate([rows, inner / np.linalg.norm(inner, axis=1, keepdims=True)], 1) / np.sqrt(2)
        return wide.astype(np.float32)

    wide = replace(
        library, dim=2 * DIM, head=DIM, registered=(), prototypes=tuple(longer(rows) for rows in library.prototypes)
    )
    newcomer = np.concatenate([around(2, 6, seed=77), library.prototypes[1]])
    found, same = takeover(wide, "new", longer(newcomer)), takeover(library, "new", newcomer)
    assert (found.losses, found.value) == (same.losses, same.value)
