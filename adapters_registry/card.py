"""What a model card says about an adapter, for everything that the caller left open."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

# What PEFT's template says of every adapter.
TEMPLATE = ("Use the code below", "Users (both direct", "Carbon emissions can be estimated")


@dataclass(frozen=True)
class Card:
    """The parts of a model card that the registry keeps. Nothing is certain: cards are written by hand."""

    base_model: str | None = None
    licence: str | None = None
    training_data: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    description: str = ""


def read_card(file: Path) -> Card:
    """Parse a README.md; a missing or unreadable one is an empty card, never an error."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    except FileNotFoundError:
        return Card()
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError):
        return Card(description=_first_paragraph(text))
    data: dict[str, object] = card.data.to_dict()  # type: ignore[no-untyped-call]
    licence = data.get("license")
    if licence == "other" and data.get("license_name"):
        licence = data["license_name"]
    return Card(
        base_model=next(iter(_strings(data.get("base_model"))), None),
        licence=licence if isinstance(licence, str) else None,
        training_data=_strings(data.get("datasets")),
        # `base_model:...` tags are the Hub's own bookkeeping.
        tags=tuple(tag for tag in _strings(data.get("tags")) if not tag.startswith("base_model:")),
        description=_first_paragraph(card.text),
    )


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    return tuple(each for each in value if isinstance(each, str) and each) if isinstance(value, list) else ()


def _first_paragraph(markdown: str, most: int = 1000) -> str:
    """The first block of prose: no heading, list, table, quote, image, code or HTML, and none of PEFT's template."""
    prose = re.sub(r"<!--.*?-->|```.*?(```|\Z)", "", markdown, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", prose):
        lines = [line for line in block.strip().splitlines() if not line.startswith("#")]
        text = " ".join(" ".join(lines).split())
        unfilled = "more information needed" in text.lower() or text.startswith(TEMPLATE)
        label = re.fullmatch(r"\*\*[^*]*:\*\*", text)
        if text and not unfilled and not label and not text.startswith(("- ", "* ", "|", "<", ">", "![", "[![", "---")):
            return text[:most]
    return ""
