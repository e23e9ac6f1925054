"""Token-level gates, under the names that `auto:<gate>` uses."""

from __future__ import annotations

from router.gating.arrow import Arrow
from router.gating.gate import Gate
from router.gating.layout import Layout

GATES: dict[str, type[Gate]] = {
    "arrow": Arrow,
}


def gate_of(layout: Layout) -> Gate:
    """The gate that a composite's layout names. Raises KeyError, or ValidationError for settings it has not."""
    return GATES[layout.gate](layout)
