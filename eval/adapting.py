"""A model in this process, and recipes put on it: an expert or a blend by PEFT, a composite by `eval.twin`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adapters_registry.expert import Sample
from adapters_registry.manifest import BaseRef
from adapters_registry.store import content_digest
from eval.asking import Prompt
from eval.calibration import calibrate
from eval.greedy import Step, padded, step
from eval.recipe import Recipe, weighed
from eval.twin import Composite, Twin
from router.blending import OPERATORS, blend
from router.blending.measuring import measure
from router.blending.operator import Statistic
from router.blending.plan import merged
from router.composite import Part, compose
from router.composite.planning import chosen_settings
from router.composite.statistics import scorer_of, statistics_key, tables_of
from router.gating import gate_of
from router.gating.layout import Layout, Member

NEUTRAL = 100  # prompts that an expert's scores are measured on at most, as in a server

#: Of so many rows a step of the model: hooks may remember what passes from step to step.
Begin = Callable[[int], AbstractContextManager[Step]]


class UnknownExpert(Exception):
    """An expert that is not here, and who is."""


class NoTemplate(Exception):
    """A chat, and a tokenizer without a template for one."""


class AdaptedModel:
    """`experts` are PEFT folders by name; what operators and gates need beside them is measured on their `samples`."""

    def __init__(
        self, base: BaseRef, experts: Mapping[str, Path], samples: Mapping[str, Sequence[Sample]], max_rank: int
    ) -> None:
        self._base = base
        self._experts = experts
        self._samples = samples
        self._max_rank = max_rank
        self._tensors: dict[tuple[str, str], Mapping[str, Tensor] | None] = {}
        self._on: tuple[Recipe, ExitStack, Begin] | None = None
        self._twin: Twin | None = None

    @cached_property
    def model(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            self._base.model, revision=self._base.revision, dtype=self._base.dtype or "auto"
        )
        return model.eval()

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._base.model, revision=self._base.revision)

    def tokens(self, prompt: Prompt) -> list[int]:
        """As an engine reads a prompt. Raises NoTemplate."""
        if prompt.form == "completion":
            return list(self.tokenizer(prompt.text)["input_ids"])
        if not getattr(self.tokenizer, "chat_template", None):
            raise NoTemplate(f"{self._base.name} has no chat template: ask in the form of a completion.")
        text = self.tokenizer.apply_chat_template(prompt.body()["messages"], add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # What a recipe puts on the model

    def begin(self, recipe: Recipe) -> Begin:
        """How the model answers by a recipe that is no probe; the last recipe stays on until another comes.

        Raises UnknownExpert, BlendError, CompositeError.
        """
        if self._on is None or self._on[0] != recipe:
            self.clear()
            with ExitStack() as stack:
                begin = stack.enter_context(self._put(recipe))
                self._on = (recipe, stack.pop_all(), begin)
        assert self._on is not None
        return self._on[2]

    def evidence(self, recipe: Recipe, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(prompts, K) what a probe has gathered after each prompt."""
        with self.begin(recipe)(len(prompts)) as forward, torch.inference_mode():
            forward(*padded(prompts), None)
            assert self._twin is not None
            return self._twin.evidence.total

    def clear(self) -> None:
        """The model is the base model again."""
        if self._on is not None:
            self._on[1].close()
            self._on = None

    @contextmanager
    def _put(self, recipe: Recipe) -> Iterator[Begin]:
        match recipe.kind:
            case "select":
                with self._by_peft(self._folder(recipe.names[0])) as begin:
                    yield begin
            case "blend":
                with (
                    tempfile.TemporaryDirectory(prefix="moerge-blend-") as scratch,
                    self._by_peft(self._blend(recipe, Path(scratch) / "blend")) as begin,
                ):
                    yield begin
            case "gate":
                self._twin = self._made_twin(recipe)
                yield partial(gated, self._twin, prior(recipe))
            case _:
                yield lambda rows: nullcontext(partial(step, self.model))

    @contextmanager
    def _by_peft(self, folder: Path) -> Iterator[Begin]:
        adapted = PeftModel.from_pretrained(self.model, str(folder)).eval()
        try:
            yield lambda rows: nullcontext(partial(step, adapted))
        finally:
            adapted.unload()

    def _blend(self, recipe: Recipe, folder: Path) -> Path:
        parts = [self._part(name, Needed.of(recipe)) for name in recipe.names]
        chosen, weights = merged(parts, [weight for _, weight in recipe.experts])
        blend(folder, chosen, weights, recipe.operator or "cat", recipe.settings, max_rank=self._max_rank)
        return folder

    def _made_twin(self, recipe: Recipe) -> Twin:
        assert recipe.gate is not None
        chosen_settings(recipe.gate, recipe.settings)  # raises what `gate_of` would not
        prepared = recipe.general or recipe.compress  # scores of changed experts are not measured here
        needed = None if prepared else Needed.of(recipe)
        with tempfile.TemporaryDirectory(prefix="moerge-composite-") as scratch:
            compose(
                Path(scratch),
                [self._part(name, needed) for name in recipe.names],
                recipe.gate,
                recipe.settings,
                max_rank=self._max_rank,
                general=self._part(recipe.general) if recipe.general else None,
                compress=recipe.compress,
            )
            return Twin(self.model, Composite.read(Path(scratch)))

    # Experts, with what is measured on samples

    def _folder(self, name: str) -> Path:
        if name not in self._experts:
            raise UnknownExpert(f"No expert '{name}'. There are: {', '.join(sorted(self._experts))}.")
        return self._experts[name]

    def _part(self, name: str, needed: Needed | None = None) -> Part:
        folder = self._folder(name)
        tensors = {}
        if needed is not None:
            if (name, needed.key) not in self._tensors:
                self._tensors[name, needed.key] = self._measured(name, needed)
            tensors = {needed.key: found} if (found := self._tensors[name, needed.key]) else {}
        return Part(name, content_digest(folder), folder, tensors)

    def _measured(self, name: str, needed: Needed) -> Mapping[str, Tensor]:
        """Nothing where there are no samples for it; whoever needs it then says what is missing."""
        folder = self._folder(name)
        if needed.statistic is not None:
            try:
                return measure(self.model, self.tokenizer, folder, self._samples.get(name, ()), needed.statistic)
            except ValueError:
                return {}
        if not (neutral := self._neutral(name)):
            return {}
        twice = {name: folder, f"{name} again": folder}  # a composite has two members, whoever the second is
        return calibrate(self.model, twice, neutral, **needed.score)[name][needed.key]

    def _neutral(self, name: str) -> list[list[int]]:
        """Samples of the other experts, as a server chooses them."""
        own = {sample.prompt for sample in self._samples.get(name, ())}
        others = {sample.prompt for samples in self._samples.values() for sample in samples} - own
        chosen = sorted(others)
        if len(chosen) > NEUTRAL:
            chosen = sorted(Random(0).sample(chosen, NEUTRAL))
        form: Literal["chat", "completion"] = "chat" if getattr(self.tokenizer, "chat_template", None) else "completion"
        return [self.tokens(Prompt(text=text, form=form)) for text in chosen]


@dataclass(frozen=True)
class Needed:
    """What an expert has to bring beside its weights, and the key that it is known by.

    statistic  of an operator
    score      of a gate that compares it with what it is on neutral prompts: the probe's settings
    """

    key: str
    statistic: Statistic | None = None
    score: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> Needed | None:
        if recipe.kind == "blend":
            statistic = getattr(OPERATORS.get(recipe.operator or "cat"), "statistic", None)
            return None if statistic is None else cls(statistic, statistic)
        assert recipe.gate is not None
        members = tuple(Member(id=name, rows=1) for name in recipe.names)
        gate = gate_of(Layout(gate=recipe.gate, settings=recipe.settings, members=members))
        scorer, key = scorer_of(gate), statistics_key(gate)
        if scorer is None or key is None or not tables_of(gate):
            return None
        score = {"score": getattr(gate.settings, "score", recipe.gate), "centred": scorer.settings.centred}
        if score["score"] == "smile":
            score["k_gate"] = scorer.settings.k_gate
        return cls(key, score=score)


def prior(recipe: Recipe) -> list[float] | None:
    """What a gate's experts start from; the weights of a mixture as they are. None: the gate takes none."""
    assert recipe.gate is not None
    if not weighed(recipe.gate):
        return None
    weights = [weight for _, weight in recipe.experts]
    total = 1.0 if recipe.gate == "constant" else math.fsum(weights)
    return [weight / total for weight in weights]


@contextmanager
def gated(twin: Twin, weights: Sequence[float] | None, rows: int) -> Iterator[Step]:
    """A step of so many rows, evidence from nothing."""
    twin.given = None if weights is None else torch.tensor([list(weights)]).repeat(rows, 1)
    with twin.attached():
        yield twin.forward
