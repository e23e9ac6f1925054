from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "router.md").read_text(), re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0], "docs/router.md", "exec"), {"__name__": "example"})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("select ['reverse'] ")
    assert second.startswith("base [] ")
