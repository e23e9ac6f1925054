"""The confusion delta of a new expert: which held-out samples of the experts there would change hands.

An expert that is registered with everybody's prompts, by mistake or by malice, would answer in everybody's place. Each
sample of the present experts is asked of the router without that sample, once without and once with the newcomer: if
it goes to its own expert without, and to the newcomer with, it is *captured*; if the newcomer has it among its own
samples, or nearly, it is *copied*.

An expert for the task of one that is there takes some of that one's samples, and nobody else's: that is to be told,
but nothing to refuse. One that takes from several that are unlike each other is a takeover.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.encoder import Vectors
from router.library import Library, Mask, sentence, unit_rows

Floats = NDArray[np.float64]

#: Cosine from which two samples are the same one, give or take capitals and a full stop.
SAME = 0.98
#: Cosine of their centroids from which two experts are for the same task.
ALIKE = 0.9
#: Samples of one expert that are asked, the first ones, so that registering stays quick.
MOST = 20
#: Samples that are compared with all others at once.
BLOCK = 512


@dataclass(frozen=True)
class Loss:
    """Of an expert's samples that were asked: how many are its own now and go to the newcomer, and how many the
    newcomer has as well.
    """

    expert: str
    samples: int
    captured: int
    copied: int

    @property
    def share(self) -> float:
        """Lost, of all; one sample of a few proves nothing."""
        lost = max(self.captured, self.copied)
        return lost / self.samples if lost > 1 else 0.0

    def __str__(self) -> str:
        parts = [f"{self.captured} would go to it"] if self.captured else []
        parts += [f"{self.copied} are its own too"] if self.copied else []
        return f"'{self.expert}' (of {self.samples} samples {' and '.join(parts)})"


@dataclass(frozen=True)
class Takeover:
    """losses    of experts that lose anything, the largest share first
    samples   that were asked, of all experts
    captured  of these, the share that would change hands
    value     the largest share that two experts lose, both of them, though they are unlike each other
    """

    losses: tuple[Loss, ...]
    samples: int
    captured: float
    value: float

    def __str__(self) -> str:
        if not self.losses:
            return f"takes none of {self.samples} held-out samples of other experts"
        told = ", ".join(map(str, self.losses[:5]))
        more = f" and of {len(self.losses) - 5} others" if len(self.losses) > 5 else ""
        return f"takes {self.captured:.1%} of {self.samples} held-out samples of other experts: {told}{more}"


def takeover(library: Library, name: str, vectors: Vectors, among: Mask | None = None) -> Takeover:
    """The confusion delta of an expert `name` with samples (n, dim); its own older version does not count, nor do
    experts outside `among` (K,).

    Asked are the two rules that all methods on prototypes follow in some way, nearest centroid and nearest sample; the
    one that loses more counts. Samples that are copied are held out of the newcomer as well.
    """
    others = [
        (expert.name, sentence(group[:MOST], library.head).astype(np.float64))
        for k, (expert, group) in enumerate(zip(library.experts, library.registered or library.prototypes, strict=True))
        if expert.name != name and len(group) > 1 and (among is None or among[k])
    ]
    mine = sentence(unit_rows(vectors), library.head).astype(np.float64)  # (n, dim)
    if not others or not len(mine):
        return Takeover((), 0, 0.0, 0.0)
    own = np.repeat(np.arange(len(others)), [len(group) for _, group in others])  # (N,)
    E = np.concatenate([group for _, group in others])  # (N, dim)
    copies = E @ mine.T >= SAME  # (N, n)
    centred = _by_centroid(E, own, mine, copies)
    nearest = _by_nearest(E, own, mine, copies)
    losses, shares = [], np.zeros(len(others))
    for k, (other, group) in enumerate(others):
        here = own == k
        captured = max(int(centred[here].sum()), int(nearest[here].sum()))
        loss = Loss(other, len(group), captured, int(copies[here].any(axis=1).sum()))
        shares[k] = loss.share
        if captured or loss.copied:
            losses.append(loss)
    losses.sort(key=lambda loss: (-loss.share, -loss.captured, loss.expert))
    changed = max(centred.mean(), nearest.mean())
    return Takeover(tuple(losses), len(E), float(changed), _two_unlike(shares, _centroids(E, own)))


def _by_centroid(E: Floats, own: NDArray[np.int64], mine: Floats, copies: Mask) -> Mask:
    """(N,) true for samples that go to their own expert's centroid, but to the newcomer's when it is there."""
    cosines = E @ _centroids(E, own).T  # (N, K)
    sums = _sums(E, own)
    cosines[np.arange(len(E)), own] = (E * _unit(sums[own] - E)).sum(axis=1)  # without the sample itself
    rest = mine.sum(axis=0) - copies @ mine  # (N, dim) the newcomer without what it copied
    captured: Mask = (cosines.argmax(axis=1) == own) & ((E * _unit(rest)).sum(axis=1) > cosines.max(axis=1))
    return captured


def _by_nearest(E: Floats, own: NDArray[np.int64], mine: Floats, copies: Mask) -> Mask:
    """(N,) the same by the nearest sample; only those that the newcomer is nearer to are compared with all others."""
    within = np.full(len(E), -np.inf)  # the nearest of the same expert
    for k in range(own[-1] + 1):
        here = np.flatnonzero(own == k)
        cosines = E[here] @ E[here].T
        np.fill_diagonal(cosines, -np.inf)
        within[here] = cosines.max(axis=1)
    theirs = np.where(copies, -np.inf, E @ mine.T).max(axis=1)
    captured: Mask = theirs > within + 1e-9  # more than rounding
    for start in range(0, len(E), BLOCK):
        rows = start + np.flatnonzero(captured[start : start + BLOCK])
        cosines = np.where(own[rows, None] == own, -np.inf, E[rows] @ E.T)
        captured[rows] = within[rows] > cosines.max(axis=1)
    return captured


def _two_unlike(shares: Floats, centroids: Floats) -> float:
    """The largest share that the lesser of two experts loses that are unlike each other; 0 when there are no two."""
    order = np.argsort(-shares, kind="stable")
    for place, second in enumerate(order):
        if shares[second] and (centroids[order[:place]] @ centroids[second] < ALIKE).any():
            return float(shares[second])
    return 0.0


def _sums(E: Floats, own: NDArray[np.int64]) -> Floats:
    return np.add.reduceat(E, np.flatnonzero(np.diff(own, prepend=-1)), axis=0)


def _centroids(E: Floats, own: NDArray[np.int64]) -> Floats:
    return _unit(_sums(E, own))


def _unit(rows: Floats) -> Floats:
    scaled: Floats = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)
    return scaled
