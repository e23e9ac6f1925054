"""Shared by the tests of metrics: examples and replies in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eval.asking import Likelihood, Prompt, Reply
from eval.examples import Example


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    def make(*answers: str, **fields: Any) -> Example:
        return Example(**{"id": "t/0", "task": "t", "prompt": Prompt(text="?"), "answers": answers, **fields})

    return make


@pytest.fixture(scope="session")
def reply() -> Callable[..., Reply]:
    """`reply("text", ...)`, or `reply((logprob, tokens), ...)`."""

    def make(*given: str | tuple[float, int]) -> Reply:
        texts = tuple(each for each in given if isinstance(each, str))
        pairs = [each for each in given if isinstance(each, tuple)]
        return Reply(texts=texts, likelihoods=tuple(Likelihood(logprob=p, tokens=n) for p, n in pairs))

    return make
