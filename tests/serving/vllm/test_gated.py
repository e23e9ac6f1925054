"""Composites in the real vLLM, in float32, against PEFT and against hooks on Transformers; and what must not break it.

One engine for the file: small KV blocks and steps, and a KV cache too small for all requests, so that prompts are cut
into chunks, prefixes are shared, and running requests are preempted.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.explicit import FORMULAS
from eval.twin import Composite, Twin, read_deltas
from router.composite import Part, compose, statistics_key
from router.gating import gate_of
from router.gating.layout import KEY, MARK, Layout, Member
from serving.engine import Trace
from serving.engine.batch import COLLECT, TRACE, WEIGHTS
from serving.engine.private import TRACE_METHOD
from serving.engine.transport import unpack

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

DATA = Path(__file__).parents[3] / "eval" / "testbed" / "data"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EQUAL = ("add", "reverse", "initials", "opposite")  # rank 16, all modules
MIXED = ("roman", "iso-date", "json", "sort-words")  # ranks 4 to 16, patterns, attention only, rsLoRA
#: Nats, over the whole vocabulary down to -35: float32's rounding over four layers, as for the base model itself.
TOLERANCE = 1e-4
VOCABULARY = 103


@dataclass
class Engine:
    """An offline vLLM and the adapters that it knows by name."""

    llm: Any
    paths: dict[str, Path] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)

    def lora(self, name: str | None, path: Path | None = None) -> Any:
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        self.paths.setdefault(name, path or DATA / "experts" / name)
        return LoRARequest(name, self.ids.setdefault(name, len(self.ids) + 1), str(self.paths[name]))

    def load(self, name: str, path: Path | None = None) -> None:
        self.llm.llm_engine.add_lora(self.lora(name, path))

    def ask(self, asked: Sequence[Ask], limit: int = 24, prompt: bool = False) -> list[Any]:
        """All at once; log-probabilities of the whole vocabulary, with `prompt` of prompt tokens as well."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=limit,
                ignore_eos=True,
                logprobs=VOCABULARY,
                prompt_logprobs=VOCABULARY if prompt else None,
                extra_args=each.arguments or None,
            )
            for each in asked
        ]
        prompts = [{"prompt_token_ids": list(each.prompt)} for each in asked]
        lora = [self.lora(each.model) for each in asked]
        return list(self.llm.generate(prompts, parameters, lora_request=lora, use_tqdm=False))

    def trace(self, key: str) -> Trace | None:
        (found,) = self.llm.collective_rpc(TRACE_METHOD, args=(key,))
        return None if found is None else unpack(*found)


@dataclass(frozen=True)
class Ask:
    model: str | None
    prompt: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


def rows(logprobs: Sequence[Any]) -> torch.Tensor:
    """vLLM's dictionaries -> (tokens, vocabulary)"""
    table = torch.full((len(logprobs), VOCABULARY), torch.nan)
    for row, each in zip(table, logprobs, strict=True):
        for token, value in each.items():
            row[token] = value.logprob
    return table


def answers(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        patch.setenv("OMP_NUM_THREADS", "1")
        from vllm import LLM

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        llm = LLM(
            model=str(DATA / "base"),
            dtype="float32",
            enforce_eager=True,
            enable_lora=True,
            max_loras=8,
            max_cpu_loras=24,
            max_lora_rank=64,
            lora_target_modules=list(MODULES),
            max_model_len=160,
            block_size=32,
            num_gpu_blocks_override=24,
            max_num_batched_tokens=64,
            max_num_seqs=16,
            max_logprobs=VOCABULARY,
            disable_log_stats=False,
            seed=0,
        )
        try:
            yield Engine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()
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


def kept_of(name: str, key: str | None) -> dict[str, dict[str, Any]]:
    """Vectors and statistics for an expert, as training and calibration would leave them; random is enough here."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    factors = load_file(DATA / "experts" / name / "adapter_model.safetensors")
    width = {key.split("base_model.model.")[1].split(".lora_A")[0]: a for key, a in factors.items() if "lora_A" in key}
    kept: dict[str, dict[str, Any]] = {}
    for vectors in ("phatgoose", "meteora"):
        kept[vectors] = {module: torch.randn(a.shape[1], generator=g).numpy() for module, a in width.items()}
    if key is not None:
        most = max(len(a) for a in width.values())
        kept[key] = {}
        for module in width:
            kept[key][f"{module}.mean"] = torch.rand((), generator=g).numpy()
            kept[key][f"{module}.deviation"] = (0.5 + torch.rand((), generator=g)).numpy()
            kept[key][f"{module}.centre"] = torch.randn(most, generator=g).numpy()
    return kept


Make = Callable[..., str]


@pytest.fixture(scope="module")
def make(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(gate, experts, **settings)` builds a composite, loads it, and gives its name."""
    root = tmp_path_factory.mktemp("composites")

    def build(gate: str, experts: Sequence[str] = EQUAL, **settings: Any) -> str:
        name = f"{gate}-{'-'.join(experts)}-{settings}"
        if name not in engine.paths:
            folder = root / str(len(list(root.iterdir())))
            members = tuple(Member(id=expert, rows=1) for expert in experts)
            key = statistics_key(gate_of(Layout(gate=gate, settings=settings, members=members)))
            parts = [Part(e, e, DATA / "experts" / e, tensors=kept_of(e, key)) for e in experts]
            compose(folder, parts, gate, settings, max_rank=64)
            engine.load(name, folder)
        return name

    return build


def padded(name: str, folder: Path, rank: int = 16) -> None:
    """A copy that has this rank in all modules of the model, and a scale of 1."""
    deltas, _ = read_deltas(DATA / "experts" / name)
    tensors = {}
    for layer in range(4):
        for module in MODULES:
            place = f"model.layers.{layer}.{'self_attn' if module[0] in 'qkvo' else 'mlp'}.{module}"
            d_in, d_out = {"down_proj": (256, 128), "gate_proj": (128, 256), "up_proj": (128, 256)}.get(
                module, (128, 128)
            )
            U, S, Vh = torch.linalg.svd(deltas.get(place, torch.zeros(d_out, d_in)).double(), full_matrices=False)
            tensors[f"base_model.model.{place}.lora_A.weight"] = Vh[:rank].float().contiguous()
            tensors[f"base_model.model.{place}.lora_B.weight"] = (U * S)[:, :rank].float().contiguous()
    config = json.loads((DATA / "experts" / name / "adapter_config.json").read_text())
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "target_modules": list(MODULES)}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**config, **plain, "r": rank, "lora_alpha": rank}))
    save_file(tensors, folder / "adapter_model.safetensors")


def peft_arrow(experts: Sequence[str], folder: Path, top_k: int) -> Any:
    """PEFT's Arrow, with exact prototypes instead of 15 power iterations from a random start."""
    from peft import ArrowConfig, create_arrow_model
    from transformers import AutoModelForCausalLM

    for name in experts:
        padded(name, folder / name)
    model = AutoModelForCausalLM.from_pretrained(DATA / "base", dtype=torch.float32)
    config = ArrowConfig(top_k=top_k, router_temperature=1.0)
    model = create_arrow_model(model, [str(folder / name) for name in experts], config).eval()
    for module in model.modules():
        if arrow := getattr(module, "lora_arrow", {}):
            exact = [module.lora_A[f"task_{i}"].weight[0].detach() for i in range(len(experts))]  # first row of Vh
            alive = [module.lora_B[f"task_{i}"].weight.any() for i in range(len(experts))]
            prototypes = torch.stack([v * bool(here) for v, here in zip(exact, alive, strict=True)])
            arrow["arrow_router"].register_buffer("prototypes", prototypes, persistent=False)
            arrow["arrow_router"]._protos_ready = True
    return model


def same(engine: Engine, asked: Sequence[Ask], expected: Callable[[list[int], Ask], torch.Tensor]) -> list[bool]:
    """Whether prompt and decode log-probabilities and greedy tokens are `expected`'s, for each request.

    `expected(tokens of prompt and answer, asked)` -> (tokens, vocabulary) log-probabilities of what follows each.
    """
    good = []
    for each, output in zip(asked, engine.ask(asked, prompt=True), strict=True):
        answer, n = answers(output), len(each.prompt)
        found = torch.cat([rows(output.prompt_logprobs[1:]), rows(output.outputs[0].logprobs)])
        wanted = expected([*each.prompt, *answer], each)[: len(found)]
        greedy = wanted[n - 1 :].argmax(-1).tolist() == answer
        off = (found - wanted).abs()
        good.append(greedy and bool(off.max() < TOLERANCE) and bool(off.mean() < TOLERANCE / 10))
    return good


@pytest.mark.parametrize(("experts", "top_k"), [(EQUAL, 4), (EQUAL, 2), (MIXED, 3)])
def test_arrow_equals_peft_s(engine, make, prompts, tmp_path, experts, top_k):
    """A hard top k is discontinuous: where two scores agree to rounding, one request may differ."""
    model = peft_arrow(experts, tmp_path, top_k)

    @torch.inference_mode()
    def expected(ids: list[int], _: Ask) -> torch.Tensor:
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)

    name = make("arrow", experts, top_k=top_k)
    good = same(engine, [Ask(name, prompt) for expert in experts for prompt in prompts[expert][:1]], expected)
    assert sum(good) >= len(good) - (top_k < 4), good


HARD = ("lag", "phatgoose", "hilora", "meteora")
GATES = [
    ("arrow", EQUAL, {"normalise": "zscore", "shared": True}),
    ("spectr", MIXED, {"normalise": "rms"}),
    ("lag", MIXED, {"top_k": 2}),
    ("smile", MIXED, {"temperature": 0.5}),
    ("phatgoose", ("roman", "iso-date", "json"), {}),
    ("meteora", ("roman", "iso-date", "json"), {}),
    ("hilora", MIXED, {}),
    ("constant", MIXED, {}),
    ("evidence", MIXED, {"beta": 0.02}),
    ("probe", MIXED, {}),
]


@pytest.mark.parametrize(("gate", "experts", "settings"), GATES, ids=[gate for gate, _, _ in GATES])
def test_every_gate_equals_its_twin(engine, make, base, prompts, gate, experts, settings):
    """The twin has hooks on Transformers; where there is a formula for it, it forms dW x for every expert."""
    name = make(gate, experts, **settings)
    twin = Twin(base, Composite.read(engine.paths[name]), explicit=gate in FORMULAS)
    asked = [Ask(name, prompts[expert][3]) for expert in experts[:2]]
    if twin.gate.takes_weights:
        asked += [Ask(name, prompts[experts[0]][4], {WEIGHTS: [0.1, 0.6, 0.3, 0.0][: len(experts)]})]
    good = same(engine, asked, lambda ids, each: twin.logprobs(ids, each.arguments.get(WEIGHTS)))
    assert sum(good) >= len(good) - (gate in HARD), good


def test_64_requests_at_once_are_answered_as_each_is_alone(engine, make, prompts):
    """The base model, 4 plain experts and 3 composites, with weights of their own, over shared prefixes."""
    arrow, constant, evidence = make("arrow", EQUAL), make("constant", MIXED), make("evidence", MIXED, beta=0.02)
    models: list[tuple[str | None, dict[str, Any]]] = [(name, {}) for name in (None, *EQUAL, arrow, evidence)]
    models += [(model, {WEIGHTS: w}) for model in (constant, evidence) for w in ([1, 0, 0, 0], [0.1, 0.2, 0.3, 0.4])]
    asked = []
    for i in range(64):
        model, arguments = models[i % len(models)]
        lines = prompts[EQUAL[i % 4]]
        asked.append(Ask(model, (lines[0] + lines[1] + lines[2 + i // 4 % 6])[:110], arguments))
    random.Random(0).shuffle(asked)
    alone = []
    for each in asked:
        engine.llm.reset_prefix_cache()
        alone += engine.ask([each])
    engine.llm.reset_prefix_cache()
    before = counters(engine)
    together = engine.ask(asked)
    counted = {name: value - before[name] for name, value in counters(engine).items()}
    for each, one, other in zip(asked, alone, together, strict=True):
        assert answers(one) == answers(other), each
        torch.testing.assert_close(rows(one.outputs[0].logprobs), rows(other.outputs[0].logprobs), atol=1e-4, rtol=1e-4)
    assert counted["vllm:prefix_cache_hits"] > 0
    assert counted["vllm:num_preemptions"] > 0


def counters(engine: Engine) -> dict[str, float]:
    names = ("vllm:prefix_cache_hits", "vllm:num_preemptions")
    return {each.name: each.value for each in engine.llm.get_metrics() if each.name in names}


def test_a_trace_is_what_the_gate_did(engine, make, base, prompts):
    name = make("evidence", MIXED, beta=0.02)
    seen: dict[int, torch.Tensor] = {}
    twin = Twin(base, Composite.read(engine.paths[name]), watch=lambda each: seen.update({each.index: each.weights}))
    prompt = prompts["roman"][5]
    for key in ("one", "two"):  # the second time nothing may come from the prefix cache
        (output,) = engine.ask([Ask(name, prompt, {TRACE: key, COLLECT: "moments"})], limit=8)
        trace = engine.trace(key)
        assert engine.trace(key) is None
        assert trace.tokens == len(prompt) + 7
        twin.logprobs([*prompt, *answers(output)[:-1]])
        weights = torch.stack([seen[index].mean((0, 1, 2)) for index in sorted(seen)])
        torch.testing.assert_close(torch.tensor(trace.weights), weights, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(trace.evidence), twin.evidence.total[0].float(), atol=1e-3, rtol=1e-5)
        assert trace.groups[:2] == (
            "model.layers.0.self_attn.q_proj+k_proj+v_proj",
            "model.layers.0.self_attn.o_proj",
        )
        assert len(trace.moments) == 4 * 4 * 7


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """A change of `adapter_config.json`."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        change(config)
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return apply


def weights(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> Callable[[Path], Any]:
    """A change of every tensor and its name; None takes it out."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        changed = [change(name, tensor) for name, tensor in load_file(path).items()]
        save_file({name: tensor.contiguous() for name, tensor in filter(None, changed)}, path)

    return apply


BAD: dict[str, tuple[bool, Callable[[Path], Any], str]] = {
    "a format of the future": (True, edit(lambda c: c[KEY].update(format=2)), "format 2"),
    "an unknown gate": (True, edit(lambda c: c[KEY].update(gate="nonsense")), "no gate 'nonsense'"),
    "unknown settings": (True, edit(lambda c: c[KEY].update(settings={"heat": 1})), "heat"),
    "a layout of other rows": (True, edit(lambda c: c[KEY]["members"][0].update(rows=5)), "rank|rows|r ="),
    "a layout that is none": (True, edit(lambda c: c.update({KEY: 5})), "format"),
    "no layout": (True, edit(lambda c: c.pop(KEY)), KEY),
    "no mark": (True, edit(lambda c: c.update(init_lora_weights=True)), MARK),
    "no tables": (True, lambda f: (f / "gate.safetensors").unlink(), "cannot be read"),
    "torn weights": (True, lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 99), "cannot be read"),
    "a composite for more layers": (True, weights(lambda n, t: (n.replace(".3.", ".9."), t)), "no such module"),
    "an expert for more layers": (False, weights(lambda n, t: (n.replace(".3.", ".9."), t)), "no such module"),
    "an expert of a smaller base": (False, weights(lambda n, t: (n, t[:, :64] if "_A" in n else t)), "128"),
    "an expert of a larger base": (False, weights(lambda n, t: (n, t.repeat(2, 1) if "_B" in n else t)), "128"),
    "more rank than declared": (False, weights(lambda n, t: (n, torch.cat([t, t], int("_B" in n)))), "declared rank"),
    "one factor only": (False, weights(lambda n, t: None if "0.self_attn.q_proj.lora_B" in n else (n, t)), "lora_B"),
    "a rank over the limit": (False, edit(lambda c: c.update(r=128)), "128"),
    "a configuration that is none": (False, lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
}


def test_what_cannot_be_run_is_refused_twice_and_the_engine_goes_on(engine, make, prompts, tmp_path):
    """Twice, because stock vLLM calls the second try of a half-loaded adapter a success."""
    arrow = make("arrow", EQUAL)
    asked = [Ask(None, prompts["add"][0]), Ask("add", prompts["add"][0]), Ask(arrow, prompts["add"][0])]
    before = [answers(output) for output in engine.ask(asked)]
    for i, (what, (composite, spoil, why)) in enumerate(BAD.items()):
        folder = shutil.copytree(engine.paths[arrow] if composite else DATA / "experts" / "add", tmp_path / str(i))
        spoil(folder)
        for _ in range(2):
            with pytest.raises(Exception, match=why):
                engine.load(what, folder)
    assert [answers(output) for output in engine.ask(asked)] == before


def test_weights_that_make_no_sense_are_ignored(engine, make, prompts):
    """The server refuses them; whoever asks the engine itself must not be able to end it."""
    name, prompt = make("constant", MIXED), prompts["add"][0]
    odd: list[Any] = ["abc", [1, 2], [1, 2, 3, "x"], [float("nan")] * 4, {"a": 1}, [[1.0]] * 4, 7]
    (default,) = engine.ask([Ask(name, prompt)])
    for output in engine.ask([Ask(name, prompt, {WEIGHTS: each, TRACE: 5}) for each in odd]):
        assert answers(output) == answers(default)
    engine.ask(
        [Ask("add", prompt, {WEIGHTS: [1.0], TRACE: "plain"}), Ask(None, prompt, {WEIGHTS: [1.0], TRACE: "base"})]
    )
    assert engine.trace("plain") is None
