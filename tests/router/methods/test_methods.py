from __future__ import annotations

from pathlib import Path

from router.methods import METHODS, methods_table

DOCS = Path(__file__).parents[3] / "docs" / "methods.md"


def test_every_method_stands_in_the_table_with_all_its_fields() -> None:
    header, _, *rows = [line.strip("| ").split(" | ") for line in methods_table().splitlines()]
    assert [row[0] for row in rows] == [f"`{name}`" for name in METHODS]
    assert header[:4] == ["method", "expert training", "expert data", "routing data"]


def test_the_documentation_holds_the_table_and_names_every_setting() -> None:
    text = DOCS.read_text()
    assert methods_table() in text, "run `cog -r docs/methods.md`"
    for method in METHODS.values():
        for setting in method.Settings.model_fields:
            assert f"`{setting}`" in text
