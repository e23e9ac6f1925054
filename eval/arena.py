"""The testbed as an arena for gates: its model, experts and prompts, and what retrieval makes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.routing import library_of
from eval.testbed.check import expert_names, load_base, read_tests
from eval.testbed.manifest import read_jsonl
from eval.testbed.tasks import BY_NAME
from eval.testbed.tokens import chat
from eval.twin import Composite, Kept, Twin
from router.encoder import SentenceTransformerEncoder
from router.gating.layout import Layout
from router.method import Query
from router.methods.retrieval import Retrieval, RetrievalSettings

DATA = Path(__file__).parent / "testbed" / "data"
BATCH = 128
LIMIT = 32  # tokens of an answer
Set = tuple[str, ...]  # names of the members of a composite


@dataclass(frozen=True)
class Prompt:
    """`owners` are the experts it was made for: one, or the two of a composition, the first of them first."""

    text: str
    answer: str
    owners: Set

    @property
    def told(self) -> str:
        return "composition" if len(self.owners) > 1 else BY_NAME[self.owners[0]].told


@dataclass
class Arena:
    """Everything that is measured on.

    samples     (expert, text) of all registration samples
    similarity  (prompts, K) retrieval's scores
    kept        tensors kept with each expert
    alike       (K, K) retrieval's score of the column's expert for the row's samples, on average
    """

    data: Path
    names: Set
    prompts: list[Prompt]
    samples: list[tuple[str, str]]
    folders: dict[str, Path]
    similarity: NDArray[np.float64]
    kept: dict[str, dict[str, Mapping[str, Tensor]]] = field(default_factory=lambda: defaultdict(dict))
    alike: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        self.model, self.tokenizer = load_base(self.data)
        self._composite = lru_cache(8)(self._stack)

    def ids(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(chat(text), add_special_tokens=False)["input_ids"])

    def owned(self) -> Tensor:
        """(prompts,) position of the first expert that a prompt was made for."""
        return torch.tensor([self.names.index(prompt.owners[0]) for prompt in self.prompts])

    def shortlists(self, size: int) -> list[Set]:
        """Of every prompt: the experts that retrieval finds most alike, in the order of `names`."""
        best = np.argsort(-self.similarity, axis=1, kind="stable")[:, :size]
        return [tuple(self.names[k] for k in sorted(row)) for row in best.tolist()]

    def prior(self, temperature: float) -> Tensor:
        """(prompts, K) softmax over retrieval's scores."""
        return torch.softmax(torch.from_numpy(self.similarity) / temperature, 1).float()

    def composite(self, gate: str, settings: Mapping[str, Any] | None = None, members: Set | None = None) -> Composite:
        """Of all experts, or of some."""
        whole = self._composite(gate, tuple(sorted((settings or {}).items())))
        return whole if members is None or members == self.names else only(whole, members)

    def _stack(self, gate: str, settings: tuple[tuple[str, Any], ...]) -> Composite:
        return Composite.stack(self.folders, gate, dict(settings), cast(Mapping[str, Kept], self.kept))

    def answers(
        self,
        gate: str,
        settings: Mapping[str, Any],
        sets: Sequence[Set],
        given: Tensor | None = None,
        decay: float = 1.0,
    ) -> list[str]:
        """The answer to every prompt from the composite of its set, with weights `given (prompts, K)` if any."""
        replies = [""] * len(self.prompts)

        def answer(twin: Twin, which: list[int], members: Set) -> None:
            tokens = twin.generate(
                [self.ids(self.prompts[n].text) for n in which],
                limit=LIMIT,
                eos=self.tokenizer.eos_token_id,
                given=None if given is None else self._among(given[which], members),
            )
            for n, text in zip(which, self.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                replies[n] = text.strip()

        self._each(gate, settings, sets, answer, decay)
        return replies

    def evidence(self, settings: Mapping[str, Any], sets: Sequence[Set], decay: float = 1.0) -> Tensor:
        """(prompts, K) what the probe has gathered after each prompt's last token, -inf for experts not in its set."""
        found = torch.full((len(self.prompts), len(self.names)), float("-inf"))

        def read(twin: Twin, which: list[int], members: Set) -> None:
            twin.generate([self.ids(self.prompts[n].text) for n in which], limit=1)
            columns = [self.names.index(name) for name in members]
            found[torch.tensor(which)[:, None], torch.tensor(columns)] = twin.evidence.total.float()

        self._each("probe", settings, sets, read, decay)
        return found

    def _each(
        self,
        gate: str,
        settings: Mapping[str, Any],
        sets: Sequence[Set],
        work: Callable[[Twin, list[int], Set], None],
        decay: float = 1.0,
    ) -> None:
        """Calls `work` for prompts of one set, of similar length, at most a batch of them."""
        by_set = defaultdict(list)
        for n, members in enumerate(sets):
            by_set[members].append(n)
        for members, numbers in by_set.items():
            twin = Twin(self.model, self.composite(gate, settings, members), decay=decay)
            numbers.sort(key=lambda n: len(self.prompts[n].text))
            for start in range(0, len(numbers), BATCH):
                work(twin, numbers[start : start + BATCH], members)

    def _among(self, given: Tensor, members: Set) -> list[list[float]]:
        weights = given[:, [self.names.index(name) for name in members]]
        return cast(list[list[float]], (weights / weights.sum(1, keepdim=True).clamp_min(1e-30)).tolist())

    def right(self, replies: Sequence[str]) -> Tensor:
        """(prompts,) 1 where a reply is the answer to the letter."""
        return torch.tensor([float(r == p.answer) for r, p in zip(replies, self.prompts, strict=True)])


def only(composite: Composite, members: Set) -> Composite:
    """The same composite of some of its members, in the same order."""
    layout = composite.layout
    chosen = [k for k, member in enumerate(layout.members) if member.id in members]
    rows = [row for k in chosen for row in range(layout.starts[k], layout.starts[k] + layout.blocks[k])]
    if layout.extra:
        rows += [sum(layout.blocks) + k for k in chosen]
    smaller = Layout.model_validate(
        {
            **layout.model_dump(),
            "members": [layout.members[k] for k in chosen],
            "extra": len(chosen) if layout.extra else 0,
        }
    )
    tables = {
        name: table[rows if name.endswith((".scale", ".centre")) else chosen]
        for name, table in composite.tables.items()
    }
    return Composite(smaller, {m: (A[rows], B[:, rows]) for m, (A, B) in composite.factors.items()}, tables)


def load(prompts: int, seed: int = 0, data: Path = DATA, *, compositions: bool = True, others: bool = False) -> Arena:
    """The shipped testbed, with so many test prompts of each expert, and all compositions if they are wanted.

    `others`: the test prompts that are left out otherwise, to choose settings on.
    """
    names = tuple(expert_names(data))
    rng = Random(f"gates {seed}")
    tests = read_tests(data)
    rows: list[Prompt] = []
    for name in names:
        drawn = rng.sample(tests[name], min(prompts, len(tests[name])))
        wanted = [row for row in tests[name] if row not in drawn] if others else drawn
        rows += [Prompt(row["prompt"], row["answer"], (name,)) for row in wanted]
    rows += [
        Prompt(row["prompt"], row["answer"], (row["first"], row["second"]))
        for row in (read_jsonl(data / "compositions.jsonl") if compositions else ())
    ]
    samples = [(name, row["prompt"]) for name in names for row in read_jsonl(data / "samples" / f"{name}.jsonl")]
    folders = {name: data / "experts" / name for name in names}
    scores = similarities(names, samples, [row.text for row in rows] + [text for _, text in samples])
    own, theirs = scores[: len(rows)], scores[len(rows) :]
    owners = np.array([owner for owner, _ in samples])
    alike = np.stack([theirs[owners == name].mean(0) for name in names])
    return Arena(data, names, rows, samples, folders, own, alike=alike)


def similarities(names: Set, samples: Sequence[tuple[str, str]], texts: Sequence[str]) -> NDArray[np.float64]:
    """(texts, K) retrieval's scores: the cosine with the mean of an expert's samples."""
    encoder = SentenceTransformerEncoder()
    library = library_of(samples, encoder.encode([text for _, text in samples]))
    method = Retrieval.fit(library, RetrievalSettings())
    order = [[expert.name for expert in library.experts].index(name) for name in names]
    everyone = np.ones(len(library), bool)
    scores = [
        method.score(Query(text, vector, everyone)) for text, vector in zip(texts, encoder.encode(texts), strict=True)
    ]
    return np.stack(scores)[:, order]
