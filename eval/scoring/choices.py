"""Answers by log-likelihood: the likeliest of several continuations, or how likely the right one is."""

from __future__ import annotations

from dataclasses import dataclass

from eval.asking import Likelihood, Reply
from eval.examples import Example
from eval.scoring.metric import CannotScore, Needs


@dataclass(frozen=True)
class Choice:
    """The right choice has the highest log-likelihood, of ties the first; lm-evaluation-harness's `acc`.

    `by_length` divides each by the characters of its choice, the space that joins it to the prompt not counted:
    its `acc_norm`.
    """

    name: str
    by_length: bool = False
    needs: Needs = "choices"

    def lacks(self, example: Example) -> str | None:
        count = len(example.choices)
        if count < 2:
            return f"{count} choices, where '{self.name}' needs two or more"
        if example.gold is None or not 0 <= example.gold < count:
            return f"the right choice is {example.gold}, not one of 0 to {count - 1}"
        return next((f"choice {i} is empty" for i, choice in enumerate(example.choices) if not choice.strip()), None)

    def asks(self, example: Example) -> tuple[str, ...]:
        return example.choices

    def score(self, example: Example, reply: Reply) -> float:
        if (problem := self.lacks(example)) is not None:
            raise CannotScore(f"{example.id}: {problem}")
        found = likelihoods(example, reply, len(example.choices))
        lengths = [len(choice.strip()) if self.by_length else 1 for choice in example.choices]
        scores = [each.logprob / length for each, length in zip(found, lengths, strict=True)]
        return float(scores.index(max(scores)) == example.gold)


@dataclass(frozen=True)
class LogLikelihood:
    """Mean log-likelihood per token (nats, at most 0) of the right answer; of several, the likeliest.

    exp(-score) is the answer's perplexity; over a task, exp(-mean) is a mean over answers, not over tokens.
    """

    name: str = "log_likelihood"
    needs: Needs = "likelihood"

    def lacks(self, example: Example) -> str | None:
        return None if any(self.asks(example)) else f"no right answer, which '{self.name}' needs"

    def asks(self, example: Example) -> tuple[str, ...]:
        if example.gold is not None and 0 <= example.gold < len(example.choices):
            return (example.choices[example.gold],)
        return example.answers

    def score(self, example: Example, reply: Reply) -> float:
        if (problem := self.lacks(example)) is not None:
            raise CannotScore(f"{example.id}: {problem}")
        return max(each.logprob / max(each.tokens, 1) for each in likelihoods(example, reply, len(self.asks(example))))


def likelihoods(example: Example, reply: Reply, count: int) -> tuple[Likelihood, ...]:
    """Raises CannotScore."""
    if len(reply.likelihoods) != count:
        raise CannotScore(f"{example.id}: {len(reply.likelihoods)} log-likelihoods came for {count} continuations")
    return reply.likelihoods
