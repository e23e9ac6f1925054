"""`moerge blend search`: weights that are found, stored, and told of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from adapters_registry.registry import Registry
from router.blending import blend_digest
from router.composite import Part

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = Path("eval/testbed/data/samples")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """What `uppercase` is for."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((SAMPLES / "uppercase.jsonl").read_text().splitlines(keepends=True)[4:12]))
    return path


@pytest.fixture
def search(offline: Any, labelled: Path) -> Callable[..., Result]:
    def run(name: str, *words: str, rows: Path = labelled) -> Result:
        experts = () if "--experts" in words else ("--experts", "uppercase, vowels,json")
        return offline("blend", "search", name, *experts, "--labelled", str(rows), *words)

    return run


def test_a_soup_keeps_who_helps_and_is_stored_with_how_it_was_found(
    search: Callable[..., Result], registry: Registry
) -> None:
    result = search("shout", "--description", "Loud.", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    blend = registry.blends.get("shout")
    assert told["weights"] == {each.expert: each.weight for each in blend.members}
    assert told["weights"]["uppercase"] == 1 / len(told["weights"])
    assert told["judged"]["found"]["loss"] <= told["judged"]["uniform"]["loss"] < told["judged"]["base"]["loss"]
    assert (blend.operator, blend.description, blend.id) == ("cat", "Loud.", told["id"])
    assert blend.search["method"] == "soup"
    assert "seed" not in blend.search
    assert blend.search["rows"] == 8
    assert blend.search["judged"] == told["judged"]
    assert blend.report["rank"] > 0
    parts = [Part(each.id, each.digest, Path()) for each in blend.members]
    assert blend.digest == blend_digest(parts, [each.weight for each in blend.members], max_rank=64)


def test_lorahub_depends_on_its_seed(search: Callable[..., Result], registry: Registry) -> None:
    for name, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        result = search(name, "--method", "lorahub", "--steps", "8", "--seed", seed)
        assert result.exit_code == 0, result.output
        assert f"{name} (blend:" in result.stdout
    one, two, three = (registry.blends.get(name) for name in ("one", "two", "three"))
    assert one.digest == two.digest != three.digest
    assert one.search == two.search
    assert (one.search["evaluations"], one.search["seed"]) == (8, 0)


def test_nothing_is_stored_that_is_no_better_than_the_base_model(
    search: Callable[..., Result], registry: Registry
) -> None:
    result = search("nothing", "--method", "lorahub", "--steps", "1")  # no weights: where it begins
    assert result.exit_code == 1
    assert "better than the base model" in result.stderr
    assert registry.blends.list() == []


def test_an_operator_is_searched_with_its_statistics(
    search: Callable[..., Result], offline: Any, registry: Registry
) -> None:
    words = ("--experts", "uppercase,vowels", "--operator", "regmean", "--set", "shrink=0.5")
    refused = search("mean", *words)
    assert refused.exit_code == 1
    assert "'gram' statistics" in refused.stderr
    assert offline("expert", "stats", "uppercase", "vowels", "--kind", "gram").exit_code == 0
    result = search("mean", *words)
    assert result.exit_code == 0, result.output
    assert registry.blends.get("mean").settings == {"shrink": 0.5}


def test_a_name_that_is_taken_is_told_before_the_search(search: Callable[..., Result], registry: Registry) -> None:
    assert search("shout").exit_code == 0
    before = registry.blends.get("shout")
    again = search("shout", "--experts", "vowels,uppercase")
    assert again.exit_code == 1
    assert "already taken" in again.stderr
    assert registry.blends.get("shout") == before
    assert search("shout", "--experts", "vowels,uppercase", "--replace").exit_code == 0
    assert "by an expert" in search("json").stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--experts", "uppercase"], "at least two experts"),
        (["--experts", "uppercase,uppercase"], "at least two experts, each once"),
        (["--experts", "uppercase,nobody"], "No expert 'nobody'. Registered: json, uppercase, vowels."),
        (["--method", "guess"], "No search 'guess'. There are: soup, lorahub."),
        (["--metric", "taste"], "No metric 'taste'. There are: likelihood, exact."),
        (["--operator", "stir"], "No operator 'stir'."),
        (["--operator", "ties", "--set", "density=2"], "setting density"),
        (["--set", "density"], "write for example --set density=0.3"),
    ],
)
def test_mistakes_are_one_message_and_store_nothing(
    search: Callable[..., Result], registry: Registry, words: list[str], complaint: str
) -> None:
    result = search("wrong", *words)
    assert result.exit_code == 1
    assert complaint in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert registry.blends.list() == []


def test_bad_rows_are_told_by_file_and_line(search: Callable[..., Result], registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "A"}\n{"prompt": "b"}\n')
    result = search("wrong", rows=path)
    assert result.exit_code == 1
    assert f"{path}:2: it has no 'answer'" in result.stderr
    assert "No such file" in search("wrong", rows=tmp_path / "absent").stderr
    assert registry.blends.list() == []


def test_an_interruption_stores_nothing(
    search: Callable[..., Result], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving import labelled

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(labelled.Judge, "__call__", interrupted)
    result = search("wrong")
    assert result.exit_code == 130
    assert registry.blends.list() == []
