"""What a metric is, and the one for prompts that have no right answer."""

from __future__ import annotations

import math
from typing import Literal, Protocol

from eval.asking import Reply
from eval.examples import Example

Needs = Literal["text", "choices", "likelihood", "code", "nothing"]


class CannotScore(Exception):
    """The example lacks what the metric needs, the reply what was asked for, or running programs is not allowed."""


class Metric(Protocol):
    """needs   what is asked of an engine: texts (`text`, `code`), log-likelihoods of `asks` (`choices`, `likelihood`)

    Scores are pure functions and may be taken in several threads. None belongs on an event loop: some take
    milliseconds, pass@k takes seconds.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def lacks(self, example: Example) -> str | None:
        """Why the example cannot be scored by this metric, in words; None when it can."""
        ...

    def asks(self, example: Example) -> tuple[str, ...]:
        """Continuations whose log-likelihoods it needs, in this order in `Reply.likelihoods`; () for texts."""
        ...

    def score(self, example: Example, reply: Reply) -> float:
        """Raises CannotScore; `eval.extra.ExtraMissing` where a package is not installed."""
        ...


class Nothing:
    """There is nothing to be right about: prompts out of domain, asked only for who answers. Its score is NaN."""

    name = "none"
    needs: Needs = "nothing"

    def lacks(self, example: Example) -> str | None:
        return None

    def asks(self, example: Example) -> tuple[str, ...]:
        return ()

    def score(self, example: Example, reply: Reply) -> float:
        return math.nan
