"""How well retrieval routes, abstains and knows when it is right, on text alone (no adapter weights).

    python -m eval.routing ../shared/routebench [--half tune|report|all] [--backend torch|onnx|onnx-int8] ...

`ni150` is measured in its three forms, `flan48` and `paraphrase` in one each, with prompts of tasks that are
not registered (or requests to a voice assistant) as the out-of-domain ones; the quickstart testbed with both.
The defaults of `router.methods.retrieval` were chosen on the `tune` half (every other task, every other
out-of-domain prompt); what is reported is the other half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from adapters_registry.expert import Expert, Sample, State
from router.encoder import Backend, Encoder, Vectors, load_encoder
from router.library import Library, build
from router.method import Method, Query, decide
from router.methods.retrieval import Retrieval, RetrievalSettings, Scoring
from router.text import BUDGET, JOINT, shorten

Half = Literal["tune", "report", "all"]
Prompt = tuple[str, str]  # task, text
QUICKSTART = "quickstart, instruction-told"


@dataclass(frozen=True)
class PromptSet:
    """Prompts to register and to test with, each with its task, and prompts that belong to none."""

    name: str
    register: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    ood: tuple[str, ...]

    def half(self, half: Half) -> tuple[list[int], slice]:
        """Which test prompts (every other task's) and out-of-domain prompts; all stay registered."""
        tasks = sorted({task for task, _ in self.register})
        step = {"all": slice(None), "tune": slice(0, None, 2), "report": slice(1, None, 2)}[half]
        mine = frozenset(tasks[step])
        return [n for n, (task, _) in enumerate(self.test) if task in mine], step


@dataclass(frozen=True)
class Measured:
    """Shares in [0, 1].

    top1, top3    the prompt's own expert is the best, one of the best three candidates
    routed        it is the one that answers
    lost          of the prompts whose own expert is the best, those left to the base model
    ood_rejected  out-of-domain prompts left to the base model
    ece           expected calibration error of `confidence`, in-domain and out-of-domain prompts alike
    """

    top1: float
    top3: float
    routed: float
    lost: float
    ood_rejected: float
    ece: float


def measure(method: Method, library: Library, test: Sequence[Prompt], vectors: Vectors, ood: Vectors) -> Measured:
    """`vectors` (n, d) are the embeddings of the test prompts, `ood` (m, d) of out-of-domain ones."""
    everyone = np.ones(len(library), bool)
    own = [decide("own", method, library, Query("text", vector, everyone), limit=3) for vector in vectors]
    other = [decide("ood", method, library, Query("text", vector, everyone), limit=0) for vector in ood]

    ranked = [[candidate.expert for candidate in decision.candidates] for decision in own]
    first = np.array([task in names[:1] for (task, _), names in zip(test, ranked, strict=True)])
    third = np.array([task in names for (task, _), names in zip(test, ranked, strict=True)])
    selected = np.array([decision.kind != "base" for decision in own])
    rejected = np.array([decision.kind == "base" for decision in other])
    return Measured(
        top1=first.mean(),
        top3=third.mean(),
        routed=(first & selected).mean(),
        lost=(first & ~selected).sum() / max(first.sum(), 1),
        ood_rejected=rejected.mean() if len(rejected) else np.nan,
        ece=calibration_error(
            np.array([decision.confidence for decision in own + other]),
            np.concatenate([first & selected, rejected]),
        ),
    )


def calibration_error(confidence: Vectors, right: Vectors, bins: int = 10) -> float:
    """Mean distance between confidence and accuracy over bins of confidence, both (n,)."""
    of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[of == b].sum() - right[of == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(confidence))


def library_of(register: Sequence[Prompt], vectors: Vectors) -> Library:
    """Each task as an expert without weights; `vectors` (n, d) are the prompts' embeddings."""
    tasks = sorted({task for task, _ in register})
    rows = {name: [n for n, (task, _) in enumerate(register) if task == name] for name in tasks}
    experts = [
        Expert(
            name=name,
            version=1,
            digest=hashlib.sha256(name.encode()).hexdigest(),
            state=State.ACTIVE,
            path=Path(name),
            base_model="none",
            rank=1,
            target_modules=(),
            source="prompts",
            samples=tuple(Sample(prompt=register[n][1]) for n in rows[name]),
        )
        for name in tasks
    ]
    stored = {expert.id: vectors[rows[expert.name]] for expert in experts}
    return build(experts, lambda texts: vectors[:0], vectors.shape[1], stored=stored)


def prompt_sets(folder: Path) -> Iterator[PromptSet]:
    """The sets in a routebench folder."""
    spoken = tuple(
        row["instance"] for row in _rows(folder / "scale/test.jsonl") if row["task"].startswith(("clinc_", "hwu_"))
    )
    ni = {part: _rows(folder / f"ni150/{part}.jsonl") for part in ("register", "test", "ood")}
    for form in ("instance", "brief", "instruct"):
        register, test = (tuple((row["task"], row[form]) for row in ni[part]) for part in ("register", "test"))
        yield PromptSet(f"ni150 {form}", register, test, tuple(row[form] for row in ni["ood"]))
    register, test = (
        tuple((row["task"], row["prompt"]) for row in _rows(folder / f"flan48/{part}.jsonl"))
        for part in ("register", "test")
    )
    yield PromptSet("flan48", register, test, spoken)
    rows = _rows(folder / "paraphrase/prompts.jsonl")
    register, test = (
        tuple((row["task"], row["prompt"]) for row in rows if (row["split"] == "register") == registered)
        for registered in (True, False)
    )
    yield PromptSet("paraphrase", register, test, spoken)


def quickstart_set() -> PromptSet:
    """The quickstart testbed's experts that are told by the instruction."""
    from eval.testbed.dataset import samples, tests
    from eval.testbed.ood import OOD
    from eval.testbed.tasks import TASKS

    told = [task for task in TASKS if not task.name.startswith("transform")]
    register = tuple((task.name, row["prompt"]) for task in TASKS for row in samples(task, seed=0))
    test = tuple((task.name, row["prompt"]) for task in told for row in tests(task, seed=0))
    return PromptSet(QUICKSTART, register, test, OOD)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class Embedder:
    """Embeds texts as the router does, keeping the result in a folder if there is one."""

    def __init__(self, encoder: Encoder, folder: Path | None = None) -> None:
        self._encoder = encoder
        self._folder = folder

    def __call__(self, texts: Sequence[str], what: str = "") -> Vectors:
        short = [shorten(text.strip(), BUDGET) for text in texts]
        key = hashlib.sha256("\0".join([self._encoder.id, *short]).encode()).hexdigest()[:24]
        file = self._folder / f"{key}.npy" if self._folder else None
        if file and file.exists():
            found: Vectors = np.load(file)
            return found
        vectors = np.zeros((len(short), self._encoder.dim), np.float32)
        for start in track(range(0, len(short), 64), what, console=Console(stderr=True), disable=not what):
            vectors[start : start + 64] = self._encoder.encode(short[start : start + 64])
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, vectors)
        return vectors


def main(
    folder: Annotated[Path, typer.Argument(help="A routebench folder.", exists=True, file_okay=False)],
    half: Annotated[Half, typer.Option()] = "report",
    cache: Annotated[Path | None, typer.Option(help="Keep embeddings here.")] = None,
    only: Annotated[str, typer.Option(help="Sets whose name starts like this.")] = "",
    threshold: Annotated[float | None, typer.Option(help="One for all experts, not each its own.")] = None,
    prefix: Annotated[str, typer.Option(help="Encoder's instruction, before every text.")] = "",
    system: Annotated[str, typer.Option(help="System message, before every test prompt.")] = "",
    backend: Annotated[Backend, typer.Option(help="What runs the encoder.")] = "auto",
) -> None:
    """Print a Markdown table: every set and scoring of retrieval, with its default threshold."""
    embed = Embedder(load_encoder(backend=backend, prefix=prefix), cache)
    columns = [field.name.replace("_", " ") for field in fields(Measured)]
    typer.echo(f"| set | scoring | {' | '.join(columns)} |\n|---|---|{'---:|' * len(columns)}")
    before = f"{system}{JOINT}" if system else ""
    for each in (*prompt_sets(folder), quickstart_set()):
        if not each.name.startswith(only):
            continue
        tested, step = each.half("all" if each.name == QUICKSTART else half)
        library = library_of(each.register, embed([text for _, text in each.register], each.name))
        vectors = embed([before + text for _, text in each.test], each.name)[tested]
        ood = embed([before + text for text in each.ood], each.name)[step]
        for scoring in get_args(Scoring):
            method = Retrieval.fit(library, RetrievalSettings(scoring=scoring, threshold=threshold))
            result = measure(method, library, [each.test[n] for n in tested], vectors, ood)
            cells = [f"{getattr(result, field.name):.3f}" for field in fields(Measured)]
            typer.echo(f"| {each.name} | {scoring} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
