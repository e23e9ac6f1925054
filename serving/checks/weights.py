"""What a version's weights say beside its peers': is it a copy, is it too loud? Blocks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from safetensors import SafetensorError

from adapters_registry.errors import VersionNotFound
from adapters_registry.expert import Expert
from adapters_registry.measured import Measured
from router.adapter import Adapter
from router.loudness import OUTSIDE, Loudness, against, loudness
from router.peers import FEW
from router.similarity import most_similar
from serving.checks.asking import Tell
from serving.checks.report import Cell, Section

#: The key under which an expert's norms are kept: they follow from its files alone.
LOUDNESS = "loudness/1"
#: The most similar experts that a report names.
NEAREST = 5
#: The loudest layers that it names.
LAYERS = 3


def duplicates(version: Expert, peers: Sequence[Expert], max_cosine: float, tell: Tell) -> Section:
    """The figure is the largest |cosine| of its dW with a peer's."""
    nearest = most_similar(Adapter(version.path), _opened(peers, tell), NEAREST)
    if not nearest:
        detail = "there is no other expert to be a copy of"
        return Section(name="duplicates", passed=True, figure=0.0, limit=max_cosine, detail=detail)
    figure = round(abs(nearest[0].cosine), 6)
    detail = f"most like '{nearest[0].name}': cosine {nearest[0].cosine:.3f} of their weights' changes"
    if not (passed := figure <= max_cosine):
        detail += ", which makes it a copy" if nearest[0].cosine > 0 else ", which makes it the very opposite"
    rows: tuple[dict[str, Cell], ...] = tuple(
        {"expert": each.name, "cosine": round(each.cosine, 6), "overlap": round(each.overlap, 6)} for each in nearest
    )
    return Section(name="duplicates", passed=passed, figure=figure, limit=max_cosine, detail=detail, rows=rows)


def _opened(peers: Sequence[Expert], tell: Tell) -> Iterator[tuple[str, Adapter]]:
    """One at a time; those that were removed meanwhile are passed over."""
    for done, peer in enumerate(peers, start=1):
        try:
            yield peer.name, Adapter(peer.path)
        except (OSError, SafetensorError):
            continue
        finally:
            tell(done / len(peers))


def loud(version: Expert, peers: Sequence[Expert], measured: Measured, max_loudness: float, tell: Tell) -> Section:
    """The figure is the largest robust z-score of its norms: in all, at its peak, and by layer."""
    mine = loudness(Adapter(version.path))
    theirs = []
    for done, peer in enumerate(peers, start=1):
        if (found := loudness_of(peer, measured)) is not None:
            theirs.append(found)
        tell(done / len(peers))
    standing = against(mine, theirs)
    norms = [each.norm for each in theirs]
    layers = [each.layers() for each in theirs]
    loudest = sorted(standing.layers.items(), key=lambda each: (-(each[1] or 0), each[0]))[:LAYERS]
    rows = (
        _row("whole adapter (Frobenius)", mine.norm, norms, standing.norm),
        _row("strongest direction (spectral)", mine.peak, [each.peak for each in theirs], standing.peak),
        *(_row(_named(k), mine.layers()[k], [each[k] for each in layers if k in each], z) for k, z in loudest),
    )
    if (figure := standing.loudest) is None:
        detail = f"norm {mine.norm:.3g}; {len(theirs)} peers are too few to say what is usual ({FEW})"
        return Section(name="loudness", passed=True, limit=max_loudness, detail=detail, rows=rows)
    usual = statistics.median(norms)
    detail = f"norm {mine.norm:.3g}, {_times(mine.norm, usual)} the median of {len(norms)} peers; z up to {figure:.1f}"
    if not (passed := figure <= max_loudness):
        detail += ": it would drown others in blends"
    return Section(
        name="loudness", passed=passed, figure=round(figure, 4), limit=max_loudness, detail=detail, rows=rows
    )


def loudness_of(peer: Expert, measured: Measured) -> Loudness | None:
    """Measured once; None for one that was removed meanwhile."""
    if (kept := measured.get(peer, LOUDNESS)) is not None:
        return Loudness(kept["frobenius"], kept["spectral"])
    try:
        found = loudness(Adapter(peer.path))
        measured.put(peer, LOUDNESS, {"frobenius": dict(found.frobenius), "spectral": dict(found.spectral)})
    except (OSError, SafetensorError, VersionNotFound):
        return None
    return found


def _row(what: str, mine: float, theirs: Sequence[float], z: float | None) -> dict[str, Cell]:
    return {
        "norm": what,
        "this": round(mine, 4),
        "median": round(statistics.median(theirs), 4) if theirs else None,
        "z": None if z is None else round(z, 2),
    }


def _named(layer: int) -> str:
    return "outside layers" if layer == OUTSIDE else f"layer {layer}"


def _times(norm: float, usual: float) -> str:
    return f"{norm / usual:.2g} times" if usual else "above"
