"""What a licence asks of whoever blends: notes on the strings that experts carry. No legal advice."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapters_registry.expert import Frozen, Text

#: Strictest first; each with the words of a licence's name that it is known by.
NOTES = {
    "no derivatives": re.compile(r"n[d]|noderiv\w*"),  # in brackets, as spelling checkers would add an a
    "non-commercial": re.compile(r"nc|noncommercial|research"),
    "unstated": re.compile(r"|other|unknown|none"),
    "share-alike": re.compile(r"sa|sharealike|[al]?gpl(v?\d+)?|copyleft"),
}


class LicenceNote(Frozen):
    """A member's licence, None when it is unstated, and those of `NOTES` that hold."""

    expert: str
    licence: Text | None
    notes: tuple[str, ...]


def notes_on(licence: str | None) -> tuple[str, ...]:
    """`cc-by-nc-sa-4.0` -> non-commercial, share-alike."""
    text = re.sub(r"\b(non|no|share)[\s_-]+(commercial|derivatives|alike)", r"\1\2", (licence or "").casefold())
    words = [word for word in re.split(r"[\W_]+", text) if word] or [""]
    return tuple(note for note, pattern in NOTES.items() if any(map(pattern.fullmatch, words)))


def strictest_first(licences: Iterable[tuple[str, str | None]]) -> list[LicenceNote]:
    """(expert, licence) of every member -> notes; experts of equal strictness by name."""
    order = list(NOTES)
    found = [LicenceNote(expert=expert, licence=licence, notes=notes_on(licence)) for expert, licence in licences]
    return sorted(found, key=lambda each: (min(map(order.index, each.notes), default=len(order)), each.expert))
