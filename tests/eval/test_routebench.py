from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.intervals import Estimate
from eval.prompts import Prompts
from eval.routebench import TARGETS, figures, half_of, main, prompt_sets, quickstart_set, targets
from eval.routing import Result, RouterSpec
from router.encoder import Vectors


def test_the_halves_share_no_prompt_and_make_the_whole() -> None:
    test = (("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"))
    whole = Prompts({"a": ("x",), "b": ("y",), "c": ("z",)}, test, ood=(("", "p"), ("", "q"), ("", "r")))
    tune, report = half_of(whole, "tune"), half_of(whole, "report")
    assert sorted(tune.test + report.test) == sorted(test)
    assert {task for task, _ in tune.test} == {"a", "c"}
    assert (tune.ood, report.ood) == ((("", "p"), ("", "r")), (("", "q"),))
    assert half_of(whole, "all") == whole
    assert tune.samples == whole.samples


class Ones:
    """Texts are all alike."""

    id, dim = "ones", 2

    def encode(self, texts: Sequence[str]) -> Vectors:
        return np.full((len(texts), 2), 0.5**0.5, np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    forms = {"instance": "i", "brief": "b", "instruct": "d"}
    files: dict[str, list[dict[str, Any]]] = {
        "scale/register": [{"task": task, "instance": task} for task in ("clinc_a", "hwu_a", "t0_a")],
        "scale/test": [{"task": "clinc_a", "instance": "s"}, {"task": "t0_a", "instance": "t"}],
        "ni150/register": [{"task": task, **forms} for task in "nm" for _ in range(6)],
        "ni150/register_zero": [{"task": task, "definition": f"the task {task}"} for task in "nm"],
        "ni150/test": [{"task": "n", **forms}],
        "ni150/tasks": [{"task": "n", "cluster": "n"}],
        "ni150/ood": [{"source": "o", **forms}],
        "flan48/register": [{"task": task, "prompt": "p"} for task in "fg"],
        "flan48/test": [{"task": "f", "prompt": "q"}],
        "paraphrase/prompts": [
            {"task": task, "split": split, "prompt": split} for task in "pq" for split in ("register", "test")
        ],
    }
    for name, rows in files.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_sets_are_read_from_their_folder(folder: Path) -> None:
    sets = {name: read() for name, read in prompt_sets(folder).items()}
    assert set(TARGETS) < set(sets)
    assert sets["ni150 brief"].ood == (("o", "b"),)
    assert sets["ni150 brief, all forms registered"].samples["n"] == ("i", "d") * 6 + ("the task n",)
    assert sets["ni150 brief, all forms registered"].test == (("n", "b"),)
    assert sets["ni150 instance, no sample"].descriptions == {"m": "the task m", "n": "the task n"}
    assert sets["flan48"].ood == (("clinc_a", "s"),)
    assert sets["paraphrase"].samples == {"p": ("register",), "q": ("register",)}
    assert sets["paraphrase"].test == (("p", "test"), ("q", "test"))
    assert list(sets["552 experts, ni150 instance"].samples) == ["clinc_a", "hwu_a", "m", "n", "t0_a"]
    assert sets["voice assistants"].test == (("clinc_a", "s"),)
    assert list(sets["voice assistants"].samples) == ["clinc_a", "hwu_a"]


def test_the_quickstart_set_registers_every_expert_and_tests_the_instruction_told() -> None:
    prompts = quickstart_set()
    tested = {task for task, _ in prompts.test}
    assert len(tested) >= 12
    assert tested < set(prompts.samples)
    assert len(prompts.ood) == 100


def test_tables_say_what_is_reached() -> None:
    def result(name: str, **metrics: float) -> Result:
        return Result(RouterSpec(name, name), {key: Estimate(v, v - 1, v + 1) for key, v in metrics.items()}, (), 0.0)

    results = {
        "flan48": [result("x", top1=0.9, ece=0.1), result("y", top1=0.8, ece=0.2)],
        "voice assistants": [result("x", p50_ms=3, p95_ms=9), result("y", p50_ms=4, p95_ms=8)],
    }
    assert "| flan48 | x | 0.900 |  |  |  |  |  |  |  | 0.100 |" in list(figures("flan48", results["flan48"]))
    assert list(targets(results))[1:] == [
        "| flan48 | top1 | 0.9 | **0.9 [-0.1, 1.9]** | 0.8 [-0.2, 1.8] |",
        "| voice assistants | p50_ms | 3 | **3 [2, 4]** | 4 [3, 5] |",
        "| voice assistants | p95_ms | 8 | 9 [8, 10] | **8 [7, 9]** |",
    ]


def test_the_tables_of_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.routebench.load_encoder", lambda **options: Ones())
    monkeypatch.setattr("eval.routebench.default_folder", lambda: folder)
    out = folder / "out.json"
    main(folder, "all", ["base", "random"], only=["flan48", "voice"], system="Hello.", json_file=out)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| flan48", "base"],
        ["| flan48", "random"],
        ["| voice assistants", "base"],
        ["| voice assistants", "random"],
    ]
    assert lines[6] == ""
    assert lines[9].startswith("| flan48 | top1 | 0.9 | 0 [0, 0] | ")
    assert list(json.loads(out.read_text())["sets"]) == ["flan48", "voice assistants"]
