"""The measurements behind `moerge bench gated`: what a gate costs, in one run that takes turns.

Kinds of work (one adapter, a stack without a gate, every gate, stock vLLM, PEFT) run one after the other, round after
round, each engine in a process of its own with one thread and only one of them computing. Whatever else the machine
does then meets all kinds alike, and the median over rounds of the *paired* ratio of two kinds is steady where tokens
per second are not.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Work:
    """One measurement: `batch` prompts of `prompt` tokens, and how many tokens each answer has; 1: only the prompt."""

    name: str
    batch: int
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Timing:
    """Wall-clock and processor seconds until the batch's first token, and from that to its last."""

    first: float
    first_cpu: float
    decode: float = 0.0
    decode_cpu: float = 0.0


class Runner(Protocol):
    """Something that generates, with the model and the adapters it was made for."""

    kinds: tuple[str, ...]

    def measure(self, kind: str, work: Work) -> Timing: ...


#: Kinds that others are compared with, when they take part.
AGAINST = ("stack", "base", "stock", "peft_single", "peft_arrow")
#: How much shorter work is where stock vLLM's time grows with the batch: its speed per token is what counts.
STOCK, SHORTER = "stock", 4

Tell = Callable[[str, int, int], None]  # what is being done, measurements done, measurements in all

#: Gate -> settings: what each costs as it is used. Arrow as PEFT has it in the same run.
GATES: dict[str, dict[str, Any]] = {
    "arrow": {"top_k": 2},
    "spectr": {},
    "lag": {"top_k": 2},
    "smile": {},
    "phatgoose": {},
    "constant": {},
    "evidence": {},
}
EXPERTS, MAX_RANK, PROMPT = 4, 64, 32


def bench_gated(
    batches: Sequence[int], tokens: int, prefill: int, rounds: int, gates: Sequence[str], tell: Tell
) -> dict[str, Any]:
    """All the figures of `moerge bench gated`, of a random model. Raises BenchFailed."""
    from serving import bench_runners as runners
    from serving.synthetic import write_composite, write_stack, write_synthetic

    plan = works(batches, tokens, prefill)
    longest = max(work.prompt + work.tokens for work in plan)
    with tempfile.TemporaryDirectory(prefix="moerge-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        tell("making a random model", 0, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT looks for the random model on the Hub
            write_synthetic(folder)
        model, experts = folder / "base", sorted(path.parent for path in folder.glob("*/adapter_config.json"))[:EXPERTS]
        write_stack(folder / "stack", experts)
        single = runners.Adapted(experts[0])
        ours = {"base": runners.Adapted(), "plain": single, "stack": runners.Adapted(folder / "stack")}
        for gate in gates:
            write_composite(folder / gate, experts, gate, GATES[gate], MAX_RANK)
            weights = {"moerge_weights": [0.4, 0.3, 0.2, 0.1]} if gate == "constant" else {}
            ours[gate] = runners.Adapted(folder / gate, weights)
        limits = (MAX_RANK, longest, max(longest, *(work.batch * work.prompt for work in plan)))
        starts: list[tuple[tuple[str, ...], Callable[..., Runner], tuple[Any, ...]]] = [
            ((STOCK,), runners.VllmRunner, (model, {STOCK: single}, *limits)),
            (tuple(ours), runners.VllmRunner, (model, ours, *limits)),
            (runners.PeftRunner.kinds, runners.PeftRunner, (model, experts, GATES["arrow"]["top_k"])),
        ]
        children = []
        for kinds, make, arguments in starts:
            tell(f"starting {', '.join(kinds)}", 0, 0)
            children.append(stack.enter_context(runners.Child(kinds, make, *arguments)))
        return interleave(children, plan, rounds, tell)


def works(batches: Sequence[int], tokens: int, prefill: int) -> list[Work]:
    """Answers at every batch size, and one long prompt."""
    answers = [Work(str(batch), batch, PROMPT, tokens) for batch in batches]
    return [*answers, Work("prefill", 1, prefill, 1)] if prefill else answers


def interleave(runners: Sequence[Runner], plan: Sequence[Work], rounds: int, tell: Tell) -> dict[str, Any]:
    """Every kind at every work, `rounds` times in a new order each, after one short round that warms up."""
    whose = {kind: runner for runner in runners for kind in runner.kinds}
    order = random.Random(0)
    taken: dict[str, dict[str, list[Timing]]] = {work.name: {kind: [] for kind in whose} for work in plan}
    total = len(plan) * len(whose) * (rounds + 1)
    done = 0
    for turn in range(-1, rounds):
        for work in plan:
            kinds = list(whose)
            order.shuffle(kinds)
            for kind in kinds:
                tell(f"{kind}, {work.name}", done, total)
                asked = shortened(work, 4) if turn < 0 else work
                if kind == STOCK and work.batch >= SHORTER:
                    asked = shortened(asked, SHORTER)
                timing = whose[kind].measure(kind, asked)
                done += 1
                if turn >= 0:
                    times = (work.tokens - 1) / max(1, asked.tokens - 1)
                    scaled = replace(timing, decode=timing.decode * times, decode_cpu=timing.decode_cpu * times)
                    taken[work.name][kind].append(scaled)
    return summary(taken, plan, rounds)


def shortened(work: Work, times: int) -> Work:
    """The same with fewer tokens to decode."""
    return work if work.tokens == 1 else replace(work, tokens=max(3, (work.tokens - 1) // times + 1))


@dataclass(frozen=True)
class Measure:
    """What is reported of a piece of work: `tokens` in `seconds` of its timing."""

    name: str
    work: Work
    tokens: int
    seconds: Callable[[Timing], float]
    cpu: Callable[[Timing], float]


def measures(work: Work) -> list[Measure]:
    """Of answers: from the request to the last token (`8`), and from the first token to the last (`8-decode`)."""

    if work.tokens == 1:
        return [Measure(work.name, work, work.batch * work.prompt, lambda t: t.first, lambda t: t.first_cpu)]
    return [
        Measure(
            work.name,
            work,
            work.batch * work.tokens,
            lambda t: t.first + t.decode,
            lambda t: t.first_cpu + t.decode_cpu,
        ),
        Measure(
            f"{work.name}-decode", work, work.batch * (work.tokens - 1), lambda t: t.decode, lambda t: t.decode_cpu
        ),
    ]


def summary(taken: Mapping[str, Mapping[str, list[Timing]]], plan: Sequence[Work], rounds: int) -> dict[str, Any]:
    """`ratios["arrow/stack@8"]`: the speed of the first over the second, median of the rounds' pairs; `cpu_ratios` the
    same by processor time; `ranges` the lowest and the highest round.
    """
    speeds: dict[str, dict[str, float]] = {}
    ratios, cpu, ranges = {}, {}, {}
    for measure in (each for work in plan for each in measures(work)):
        timings = taken[measure.work.name]
        speeds[measure.name] = {
            kind: statistics.median(measure.tokens / measure.seconds(timing) for timing in timings[kind])
            for kind in timings
        }
        for other in (each for each in AGAINST if each in timings):
            for kind in (each for each in timings if each != other):
                key = f"{kind}/{other}@{measure.name}"
                pairs = list(zip(timings[other], timings[kind], strict=True))
                each = [measure.seconds(theirs) / measure.seconds(mine) for theirs, mine in pairs]
                ratios[key], ranges[key] = statistics.median(each), (min(each), max(each))
                cpu[key] = statistics.median(measure.cpu(theirs) / measure.cpu(mine) for theirs, mine in pairs)
    return {
        "rounds": rounds,
        "works": [asdict(work) for work in plan],
        "tokens_per_s": speeds,
        "ratios": ratios,
        "cpu_ratios": cpu,
        "ranges": ranges,
    }
