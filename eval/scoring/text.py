"""Answers in words, compared with the right ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from statistics import fmean
from typing import Any

from eval.asking import Reply
from eval.examples import Example
from eval.extra import extra
from eval.scoring.metric import CannotScore, Needs

Compare = Callable[[str, Sequence[str]], float]  # (answer, right ones) -> 0 to 1, for the right one that is nearest

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class TextMetric:
    """Of several answers to one prompt, the mean."""

    name: str
    compare: Compare
    needs: Needs = "text"

    def lacks(self, example: Example) -> str | None:
        return unreadable(example.extract) if example.answers else f"no right answer, which '{self.name}' needs"

    def asks(self, example: Example) -> tuple[str, ...]:
        return ()

    def score(self, example: Example, reply: Reply) -> float:
        problem = self.lacks(example) or (None if reply.texts else "the reply has no text")
        if problem is not None:
            raise CannotScore(f"{example.id}: {problem}")
        return fmean(self.compare(extracted(text, example.extract), example.answers) for text in reply.texts)


def extracted(text: str, pattern: str) -> str:
    """The last match of a regular expression (of its groups the first that is not empty); "" where nothing matches.

    As lm-evaluation-harness's filter `regex` with `group_select: -1`. Without a pattern, the text.
    """
    if not pattern:
        return text
    found = [match.groups() or (match[0],) for match in re.finditer(pattern, text)]
    return next((group for group in found[-1] if group), "") if found else ""


def unreadable(pattern: str) -> str | None:
    """What is wrong with a regular expression; None when nothing is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"'extract' is no regular expression: {error}"
    return None


def exact(answer: str, right: Sequence[str]) -> float:
    """The same to the letter, but for white space at the ends."""
    return float(answer.strip() in {each.strip() for each in right})


def loose(answer: str, right: Sequence[str]) -> float:
    """The same but for case, punctuation, the articles a, an, the, and white space (SQuAD, Rajpurkar et al. 2016)."""
    return _squad(answer, right)["exact_match"]


def f1(answer: str, right: Sequence[str]) -> float:
    """SQuAD's token F1 after the same normalisation, with the right answer that is nearest."""
    return _squad(answer, right)["f1"]


def _squad(answer: str, right: Sequence[str]) -> dict[str, float]:
    squad = extra("torchmetrics.functional.text").squad
    found = squad({"prediction_text": answer, "id": ""}, {"answers": {"text": list(right)}, "id": ""})
    return {name: float(percent) / 100 for name, percent in found.items()}


def number(answer: str, right: Sequence[str]) -> float:
    """The last number of the answer is the last number of a right one, by value: 1,250 is 1250.0."""
    said = _last_number(answer)
    return float(said is not None and said in {_last_number(each) for each in right})


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def rouge_l(answer: str, right: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), without stemming, as in `evaluate`'s `rouge`.

    Words are runs of a-z and 0-9; other scripts count for nothing.
    """
    return float(_rouge().score_multi(list(right), answer)["rougeL"].fmeasure)


@lru_cache
def _rouge() -> Any:
    return extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)


def bleu(answer: str, right: Sequence[str]) -> float:
    """Sentence BLEU as a fraction: sacrebleu's, tokens `13a`, exponential smoothing, effective order.

    Corpus BLEU adds up n-gram counts over all sentences before it divides, so it is not the mean of these: it lies
    higher or lower by some points. Means of sentence BLEU compare systems on the same prompts; to cite against other
    publications, compute corpus BLEU of the answers in `samples.jsonl`.
    """
    return float(extra("sacrebleu").sentence_bleu(answer, list(right)).score) / 100
