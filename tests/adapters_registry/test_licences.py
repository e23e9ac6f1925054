"""Notes on licences."""

from __future__ import annotations

import pytest

from adapters_registry.licences import NOTES, notes_on, strictest_first


@pytest.mark.parametrize(
    ("licence", "notes"),
    [
        ("MIT", ()),
        ("apache-2.0", ()),
        ("llama2", ()),
        ("CC-BY-NC-SA-4.0", ("non-commercial", "share-alike")),
        (f"cc-by-nc-n{'d'}-4.0", ("no derivatives", "non-commercial")),
        ("Creative Commons Attribution Non Commercial", ("non-commercial",)),
        ("for research only", ("non-commercial",)),
        ("gpl-3.0", ("share-alike",)),
        ("AGPLv3", ("share-alike",)),
        ("cc-by-sa-4.0", ("share-alike",)),
        ("CC BY No Derivatives", ("no derivatives",)),
        ("Share-Alike", ("share-alike",)),
        ("other", ("unstated",)),
        ("", ("unstated",)),
        ("---", ("unstated",)),
        (None, ("unstated",)),
    ],
)
def test_what_a_licence_asks_for_is_noted(licence: str | None, notes: tuple[str, ...]) -> None:
    assert notes_on(licence) == notes


def test_the_strictest_comes_first() -> None:
    licences = [("a", "mit"), ("b", None), ("c", "gpl"), ("d", "cc-by-nc-sa"), ("e", "by-noderivs"), ("f", "bsd")]
    assert [each.expert for each in strictest_first(licences)] == ["e", "d", "b", "c", "a", "f"]
    assert list(NOTES) == ["no derivatives", "non-commercial", "unstated", "share-alike"]
