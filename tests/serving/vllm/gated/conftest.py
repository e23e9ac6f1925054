"""An offline vLLM on the quickstart testbed, in float32, and composites of its experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from router.composite import Part, compose, statistics_key
from router.gating import gate_of
from router.gating.layout import Layout, Member
from serving.engine import Trace
from serving.engine.private import TRACE_METHOD
from serving.engine.transport import unpack

DATA = Path(__file__).parents[4] / "eval" / "testbed" / "data"
VOCABULARY = 103
#: Nats, over the whole vocabulary down to -35: float32's rounding over four layers, as for the base model itself.
TOLERANCE = 1e-4
#: (adapter or None, token ids of the prompt, what the request brings along)
Asked = tuple[str | None, Sequence[int], Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """Greedy tokens; log-probabilities (tokens, vocabulary) of each, and of the prompt's after the first."""

    tokens: list[int]
    logprobs: Tensor
    prompt: Tensor | None


@dataclass
class Engine:
    """The adapters it knows by name; `data` is the testbed, `root` where composites are built."""

    llm: Any
    root: Path
    data: Path = DATA
    paths: dict[str, Path] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)

    def lora(self, name: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        path = self.paths.setdefault(name, DATA / "experts" / name)
        return LoRARequest(name, self.ids.setdefault(name, len(self.ids) + 1), str(path))

    def load(self, name: str, path: Path) -> None:
        self.paths[name] = path
        self.llm.llm_engine.add_lora(self.lora(name))

    def make(self, gate: str, experts: Sequence[str], folder: Path = DATA / "experts", **settings: Any) -> str:
        """Build a composite of the experts in a folder, load it, and give its name."""
        name = f"{gate}-{'-'.join(experts)}-{settings}"
        if name not in self.paths:
            members = tuple(Member(id=expert, rows=1) for expert in experts)
            key = statistics_key(gate_of(Layout(gate=gate, settings=settings, members=members)))
            parts = [Part(e, e, folder / e, tensors=kept(folder / e, key)) for e in experts]
            composite = self.root / str(len(self.paths))
            compose(composite, parts, gate, settings, max_rank=64)
            self.load(name, composite)
        return name

    def ask(self, asked: Sequence[Asked], limit: int = 24, prompt: bool = False) -> list[Answer]:
        """All at once; with `prompt` the prompt's log-probabilities as well."""
        from vllm import SamplingParams

        common = {"temperature": 0, "max_tokens": limit, "ignore_eos": True, "logprobs": VOCABULARY}
        common |= {"prompt_logprobs": VOCABULARY} if prompt else {}
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for _, ids, _ in asked],
            [SamplingParams(**common, extra_args=dict(arguments) or None) for *_, arguments in asked],
            lora_request=[self.lora(name) for name, *_ in asked],
            use_tqdm=False,
        )
        return [
            Answer(
                list(output.outputs[0].token_ids),
                table(output.outputs[0].logprobs),
                table(output.prompt_logprobs[1:]) if prompt else None,
            )
            for output in outputs
        ]

    def same(self, asked: Sequence[Asked], expected: Callable[[list[int], Asked], Tensor]) -> list[bool]:
        """Whether prompt and decode log-probabilities and greedy tokens are `expected`'s, for each request.

        `expected(tokens of prompt and answer, asked)` -> (tokens, vocabulary) log-probabilities of what follows each.
        """
        good = []
        for each, answer in zip(asked, self.ask(asked, prompt=True), strict=True):
            assert answer.prompt is not None
            found = torch.cat([answer.prompt, answer.logprobs])
            wanted = expected([*each[1], *answer.tokens], each)[: len(found)]
            off = (found - wanted).abs()
            greedy = wanted[len(each[1]) - 1 :].argmax(-1).tolist() == answer.tokens
            good.append(greedy and bool(off.max() < TOLERANCE) and bool(off.mean() < TOLERANCE / 10))
        return good

    def trace(self, key: str) -> Trace | None:
        found = self.llm.collective_rpc(TRACE_METHOD, args=(key,))[0]
        return None if found is None else unpack(*found)


def table(logprobs: Sequence[Any]) -> Tensor:
    """vLLM's dictionaries -> (tokens, vocabulary)"""
    rows = torch.full((len(logprobs), VOCABULARY), torch.nan)
    for row, each in zip(rows, logprobs, strict=True):
        for token, value in each.items():
            row[token] = value.logprob
    return rows


def kept(expert: Path, key: str | None) -> dict[str, dict[str, Any]]:
    """Vectors and statistics for an expert, as training and calibration would leave them; random is enough here."""
    g = torch.Generator().manual_seed(sum(map(ord, expert.name)))
    factors = load_file(expert / "adapter_model.safetensors")
    width = {
        each.split("base_model.model.")[1].split(".lora_A")[0]: a for each, a in factors.items() if "lora_A" in each
    }
    found: dict[str, dict[str, Any]] = {}
    for vectors in ("phatgoose", "meteora"):
        found[vectors] = {module: torch.randn(a.shape[1], generator=g).numpy() for module, a in width.items()}
    if key is not None:
        most = max(len(a) for a in width.values())
        found[key] = {}
        for module in width:
            found[key][f"{module}.mean"] = torch.rand((), generator=g).numpy()
            found[key][f"{module}.deviation"] = (0.5 + torch.rand((), generator=g)).numpy()
            found[key][f"{module}.centre"] = torch.randn(most, generator=g).numpy()
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """`start(**options of vllm.LLM)`; it stops with the test module."""
    threads, engines = torch.get_num_threads(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # binding wants a NUMA node for each worker
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)

        def build(**options: Any) -> Engine:
            from vllm import LLM

            llm = LLM(
                model=str(DATA / "base"),
                dtype="float32",
                enforce_eager=True,
                enable_lora=True,
                max_cpu_loras=24,
                max_lora_rank=64,
                lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                max_model_len=160,
                block_size=32,
                max_num_batched_tokens=64,
                max_num_seqs=16,
                max_logprobs=VOCABULARY,
                seed=0,
                **options,
            )
            engines.append(Engine(llm, tmp_path_factory.mktemp("composites")))
            return engines[-1]

        yield build
        for engine in engines:
            client = engine.llm.llm_engine.engine_core
            client.shutdown()
            client.ctx.destroy(linger=0)  # vLLM leaves it to the interpreter's end
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DATA / "base", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[tuple[int, ...]]]:
    """Token ids by expert, as the chat template makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "base")

    def ids(line: str) -> tuple[int, ...]:
        message = [{"role": "user", "content": json.loads(line)["prompt"]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    return {
        path.stem: [ids(line) for line in path.read_text().splitlines()[:8]]
        for path in sorted((DATA / "test").glob("*.jsonl"))
    }
