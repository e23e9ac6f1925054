"""The constants of a gate that are measured over neutral prompts, and under which key an expert keeps them."""

from __future__ import annotations

from router.composite.part import Part
from router.gating.evidence import Probe
from router.gating.gate import Gate, ScoreGate


def scorer_of(gate: Gate) -> ScoreGate | None:
    """What a gate's scores come from; None for a gate that compares no experts."""
    if isinstance(gate, Probe):
        return gate.scorer
    return gate if isinstance(gate, ScoreGate) else None


def tables_of(gate: Gate) -> tuple[str, ...]:
    """Which statistics the gate needs of every expert and module."""
    scorer = scorer_of(gate)
    if scorer is None:
        return ()
    zscore = ("mean", "deviation") if scorer.settings.normalise == "zscore" else ()
    return (*zscore, "centre") if scorer.settings.centred else zscore


def statistics_key(gate: Gate, *, general: Part | None = None, compress: int | None = None) -> str | None:
    """`statistics/<form>/<score>`, where an expert keeps the statistics of this gate's scores; None without scores.

    They are the expert's own: the other members do not matter, what is done to the expert beforehand does.
    """
    scorer = scorer_of(gate)
    if scorer is None:
        return None
    key = f"statistics/{gate.form}/{scorer.score_name}"
    if general is not None:
        key += f"-minus-{general.digest[:12]}"
    return key if compress is None else f"{key}-rank-{compress}"
