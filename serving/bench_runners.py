"""Who generates in `moerge bench gated`: vLLM and PEFT, each in a process of its own that answers through a pipe."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from serving.bench import BenchFailed
from serving.bench_gated import Runner, Timing, Work


@dataclass(frozen=True)
class Adapted:
    """What a kind of work runs with: an adapter's folder, and arguments that its requests bring along."""

    folder: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Child:
    """A runner in a process of its own. `make` is called there, with one thread; the others wait meanwhile."""

    def __init__(self, kinds: tuple[str, ...], make: Callable[..., Runner], *arguments: Any) -> None:
        self.kinds = kinds
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115 - closed by __exit__
        self._process = context.Process(target=serve, args=(theirs, self._log.name, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()  # ready

    def measure(self, kind: str, work: Work) -> Timing:
        self._pipe.send((kind, work))
        timing: Timing = self._answer()
        return timing

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            told = Path(self._log.name).read_text(errors="replace")[-2000:]
            raise BenchFailed(f"The process for {', '.join(self.kinds)} ended:\n{told}") from None
        if isinstance(answer, str):
            raise BenchFailed(f"Measuring {', '.join(self.kinds)} failed:\n{answer}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
        self._log.close()


def serve(pipe: Connection, log: str, make: Callable[..., Runner], arguments: tuple[Any, ...]) -> None:
    """The process of a Child: measure until the pipe closes. What goes wrong is sent as text, what is printed kept."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        runner = make(*arguments)
        pipe.send(None)
        while True:
            kind, work = pipe.recv()
            pipe.send(runner.measure(kind, work))
    except EOFError:
        sys.exit()
    except Exception:
        pipe.send(traceback.format_exc())


def prompts(work: Work) -> list[list[int]]:
    """Token ids, different for every prompt; above those of a tokenizer's special tokens."""
    return [[4 + (7 * i + 11 * p) % 90 for i in range(work.prompt)] for p in range(work.batch)]


class Clock:
    """When each token of a batch was there."""

    def __init__(self) -> None:
        self._times = [(time.perf_counter(), time.process_time())]

    def stamp(self) -> None:
        self._times.append((time.perf_counter(), time.process_time()))

    def timing(self, tokens: int) -> Timing:
        """Of a batch whose answers have `tokens` tokens each: a stamp for each of them, those of the first before."""
        (start, start_cpu), (first, first_cpu), (end, end_cpu) = (self._times[i] for i in (0, -tokens, -1))
        return Timing(first - start, first_cpu - start_cpu, end - first, end_cpu - first_cpu)


class VllmRunner:
    def __init__(self, model: Path, kinds: Mapping[str, Adapted], max_rank: int, longest: int, step: int) -> None:
        from serving.engine.offline import OfflineVllm

        self.kinds, self._adapted = tuple(kinds), kinds
        folders = {each.folder for each in kinds.values() if each.folder}
        plugin = "stock" not in kinds
        self._vllm = OfflineVllm(
            model, max_rank=max_rank, slots=max(1, len(folders)), longest=longest, step=step, plugin=plugin
        )
        for folder in sorted(folders):
            self._vllm.load(folder)

    def measure(self, kind: str, work: Work) -> Timing:
        adapted, clock = self._adapted[kind], Clock()
        self._vllm.generate(prompts(work), work.tokens, adapted.folder, adapted.arguments, clock.stamp)
        return clock.timing(work.tokens)


class PeftRunner:
    """`peft_single`: one adapter; `peft_arrow`: `create_arrow_model`; with transformers' `generate`."""

    kinds: tuple[str, ...] = ("peft_single", "peft_arrow")

    def __init__(self, model: Path, experts: list[Path], top_k: int) -> None:
        import torch
        from peft import ArrowConfig, PeftModel, create_arrow_model
        from transformers import AutoModelForCausalLM

        def base() -> Any:
            return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

        arrow = create_arrow_model(base(), [str(each) for each in experts], ArrowConfig(top_k=top_k, rng_seed=0))
        single = PeftModel.from_pretrained(base(), str(experts[0]))
        self._models = {"peft_single": single.eval(), "peft_arrow": arrow.eval()}

    def measure(self, kind: str, work: Work) -> Timing:
        import torch

        asked, clock = torch.tensor(prompts(work)), Clock()

        def stamp(ids: Any, scores: Any) -> Any:  # a logits processor: called once for every token of the batch
            clock.stamp()
            return scores

        with torch.inference_mode():
            self._models[kind].generate(
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                do_sample=False,
                min_new_tokens=work.tokens,
                max_new_tokens=work.tokens,
                logits_processor=[stamp],
                eos_token_id=None,
                pad_token_id=0,
            )
        return clock.timing(work.tokens)
