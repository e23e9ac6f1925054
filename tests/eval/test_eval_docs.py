"""The page about evaluation says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from eval.prompts import Prompts
from eval.routing import Outcomes, figures_of

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_every_figure_is_explained_and_no_other() -> None:
    empty = Outcomes(("a",), np.ones(1, int), ("a",), np.ones(1), np.ones(1), np.array([True]))
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert explained == {*figures_of(empty, empty, {"a": "x"}), "p50_ms", "p95_ms"}


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = Prompts(
        {"a": ("reverse this", "reverse that"), "b": ("add 1 and 2",)}, (("a", "reverse it"), ("b", "add 2 and 2"))
    )
    registered = [{"task": task, "instance": text} for task, texts in prompts.samples.items() for text in texts]
    tested = [{"task": task, "instance": text} for task, text in prompts.test]
    for name, rows in (("register", registered), ("test", tested)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0], "docs/evaluation.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == "Estimate(value=1.0, low=1.0, high=1.0)\n"
