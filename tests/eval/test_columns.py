from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from cachetools import LRUCache
from hypothesis import given
from hypothesis import strategies as st

from eval.columns import columns_of, loads
from eval.records import NotARun, Record, read_records
from tests.eval.runs import made, records_of

SEQUENCES = st.lists(st.integers(-1, 8), max_size=60)


@given(SEQUENCES, st.integers(1, 6))
def test_loads_are_the_misses_of_an_lru_cache(adapters: list[int], resident: int) -> None:
    @lru_cache(maxsize=resident)
    def functools_loads(adapter: int) -> int:
        return adapter

    cache: LRUCache[int, int] = LRUCache(resident)
    missed = 0
    for adapter in adapters:
        if adapter >= 0:
            functools_loads(adapter)
            missed += adapter not in cache
            cache[adapter] = cache.get(adapter, adapter)
    assert loads(adapters, resident) == functools_loads.cache_info().misses == missed


def test_records_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    records = list(records_of())
    columns = columns_of(read_records(made(tmp_path / "run", records)))
    rows = [record for record in records if not record.router.startswith("expert:")]
    assert len(columns) == len(rows)
    assert [columns.routers[number] for number in columns.ints("router")] == [record.router for record in rows]
    assert [columns.examples[n].id for n in columns.ints("example")] == [record.example for record in rows]
    scores = [np.nan if record.score is None else record.score for record in rows]
    np.testing.assert_array_equal(columns["score"], scores)
    waited = [(record.answer_ms or np.nan) + (record.route_ms or 0) for record in rows]
    np.testing.assert_allclose(columns["latency"], waited)


def test_reading_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.columns.EVERY", 100)
    told: list[tuple[str, int, int]] = []
    records = list(records_of())[:250]
    columns_of(records, lambda *each: told.append(each), expected=220)
    assert told == [("reading records", 0, 220), ("reading records", 100, 220), ("reading records", 200, 220)]


def test_an_example_that_only_the_matrix_has_is_one() -> None:
    columns = columns_of([Record(router="expert:add", regime="in-distribution", example="add/0", task="add")])
    assert len(columns) == 0
    assert [example.id for example in columns.examples] == ["add/0"]


def test_a_record_that_is_there_twice_is_named() -> None:
    records = list(records_of())
    with pytest.raises(NotARun, match=r"1 records are there twice, the first of add/1 under base, in-distribution"):
        columns_of([*records, records[1]])


def test_what_an_unknown_server_did_is_not_called_abstaining() -> None:
    told = {"regime": "in-distribution", "example": "a/0", "task": "a"}
    records = [Record(router=f"r{n}", kind=kind, **told) for n, kind in enumerate(("base", "select", "model"))]
    np.testing.assert_array_equal(columns_of(records)["base"], [1, 0, np.nan])


def test_records_of_some_examples_are_those_of_a_run_with_no_others() -> None:
    records = list(records_of())
    columns = columns_of(records)
    fewer = columns.about([example.task == "reverse" for example in columns.examples])
    alone = columns_of(record for record in records if record.task == "reverse")
    assert fewer.examples == alone.examples
    for name in ("router", "regime", "example", "score", "latency", "tokens"):
        np.testing.assert_array_equal(fewer[name], alone[name])
