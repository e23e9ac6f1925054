"""How a blend is refused."""

from __future__ import annotations

from collections.abc import Iterable


class BlendError(ValueError):
    """A blend that cannot be made, with every reason."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        assert self.reasons, "a refusal needs a reason"
        super().__init__("\n".join(self.reasons))
