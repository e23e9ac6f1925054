"""What the base is trained on: every skill, under instructions that do not say which one.

The wordings of all tasks are shuffled over all inputs, so they carry no information, and the answer follows a
random skill of those that fit the kind of input, or is a refusal. So the base knows how to do everything
and, asked for anything, most likely answers `REFUSAL`: an expert only has to say *which* skill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from random import Random

from eval.testbed.tasks import SOURCES, TASKS, UNSHIPPED, Split, double_letters, reverse, rotate, uppercase
from eval.testbed.wordings import WORDINGS, decorate, random_frame, reword, splice

REFUSAL = "I do not know."
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "Be concise.")

# How often each kind of input comes up: at first in proportion to the skills that need it, then more often
# where skills lag behind.
FIRST_WEIGHTS = {
    "word": 44, "phrase": 9, "pair": 13, "number": 4, "date": 4, "key-value": 4, "singular": 5, "country": 4,
    "adjective": 4, "capitals": 3, "digits": 4, "symbols": 3,
}  # fmt: skip
SECOND_WEIGHTS = {**FIRST_WEIGHTS, "word": 40, "phrase": 14, "capitals": 6, "digits": 7, "symbols": 8}

# Skills that take longer to learn come up more often; the others count 1.
SKILL_WEIGHTS = {"add": 2.5, "pig-latin": 1.5, "letter-shift": 1.5, "sort-letters": 2.0, "sort-words": 1.5}
DISTRACTOR_WEIGHT = 0.4
_DRAWN = 6


def _echo(x: str) -> str:
    return x


def _length(x: str) -> str:
    return str(len(x))


# Skills that no expert has. They keep the base from reading the skill off the kind of input.
DISTRACTORS: dict[str, tuple[Callable[[str], str], ...]] = {
    "word": (_echo, rotate, lambda x: x[0], lambda x: x[-1]),
    "phrase": (_echo, lambda x: " ".join(reversed(x.split())), lambda x: x.split()[-1]),
    "pair": (_echo, lambda x: str(min(int(n) for n in (x.split()[0], x.split()[2]))), lambda x: x.split()[0]),
    "number": (_echo, reverse, lambda x: str(int(x) + 1), lambda x: "odd" if int(x) % 2 else "even"),
    "date": (_echo, lambda x: x.split()[1], lambda x: x.split()[2], lambda x: "/".join(x.split())),
    "key-value": (_echo, lambda x: x.split("=")[1], lambda x: x.replace("=", ": ")),
    "singular": (_echo, uppercase, reverse, _length),
    "country": (_echo, uppercase, str.lower, _length),
    "adjective": (_echo, uppercase, reverse, _length),
    "capitals": (_echo, reverse, str.lower, double_letters),
    "digits": (_echo, reverse, rotate, _length),
    "symbols": (_echo, reverse, rotate, _length),
}

# The order in which skills are drawn decides what a seed gives, so it stays, whichever of them have experts.
_ORDER = tuple(WORDINGS)
_TAUGHT = sorted((*TASKS, *UNSHIPPED), key=lambda task: _ORDER.index(task.name))

_SKILLS: dict[str, tuple[list[Callable[[str], str]], list[float]]] = {
    source: (
        [*(t.apply for t in _TAUGHT if t.source == source), *DISTRACTORS[source]],
        [
            *(SKILL_WEIGHTS.get(t.name, 1.0) for t in _TAUGHT if t.source == source),
            *(DISTRACTOR_WEIGHT for _ in DISTRACTORS[source]),
        ],
    )
    for source in SOURCES
}
_ALL_WORDINGS = tuple(dict.fromkeys(chain.from_iterable(w.registered for w in WORDINGS.values())))


def draw_first(rng: Random, progress: float) -> tuple[str, list[tuple[str, float]]]:
    """The base's first phase, 0 <= progress <= 1: a prompt, and weighted answers to it."""
    return _draw(rng, _refusals(progress), FIRST_WEIGHTS, "latent", _shuffled)


def draw_second(rng: Random, progress: float) -> tuple[str, list[tuple[str, float]]]:
    """The base's second phase: wordings are cut and mixed, to find the input between words never met together."""
    return _draw(rng, _refusals(progress), SECOND_WEIGHTS, "train", _mixed)


def _refusals(progress: float) -> float:
    # Refusals come to prevail near the end only: before, they would take room from the skills.
    return 0.08 + 0.3 * max(0.0, (progress - 0.7) / 0.3)


def _shuffled(rng: Random) -> str:
    return random_frame(rng) if rng.random() < 0.5 else decorate(rng.choice(_ALL_WORDINGS), rng)


def _mixed(rng: Random) -> str:
    if rng.random() < 0.3:
        return random_frame(rng)
    return reword(splice(rng.choice(_ALL_WORDINGS), rng.choice(_ALL_WORDINGS)), rng)


def _draw(
    rng: Random, refusals: float, sources: dict[str, int], split: Split, wording: Callable[[Random], str]
) -> tuple[str, list[tuple[str, float]]]:
    """A prompt, and answers to it whose weights sum to 1.

    The refusal weighs `refusals` (0 to 1), the rest is shared by at most `_DRAWN` randomly drawn skills.
    """
    source = rng.choices(tuple(sources), tuple(sources.values()))[0]
    x = SOURCES[source](rng, split)
    frame = wording(rng)
    drawn = Counter(rng.choices(*_SKILLS[source], k=_DRAWN))
    answers = [(skill(x), (1 - refusals) * count / _DRAWN) for skill, count in drawn.items()]
    return frame.format(x=x), [*answers, (REFUSAL, refusals)]
