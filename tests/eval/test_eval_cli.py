from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from eval.cli import app, specs_of, warnings
from eval.prompts import Prompts
from router.encoder import Vectors
from router.methods import METHODS

Run = Callable[..., Result]
WORDS = ["red", "green", "blue", "grey"]
METRICS = ["top1", "top3", "mrr", "cluster_top1", "auroc", "fpr95", "ece", "p50_ms", "p95_ms"]


class Colours:
    """How often each colour is said, and one for everything."""

    id, dim = "colours", 5

    def encode(self, texts: Sequence[str]) -> Vectors:
        counts = np.array([[*(text.count(word) for word in WORDS), 1] for text in texts], np.float32)
        unit: Vectors = counts / np.linalg.norm(counts, axis=1, keepdims=True)
        return unit


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setattr("router.encoder.load_encoder", lambda *args, **options: Colours())
    monkeypatch.setattr("eval.encodings.default_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: CliRunner().invoke(app, ["routing", "--resamples", "100", *map(str, args)])


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The options for three experts with four samples and four tests each."""
    content = {
        "register": [{"task": w, "instance": f"{w} {n}", "brief": f"say {w} {n}"} for w in WORDS[:3] for n in range(4)],
        "test": [{"task": w, "instance": f"{w} {n}?", "brief": f"{w}!"} for w in WORDS[:3] for n in range(4)],
        "ood": [{"instance": f"grey {n}", "brief": "grey"} for n in range(5)],
        "tasks": [{"task": "red", "cluster": "warm"}, {"task": "blue", "cluster": "cold"}],
    }
    for name, rows in content.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [word for name in content for word in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]


def test_the_result_has_every_metric_with_its_interval_and_says_what_ran(
    run: Run, files: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    result = run(*files, "--router", "retrieval", "--router", "retrieval:scoring=best,threshold=0.9", "--json", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [each["router"] for each in document["results"]] == ["retrieval", "retrieval:scoring=best,threshold=0.9"]
    assert document["results"][1]["settings"] == {"scoring": "best", "threshold": 0.9}
    for each in document["results"]:
        assert set(METRICS) <= set(each["metrics"])
        for figure in each["metrics"].values():
            assert set(figure) == {"value", "low", "high"}
            assert figure["low"] <= figure["value"] <= figure["high"]
        assert each["metrics"]["top1"]["value"] == 1
        assert each["metrics"]["auroc"]["value"] == 1
        assert each["confusions"] == []
    ran = document["ran"]
    assert (ran["experts"], ran["prompts"], ran["ood_prompts"], ran["encoder"]) == (3, 12, 5, "colours")
    register = tmp_path / "register.jsonl"
    assert ran["files"]["register"] == [
        {"file": str(register), "sha256": hashlib.sha256(register.read_bytes()).hexdigest()}
    ]
    assert ran["intervals"]["drawn"] == "prompts"
    assert "1 tasks have no cluster" in result.stderr
    assert "retrieval:scoring=best" in result.stdout


def test_json_to_stdout_is_nothing_else(run: Run, files: list[str]) -> None:
    result = run(*files, "--router", "random", "--json", "-")
    document = json.loads(result.stdout)
    assert document["results"][0]["router"] == "random"
    assert {"task", "answered", "count"} == set(document["results"][0]["confusions"][0])


def test_the_default_is_the_router_that_a_server_uses(run: Run, files: list[str]) -> None:
    from router.router import RouterSettings

    assert json.loads(run(*files, "--json", "-").stdout)["results"][0]["router"] == RouterSettings().method


def test_confusions_are_shown(run: Run, files: list[str]) -> None:
    result = run(*files, "--router", "base")
    assert "base: confusions" in result.stdout
    assert "(none)" in result.stdout


def test_other_forms_may_be_registered(run: Run, files: list[str]) -> None:
    result = run(*files, "--field", "brief", "--register-field", "instance", "--register-field", "brief", "--json", "-")
    ran = json.loads(result.stdout)["ran"]
    assert (ran["field"], ran["register_field"], ran["ood_field"]) == (["brief"], ["instance", "brief"], ["brief"])


@pytest.mark.parametrize("cache", [True, False])
def test_encodings_are_kept_unless_told_otherwise(run: Run, files: list[str], cache: bool, tmp_path: Path) -> None:
    run(*files, *([] if cache else ["--no-cache"]))
    assert (tmp_path / "cache" / "encodings.sqlite").exists() == cache


def test_bad_rows_end_it_by_file_and_line(run: Run, files: list[str], tmp_path: Path) -> None:
    register = tmp_path / "register.jsonl"
    register.write_text(register.read_text() + "\nnonsense\n")
    result = run(*files)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{register}:13: not JSON")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nearest", "No router 'nearest'. There are: "),
        ("arrow", "'arrow' weighs experts inside the model"),
        ("retrieval:scoring=worst", "--router retrieval:scoring=worst: scoring: "),
        ("retrieval:best", "'best' has no '='"),
        ("retrieval:{", "--router retrieval:{: "),
        ("retrieval:wrong=1", "wrong: Extra inputs"),
    ],
)
def test_a_router_that_cannot_be_measured_says_why(run: Run, files: list[str], given: str, told: str) -> None:
    result = run(*files, "--router", given)
    assert result.exit_code == 2
    assert told in result.stderr


def test_settings_are_given_short_or_as_json() -> None:
    assert specs_of("retrieval:k=5,scoring=vote")[0].settings == {"k": 5, "scoring": "vote"}
    assert specs_of('retrieval:{"k": 5}')[0].settings == {"k": 5}
    every = [spec.method for spec in specs_of("all")]
    assert {"retrieval", "random", "base"} <= set(every) < set(METHODS)


def test_where_the_result_cannot_go_is_known_before_anything_is_measured(
    run: Run, files: list[str], tmp_path: Path
) -> None:
    for wrong in (tmp_path, tmp_path / "absent" / "out.json"):
        result = run(*files, "--json", wrong)
        assert (result.exit_code, result.stderr.partition(":")[0]) == (2, f"--json {wrong}")


def test_warnings_name_what_makes_figures_mean_less() -> None:
    prompts = Prompts({"a": ("x",), "b": ()}, (("a", "x"),), left_out={"c": 2}, repeated=1, clusters={"a": "z"})
    assert list(warnings(prompts)) == [
        "2 test prompts are left out: their tasks are not registered (c).",
        "1 of 1 test prompts are samples of their own expert.",
        "1 tasks have no cluster, and count as one each (b).",
    ]


def test_it_is_a_program(tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, "-m", "eval.cli", "routing", "--register", tmp_path / "no", "--test", "no"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "80"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"{tmp_path / 'no'}: No such file or directory"
