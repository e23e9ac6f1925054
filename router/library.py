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

Mask = NDArray[np.bool_]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Library:
    """Experts in the order of their names, each with the texts that stand for it and their embeddings.

    texts[k]       what stands for an expert: its sample prompts, else its description, else its name
    prototypes[k]  (n_k, dim) embeddings of texts[k], rows of length 1
    keys[k]        names expert, content and texts: equal keys have equal prototypes
    generation     the registry's, at the time of the snapshot
    max_rank       rows that one composite of several experts may have, None: any number
    """

    experts: tuple[Expert, ...]
    texts: tuple[tuple[str, ...], ...]
    prototypes: tuple[Vectors, ...]
    keys: tuple[str, ...]
    dim: int
    generation: int = 0
    max_rank: int | None = None
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
) -> Library:
    """A library of these experts, encoding (in one call) only what is neither `stored` nor in `previous`.

    `stored` are prototypes by expert id, by the same encoder; those of another width are computed again.
    """
    ordered = sorted(experts, key=lambda expert: expert.name)
    texts = [tuple(filter(str.strip, prototype_texts(expert))) for expert in ordered]
    keys = [_key(expert, group) for expert, group in zip(ordered, texts, strict=True)]
    known = dict(zip(previous.keys, previous.prototypes, strict=True)) if previous else {}
    for expert, key in zip(ordered, keys, strict=True):
        if (vectors := (stored or {}).get(expert.id)) is not None and vectors.shape[1:] == (dim,):
            known.setdefault(key, unit_rows(vectors))

    new = {key: group for key, group in zip(keys, texts, strict=True) if key not in known}
    encoded = encode([text for group in new.values() for text in group])
    start = 0
    for key, group in new.items():
        known[key] = unit_rows(encoded[start : start + len(group)])
        start += len(group)
    prototypes = tuple(known[key] for key in keys)
    return Library(tuple(ordered), tuple(texts), prototypes, tuple(keys), dim, generation, max_rank)


def unit_rows(vectors: Vectors) -> Vectors:
    """(n, d) -> (m, d): rows scaled to length 1; those that are zero, NaN or infinite are left out."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)  # (n, 1)
    usable = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
    return np.ascontiguousarray(vectors[usable] / lengths[usable], np.float32)


def _key(expert: Expert, texts: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()
    return f"{expert.id}#{digest[:16]}"
