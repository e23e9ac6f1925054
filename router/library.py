"""The library: which experts there are and what stands for each, as one immutable snapshot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from adapters_registry.expert import Expert
from adapters_registry.prototypes import prototype_texts
from router.encoder import Vectors
from router.versions import NOTHING, Learned, Rating

Mask = NDArray[np.bool_]

#: By how much cosine a badly answered prompt must be nearer than those that an expert is for (docs/experiments.md).
CLEARLY = 0.1
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Library:
    """Experts in the order of their names, each with the texts that stand for it and their embeddings.

    texts[k]       what stands for an expert: its sample prompts, else its description, else its name; then the prompts
                   that were learned for it
    prototypes[k]  (n_k, dim) embeddings of texts[k], rows of length 1; then those of learned prompts without their text
    registered[k]  (m_k, dim) the first of these rows: those of what was registered
    refused[k]     (r_k, dim) embeddings of prompts that the expert answered badly
    judged         what users thought of past answers, each with the prompt's embedding (dim,)
    keys[k]        names expert, content and texts: equal keys have equal prototypes
    generation     the registry's, at the time of the snapshot
    max_rank       rows that one composite of several experts may have, None: any number
    learned        what was learned beside the registry, calibration included
    head           columns of an embedding that are the sentence embedding, the first; 0: all (`sentence`)
    """

    experts: tuple[Expert, ...]
    texts: tuple[tuple[str, ...], ...]
    prototypes: tuple[Vectors, ...]
    keys: tuple[str, ...]
    dim: int
    generation: int = 0
    max_rank: int | None = None
    registered: tuple[Vectors, ...] = ()
    refused: tuple[Vectors, ...] = ()
    judged: tuple[tuple[Rating, Vectors], ...] = ()
    learned: Learned = NOTHING
    head: int = 0
    _pieces: Mapping[str, Vectors] = field(default_factory=dict, repr=False)  # what was encoded, by key
    _visible: dict[str | None, Mask] = field(init=False, repr=False)
    _made: dict[Hashable, object] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = [expert.name for expert in self.experts]
        if names != sorted(set(names)):
            raise ValueError(f"Experts must have distinct names, in order; got {', '.join(names)}.")
        # One mask per owner of private experts, one for any other tenant (""), one for the operator (None).
        tenants = {None, "", *(expert.owner for expert in self.experts if expert.visibility == "private")}
        masks = {who: np.array([e.visible_to(who) for e in self.experts], bool) for who in tenants}
        object.__setattr__(self, "_visible", masks)

    def __len__(self) -> int:
        return len(self.experts)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes of this library: made at the first call with this key, shared from then on."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    @property
    def sentences(self) -> tuple[Vectors, ...]:
        """(n_k, head) of each expert: `prototypes` without what inner layers of the encoder say."""
        return self.once("sentences", lambda: tuple(sentence(rows, self.head) for rows in self.prototypes))

    def spoiled(self, vector: Vectors) -> Mask:
        """(n,) true for experts that answered a prompt badly which is clearly nearer to this one (dim,) than their own.

        The nearest-neighbour rule (Cover and Hart 1967) between what an expert is for and what it is not for, with a
        margin: without one it costs more good answers than it prevents bad ones.
        """
        bad: NDArray[np.float64] = np.full(len(self), -np.inf)
        good = bad.copy()
        q = sentence(vector, self.head)
        for k, refused in self.once("refused", self._refused):
            bad[k] = (refused @ q).max()
            good[k] = (self.sentences[k] @ q).max(initial=-1.0)
        nearer: Mask = bad > good + CLEARLY
        return nearer

    def _refused(self) -> list[tuple[int, Vectors]]:
        return [(k, sentence(rows, self.head)) for k, rows in enumerate(self.refused) if len(rows)]

    def visible(self, tenant: str | None, allowed: Iterable[str] | None = None) -> Mask:
        """(n,) true for the experts `tenant` may use (None: the operator), of those `allowed` by name."""
        mask = self._visible.get(tenant, self._visible[""])
        if allowed is None:
            return mask
        names = frozenset(allowed)
        named: Mask = np.array([expert.name in names for expert in self.experts], bool)
        return np.logical_and(mask, named)


def build(
    experts: Iterable[Expert],
    encode: Callable[[Sequence[str]], Vectors],
    dim: int,
    *,
    generation: int = 0,
    max_rank: int | None = None,
    stored: Mapping[str, Vectors] | None = None,
    previous: Library | None = None,
    learned: Learned = NOTHING,
    encoder: str = "",
    head: int = 0,
) -> Library:
    """A library of these experts, encoding (in one call) only what is neither `stored` nor in `previous`.

    `stored` are prototypes by expert id, by the same encoder; those of another width are computed again. `encoder` is
    the encoder's id: of what was learned as vectors, only those made by it count.
    """
    ordered = sorted(experts, key=lambda expert: expert.name)
    told = [tuple(filter(str.strip, prototype_texts(expert))) for expert in ordered]
    extra = learned.extra
    more = [tuple(filter(str.strip, extra.get(expert.name, ()))) for expert in ordered]
    keys = [_key(expert.id, group) for expert, group in zip(ordered, told, strict=True)]
    more_keys = [_key("learned", group) for group in more]
    known = dict(previous._pieces) if previous else {}
    for expert, key in zip(ordered, keys, strict=True):
        if (vectors := (stored or {}).get(expert.id)) is not None and vectors.shape[1:] == (dim,):
            known.setdefault(key, unit_rows(vectors))

    pieces = dict(zip([*keys, *more_keys], [*told, *more], strict=True))
    new = {key: group for key, group in pieces.items() if key not in known}
    encoded = encode([text for group in new.values() for text in group])
    start = 0
    for key, group in new.items():
        known[key] = unit_rows(encoded[start : start + len(group)])
        start += len(group)

    praised, refused = learned.praised(encoder), learned.refused(encoder)
    none = np.zeros((0, dim), np.float32)
    rows = [
        (known[key], known[more_key], unit_rows(praised.get(expert.name, none)))
        for expert, key, more_key in zip(ordered, keys, more_keys, strict=True)
    ]
    return Library(
        tuple(ordered),
        tuple(a + b for a, b in zip(told, more, strict=True)),
        tuple(each[0] if not len(each[1]) + len(each[2]) else np.concatenate(each) for each in rows),
        tuple(_whole_key(key, *each[1:]) for key, each in zip(keys, rows, strict=True)),
        dim,
        generation,
        max_rank,
        registered=tuple(each[0] for each in rows),
        refused=tuple(unit_rows(refused.get(expert.name, none)) for expert in ordered),
        judged=tuple(learned.judged(encoder)),
        learned=learned,
        head=head,
        _pieces={key: known[key] for key in pieces},
    )


def sentence(vectors: Vectors, head: int) -> Vectors:
    """(..., d) -> (..., head): the sentence embeddings in an encoder's vectors, of length 1; 0: they are all of it."""
    if head in (0, vectors.shape[-1]):
        return vectors
    first = vectors[..., :head]
    lengths = np.linalg.norm(first, axis=-1, keepdims=True)
    return np.asarray(first / np.where(lengths > 0, lengths, 1), np.float32)


def unit_rows(vectors: Vectors) -> Vectors:
    """(n, d) -> (m, d): rows scaled to length 1; those that are zero, NaN or infinite are left out."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)  # (n, 1)
    usable = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
    return np.ascontiguousarray(vectors[usable] / lengths[usable], np.float32)


def _key(whose: str, texts: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()
    return f"{whose}#{digest[:16]}"


def _whole_key(key: str, *learned: Vectors) -> str:
    """The key of an expert's registered texts and of what was learned for it."""
    if not any(map(len, learned)):
        return key
    return f"{key}+{hashlib.sha256(b''.join(each.tobytes() for each in learned)).hexdigest()[:16]}"
