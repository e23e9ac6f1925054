"""An example: one prompt of a task, with what is right, ready to be asked. Plain data; `eval.reading` makes them."""

from __future__ import annotations

from eval.asking import Frozen, Prompt


class Example(Frozen):
    """id         unique in a suite: `task/row`
    owners     the experts that it was made for: one, several in turn (a composition), or none (out of domain)
    answers    right ones, any of them will do
    extract    regular expression: of an answer only its last match counts, of its groups the first that is not empty
    choices    continuations to choose among by log-likelihood, and `gold` the position of the right one
    tests      program text that fails unless the answer, put before it, is right (`pass@k`)
    metric     a name in `eval.scoring.METRICS`; "none": there is nothing to be right about
    tags       to slice results by
    """

    id: str
    task: str
    owners: tuple[str, ...] = ()
    prompt: Prompt
    answers: tuple[str, ...] = ()
    extract: str = ""
    choices: tuple[str, ...] = ()
    gold: int | None = None
    tests: str = ""
    metric: str = "exact_match"
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    n: int = 1
    temperature: float = 0.0
    tags: tuple[str, ...] = ()
