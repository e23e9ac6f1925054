"""Programs, right when they pass their tests: pass@k (Chen et al. 2021, https://arxiv.org/abs/2107.03374)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import comb

from eval.asking import Reply
from eval.examples import Example
from eval.scoring.metric import CannotScore, Needs
from eval.scoring.sandbox import passes, unusable
from eval.scoring.text import extracted, unreadable

NOT_ALLOWED = (
    "pass@k runs programs that a model has written: allow it with --allow-code (docs/evaluation.md says what the "
    "sandbox holds back)"
)


def refused(allowed: bool) -> str | None:
    """Why programs are not run, or cannot be; None where they are. Tries the sandbox, once in a process."""
    return unusable() if allowed else NOT_ALLOWED


def pass_at(k: int, n: int, c: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that some of k answers, drawn from n of which c are right, is right."""
    return 1 - comb(n - c, k) / comb(n, k)


@dataclass(frozen=True)
class PassAt:
    """The unbiased estimate of pass@k from the n >= k answers of an example. Takes seconds; equal answers run once."""

    k: int
    allowed: bool = False
    needs: Needs = "code"

    @property
    def name(self) -> str:
        return f"pass@{self.k}"

    def lacks(self, example: Example) -> str | None:
        if not example.tests.strip():
            return f"no tests, which '{self.name}' needs"
        if example.n < self.k:
            return f"n is {example.n}: '{self.name}' needs {self.k} answers or more"
        if example.n > 1 and example.temperature == 0:
            return f"n is {example.n} at temperature 0, where all answers are the same one"
        return unreadable(example.extract)

    def asks(self, example: Example) -> tuple[str, ...]:
        return ()

    def score(self, example: Example, reply: Reply) -> float:
        if (refusal := refused(self.allowed)) is not None:
            raise CannotScore(f"{example.id}: {refusal}")
        n = len(reply.texts)
        problem = self.lacks(example) or (f"{n} answers came, too few for '{self.name}'" if n < self.k else None)
        if problem is not None:
            raise CannotScore(f"{example.id}: {problem}")
        programs = Counter(program(example, text) for text in reply.texts)
        return pass_at(self.k, n, sum(count for text, count in programs.items() if passes(text)))


def program(example: Example, answer: str) -> str:
    """The answer and its tests; of a completion the prompt comes first, which the answer goes on with."""
    begun = example.prompt.text if example.prompt.form == "completion" else ""
    return f"{begun}{extracted(answer, example.extract)}\n\n{example.tests}\n"
