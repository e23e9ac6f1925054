from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from eval.encodings import Remembering
from eval.prompts import Prompts
from eval.routing import (
    CalibrationFailed,
    Outcomes,
    Result,
    RouterSpec,
    confusions,
    experts_of,
    figures_of,
    library_of,
    measure,
    outcomes,
)
from router.encoder import Vectors
from router.library import build
from router.method import Query, decide
from router.methods.retrieval import Retrieval, RetrievalSettings

AXES = np.eye(4, dtype=np.float32)


class Letters:
    """Counts of a, b, c and everything else, of length 1."""

    id, dim = "letters", 4

    def encode(self, texts: Sequence[str]) -> Vectors:
        counts = np.array([[*(t.count(c) for c in "abc"), sum(c not in "abc" for c in t)] for t in texts], np.float32)
        unit: Vectors = counts / np.linalg.norm(counts, axis=1, keepdims=True)
        return unit


PROMPTS = Prompts(
    samples={"a": ("a", "aa"), "b": ("b",), "c": ("c",)},
    test=(("a", "aab"), ("b", "bbbcc"), ("c", "bbc"), ("c", "xxxc"), ("b", "b")),
    ood=(("", "xyz"), ("", "xya"), ("", "ccx")),
)
SPEC = RouterSpec("nearest", "retrieval", {"scoring": "best", "threshold": 0.5})


def measured(spec: RouterSpec, prompts: Prompts = PROMPTS) -> Result:
    return measure(spec, prompts, Remembering(Letters()), resamples=100)


def values(result: Result) -> dict[str, float]:
    return {name: each.value for name, each in result.metrics.items()}


def test_every_figure_on_eight_prompts() -> None:
    result = measured(SPEC)
    found = values(result)
    # In order: right, right, taken by b, right but under the threshold (cosine 1 / sqrt(10)), right.
    assert found["top1"] == pytest.approx(4 / 5)
    assert found["top3"] == 1
    assert found["mrr"] == pytest.approx((4 + 1 / 2) / 5)
    assert found["routed"] == pytest.approx(3 / 5)
    assert found["abstained"] == pytest.approx(1 / 5)
    assert found["false_accepts"] == pytest.approx(1 / 3)
    # Best cosines: .894, .832, .894, .316, 1 against 0, .447, .894.
    assert found["auroc"] == pytest.approx((2.5 + 2 + 2.5 + 1 + 3) / 15)
    assert found["fpr95"] == pytest.approx(2 / 3)
    assert "cluster_top1" not in found
    assert found["p95_ms"] >= found["p50_ms"] > 0
    assert result.confusions == (("c", "b", 1),)
    assert result.fit_s > 0
    for each in result.metrics.values():
        assert each.low <= each.value <= each.high


def test_experts_of_one_cluster_may_stand_for_each_other() -> None:
    prompts = Prompts(PROMPTS.samples, PROMPTS.test, clusters={"b": "letters", "c": "letters"})
    found = values(measured(SPEC, prompts))
    assert found["cluster_top1"] == 1
    assert "auroc" not in found


def test_it_is_the_same_every_time() -> None:
    first, second = (measured(SPEC).metrics for _ in range(2))
    assert all(first[name] == second[name] for name in first if not name.endswith("_ms"))


def test_the_base_model_ranks_nobody_and_rejects_everything() -> None:
    result = measured(RouterSpec("base", "base"))
    found = values(result)
    assert (found["top1"], found["top3"], found["mrr"], found["abstained"], found["false_accepts"]) == (0, 0, 0, 1, 0)
    assert found["auroc"] == 0.5
    assert result.json()["confusions"][0] == {"task": "b", "answered": None, "count": 2}


def test_the_calibration_error_counts_abstentions_out_of_domain_as_right() -> None:
    own = Outcomes(("a",), np.array([1]), ("a",), np.ones(1), np.array([0.9]), np.array([True]))
    other = Outcomes(("", ""), np.zeros(2, int), ("a", "a"), np.zeros(2), np.array([0.7, 0.3]), np.array([False, True]))
    statistic, groups = figures_of(own, other, {})["ece"]
    assert statistic(*(each.everything for each in groups)) == pytest.approx((0.1 + 0.3 + 0.3) / 3)


def test_the_calibration_error_agrees_with_its_definition() -> None:
    rng = np.random.default_rng(0)
    confidence, n = rng.random(500), 500
    right = rng.random(n) < confidence**2
    own = Outcomes(("a",) * n, right.astype(int), ("a",) * n, np.ones(n), confidence, np.ones(n, bool))
    statistic, groups = figures_of(own, Outcomes((), np.zeros(0, int), (), *np.zeros((2, 0)), np.zeros(0, bool)), {})[
        "ece"
    ]
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence >= low) & (confidence < low + 0.1)
        expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert statistic(groups[0].everything) == pytest.approx(expected)


def test_a_router_may_be_calibrated_first() -> None:
    samples = {letter: tuple(letter * n + "x" for n in range(1, 9)) for letter in "abc"}
    prompts = Prompts(samples, (("a", "aaab"), ("b", "bbbc")), ood=(("", "xyz"), ("", "xya")))
    found = [
        measure(RouterSpec("r", "retrieval"), prompts, Remembering(Letters()), far=far, resamples=100).metrics["ece"]
        for far in (None, 0.05)
    ]
    assert found[0].value != found[1].value
    with pytest.raises(CalibrationFailed, match=r"^r: "):
        measure(
            RouterSpec("r", "retrieval"),
            Prompts({"a": ("a",), "b": ("b",)}, PROMPTS.test),
            Remembering(Letters()),
            far=0.05,
        )


def test_outcomes_are_read_from_decisions() -> None:
    library = library_of((("a", "one"), ("b", "two"), ("a", "three"), ("c", "four")), AXES)
    assert [expert.name for expert in library.experts] == ["a", "b", "c"]
    method = Retrieval.fit(library, RetrievalSettings(scoring="best", threshold=0.5))
    everyone = np.ones(3, bool)
    near_c = np.array([0, 0.6, 0, 0.8], np.float32)
    decisions = [
        decide("own", method, library, Query("", vector, everyone)) for vector in (AXES[0], near_c, 0.4 * AXES[3])
    ]
    found = outcomes((("a", ""), ("b", ""), ("c", "")), decisions)
    assert found.rank.tolist() == [1, 2, 1]
    assert found.best == ("a", "c", "c")
    assert found.answered.tolist() == [True, True, False]
    assert found.margin == pytest.approx([0.5, 0.3, -0.1])
    assert confusions(found) == (("b", "c", 1),)


def test_experts_without_samples_stand_for_their_description_or_name() -> None:
    experts = experts_of({"a": ("x",), "b_b": (), "c": ()}, {"c": "the third", "a": "the first"})
    library = build(experts, lambda texts: np.ones((len(texts), 2), np.float32), 2)
    assert library.texts == (("x",), ("b b",), ("the third",))
    assert experts[0].description == "the first"
