"""What is said about a version beside what it is. Blocks."""

from __future__ import annotations

from collections.abc import Iterator

from adapters_registry.base import BaseSpec
from adapters_registry.expert import Expert
from router.adapter import Adapter
from router.lowrank import NEGLIGIBLE, singular_values
from serving.checks.report import Cell, Section

#: Samples that an expert should come with: the router finds it by them, and checks ask them.
FEWEST_SAMPLES = 10


def declared(version: Expert, base: BaseSpec) -> Section:
    """The figure is how many things are missing or other than declared."""
    adapter = Adapter(version.path)
    rank = true_rank(adapter)
    problems = [*_missing(version), *_other(version, adapter, base, rank)]
    said = adapter.config.base_model_name_or_path or "not said"
    answers = sum(sample.answer is not None for sample in version.samples)
    modules = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in adapter.modules}))
    rows: tuple[dict[str, Cell], ...] = (
        {"what": "base model", "declared": said, "measured": base.name},
        {"what": "rank", "declared": adapter.config.r, "measured": rank},
        {"what": "modules", "declared": ", ".join(version.target_modules), "measured": modules},
        {"what": "samples, with answers", "declared": len(version.samples), "measured": answers},
    )
    return Section(
        name="declared",
        passed=not problems,
        figure=len(problems),
        limit=0,
        detail="; ".join(problems) or "it is described, and is what it says",
        rows=rows,
    )


def _missing(version: Expert) -> Iterator[str]:
    for what, there in (
        ("description", version.description),
        ("licence", version.licence),
        ("tags", version.tags),
        ("training data", version.training_data),
    ):
        if not there:
            yield f"no {what}"
    if len(version.samples) < FEWEST_SAMPLES:
        yield f"{len(version.samples)} samples; {FEWEST_SAMPLES} to 20 are usual"
    if version.samples and not any(sample.answer is not None for sample in version.samples):
        yield "no sample has an answer"


def _other(version: Expert, adapter: Adapter, base: BaseSpec, rank: int) -> Iterator[str]:
    said = adapter.config.base_model_name_or_path
    if said and "/" in said and not said.startswith(("/", ".")) and said.casefold() not in base.accepted:
        yield f"made for '{said}', which is not among the names of '{base.name}'"
    if rank < adapter.config.r and rank < version.rank:
        yield f"rank {version.rank} declared, {rank} used"


def true_rank(adapter: Adapter) -> int:
    """The largest number of directions that any module's dW has."""
    ranks = [0]
    for module in adapter.modules:
        if (factors := adapter.factors(module)) is not None:
            values = singular_values(factors)
            ranks.append(int(((values > NEGLIGIBLE * values[0]) & (values > 0)).sum()))
    return max(ranks)
