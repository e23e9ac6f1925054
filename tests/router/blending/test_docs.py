from __future__ import annotations

import re
from pathlib import Path

from router.blending import OPERATORS, SEARCHES, operators_table

DOCS = Path(__file__).parents[3] / "docs" / "blending.md"


def test_every_operator_stands_in_the_table_with_what_it_declares() -> None:
    _, _, *rows = [line.strip("|").split("|") for line in operators_table().splitlines()]
    assert [row[0].strip() for row in rows] == [f"`{name}`" for name in (*OPERATORS, *SEARCHES)]
    assert {len(row) for row in rows} == {8}
    by_name = {row[0].strip("` "): [cell.strip() for cell in row] for row in rows}
    assert by_name["dare_ties"][2:7] == ["relative", "truncated", "`density` 0.5", "yes", ""]
    assert by_name["regmean"][3:7] == ["exact", "", "", "gram"]


def test_the_documentation_holds_the_table_a_section_for_each_operator_and_every_setting() -> None:
    text = DOCS.read_text()
    assert operators_table() in text, "run `cog -r docs/blending.md`"
    headings = {name for line in re.findall(r"^### (.*)$", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)}
    assert headings == set(OPERATORS)
    for operator in OPERATORS.values():
        for setting in operator.Settings.model_fields:
            assert f"`{setting}`" in text or f"`{setting}:" in text, setting
