"""Decisions and what users thought of them, on each kind of database."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters_registry.base import BaseSpec
from adapters_registry.errors import DecisionNotFound
from adapters_registry.feedback import Decided
from adapters_registry.models import now
from adapters_registry.registry import Registry

Decide = Callable[..., Decided]


@pytest.fixture
def decided() -> Decide:
    def make(name: str, **fields: Any) -> Decided:
        given: dict[str, Any] = {
            "at": now(),
            "tenant": "ann",
            "method": "retrieval",
            "kind": "select",
            "experts": [{"expert": "a", "id": "a@1", "weight": 1.0}],
            "candidates": [{"expert": "a", "score": 0.5}],
            "confidence": 0.9,
            "router": 3,
            "encoder": "minilm",
            "vector": np.array([0.6, 0.8], np.float32),
        }
        return Decided(id=name, **{**given, **fields})

    return make


def test_a_decision_is_read_as_it_was_written(registry: Registry, decided: Decide) -> None:
    before, written = registry.generation(), decided("dec-1", text="Spell it, ünïcode 🎉 and a \0 in it")
    registry.decisions.add([written, decided("dec-2", vector=np.zeros(0, np.float32), tenant=None)])
    read = registry.decisions.get("dec-1", "ann")
    for name in set(Decided.__dataclass_fields__) - {"vector", "text"}:
        assert getattr(read, name) == getattr(written, name)
    np.testing.assert_allclose(read.vector, written.vector, rtol=1e-3)
    assert read.text == "Spell it, ünïcode 🎉 and a   in it"
    assert registry.decisions.get("dec-2").vector.shape == (0,)
    assert registry.generation() == before, "nothing that is served has changed"


def test_the_last_word_counts(registry: Registry, decided: Decide) -> None:
    registry.decisions.add([decided("dec-1"), decided("dec-2")])
    assert registry.decisions.rated() == []
    first = registry.decisions.rate("dec-1", 1.0, comment="well done", tenant="ann")
    again = registry.decisions.rate("dec-1", 1.0, comment="well done", tenant="ann")
    assert again.rated_at == first.rated_at is not None, "said twice, it is said once"
    registry.decisions.rate("dec-2", 0.5, tenant="ann")
    registry.decisions.rate("dec-1", 0.0, tenant="ann")
    assert [(each.id, each.score, each.comment) for each in registry.decisions.rated()] == [
        ("dec-2", 0.5, None),
        ("dec-1", 0.0, None),
    ]


def test_another_tenants_decision_does_not_exist(registry: Registry, decided: Decide) -> None:
    registry.decisions.add([decided("dec-1"), decided("operators", tenant=None)])
    for name, tenant in (("dec-1", "bob"), ("operators", "ann"), ("dec-9", "ann"), ("dec-9", None)):
        with pytest.raises(DecisionNotFound, match=f"no decision '{name}'") as error:
            registry.decisions.rate(name, 1.0, tenant=tenant)
        assert str(error.value).count("ann") == 0
    assert registry.decisions.rate("dec-1", 1.0).score == 1.0, "the operator may"


@pytest.mark.parametrize("score", [-0.01, 1.01, float("nan"), float("inf")])
def test_what_is_no_score_is_refused(registry: Registry, decided: Decide, score: float) -> None:
    registry.decisions.add([decided("dec-1")])
    with pytest.raises(ValueError, match="from 0"):
        registry.decisions.rate("dec-1", score)
    assert registry.decisions.rated() == []


def test_the_oldest_are_forgotten_and_judged_ones_later(registry: Registry, decided: Decide) -> None:
    registry.decisions.add([decided("ancient", at=now() - timedelta(days=8))])
    registry.decisions.add([decided(f"dec-{k}") for k in range(10)])
    for k in range(5):
        registry.decisions.rate(f"dec-{k}", 1.0)
    assert registry.decisions.forget(keep=3, days=7) == 1 + 2 + 2
    assert [each.id for each in registry.decisions.rated()] == ["dec-2", "dec-3", "dec-4"]
    assert registry.decisions.count() == 6
    assert registry.decisions.get("dec-9")
    assert registry.decisions.forget(keep=3, days=7) == 0


def test_what_was_said_survives_a_restart(
    tmp_path: Path, base: BaseSpec, decided: Decide, database_url: str | None
) -> None:
    with Registry.open(tmp_path / "data", url=database_url, base=base) as registry:
        registry.decisions.add([decided("dec-1")])
        registry.decisions.rate("dec-1", 0.25)
    with Registry.open(tmp_path / "data", url=database_url, base=base) as registry:
        assert [each.score for each in registry.decisions.rated()] == [0.25]
