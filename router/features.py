"""Word, character and shape n-grams of a text, hashed: features of what it says and of how it is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint64]
Weights = NDArray[np.float32]

BUCKETS = 2**16  # of each family: with this many, collisions cost nothing that can be measured
FAMILIES = ("word", "character", "shape")
WIDTH = BUCKETS * len(FAMILIES)

_WORD = re.compile(r"\w+|[^\w\s]")
_UPPER, _LOWER, _DIGITS = re.compile(r"[A-Z]"), re.compile(r"[a-z]+"), re.compile(r"[0-9]+")
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: Knuth's multiplicative hashing


@dataclass(frozen=True, eq=False, slots=True)
class Grams:
    """buckets  (u,) distinct, ascending; family f has f BUCKETS ... (f + 1) BUCKETS - 1
    weights  (u,) 1 + log of how often, the weights of each family scaled to length 1
    """

    buckets: NDArray[np.int64]
    weights: Weights


def grams(text: str) -> Grams:
    """Words and pairs of words, 2 to 5 characters, and 2 to 7 characters of the text's shape.

    The shape has X for a capital, x for a run of small letters and 9 for one of digits, so what is left is
    punctuation, lines, numbers and lengths: "Sentence 1: It rained." is "Xx 9: Xx x."
    """
    padded = f" {text} "
    parts = (
        ngrams(
            np.array([crc32(word.encode(errors="replace")) for word in _WORD.findall(text.lower())], np.uint64), 1, 2
        ),
        ngrams(characters(padded), 2, 5),
        ngrams(characters(shape(padded)), 2, 7),
    )
    buckets, weights = [], []
    for family, hashes in enumerate(parts):
        found, counts = np.unique(hashes >> np.uint64(48), return_counts=True)
        tf = 1 + np.log(counts)
        buckets.append(found.astype(np.int64) + family * BUCKETS)
        weights.append((tf / max(float(np.linalg.norm(tf)), 1e-9)).astype(np.float32))
    return Grams(np.concatenate(buckets), np.concatenate(weights))


def shape(text: str) -> str:
    return _DIGITS.sub("9", _LOWER.sub("x", _UPPER.sub("X", text)))


def characters(text: str) -> Codes:
    """(n,) code points."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32).astype(np.uint64)


def ngrams(items: Codes, shortest: int, longest: int) -> Codes:
    """(m,) hashes of all runs of `shortest` to `longest` items; their highest bits are the best mixed.

    That of a run follows from that of the run without its last item: h' = (h ^ h >> 29) odd + item, mod 2^64.
    """
    found = []
    run = np.full(len(items), 1, np.uint64)
    for n in range(1, longest + 1):
        if len(items) < n:
            break
        run = (run[: len(items) - n + 1] ^ (run[: len(items) - n + 1] >> np.uint64(29))) * _ODD + items[n - 1 :]
        if n >= shortest:
            found.append(run)
    hashes = np.concatenate([np.zeros(0, np.uint64), *found])
    mixed: Codes = (hashes ^ (hashes >> np.uint64(32))) * _ODD
    return mixed
