from __future__ import annotations

import re
from pathlib import Path

import pytest

from router.gating import GATES, gates_table

TEXT = (Path(__file__).parents[3] / "docs" / "token-level-routing.md").read_text()


def test_the_documentation_holds_the_table_and_names_every_setting() -> None:
    assert gates_table() in TEXT, "run `cog -r docs/token-level-routing.md`"
    for name, gate in GATES.items():
        assert f"`{name}`" in TEXT
        for setting in gate.Settings.model_fields:
            assert f"| `{setting}` |" in TEXT


def test_every_gate_stands_in_the_table_with_what_it_needs() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", gates_table(), re.MULTILINE))
    assert list(rows) == [*GATES, "genknowsub"]
    assert [name for name, row in rows.items() if "trained vector" in row] == ["phatgoose", "meteora"]
    assert [name for name, row in rows.items() if "a calibration" in row] == ["evidence", "probe"]


def test_the_example_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, "docs/token-level-routing.md", "exec"), names)
    assert f"# {capsys.readouterr().out}" in code
    weights = names["weights"]
    assert weights.sum(-1).tolist() == [[pytest.approx(1.0)]] * 5  # type: ignore[attr-defined]
