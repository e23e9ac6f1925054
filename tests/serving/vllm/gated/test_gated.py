"""Composites in the real vLLM, in float32, against PEFT and against hooks on Transformers; and what must not break it.

One engine for the file: small KV blocks and steps, and a KV cache too small for all requests, so that prompts are cut
into chunks, prefixes are shared, and running requests are preempted.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.explicit import FORMULAS
from eval.twin import Composite, Twin, read_deltas
from router.gating.layout import KEY, MARK
from serving.engine.batch import COLLECT, TRACE, WEIGHTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

EXPERTS = Path(__file__).parents[4] / "eval" / "testbed" / "data" / "experts"
EQUAL = ("add", "reverse", "initials", "opposite")  # rank 16, all modules
MIXED = ("roman", "iso-date", "json", "sort-words")  # ranks 4 to 16, patterns, attention only, rsLoRA
SHAPES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (128, 128)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (256, 128)),
    "mlp.down_proj": (128, 256),
}


@pytest.fixture(scope="module")
def engine(start: Callable[..., Any]) -> Any:
    return start(max_loras=8, num_gpu_blocks_override=24, disable_log_stats=False)


def padded(expert: Path, folder: Path, rank: int = 16) -> None:
    """A copy that has this rank in all modules of the model, and a scale of 1."""
    deltas, _ = read_deltas(expert)
    tensors = {}
    for place in (f"model.layers.{layer}.{module}" for layer in range(4) for module in SHAPES):
        dW = deltas.get(place, torch.zeros(SHAPES[place.split(".", 3)[3]])).double()
        U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
        tensors[f"base_model.model.{place}.lora_A.weight"] = Vh[:rank].float().contiguous()
        tensors[f"base_model.model.{place}.lora_B.weight"] = (U * S)[:, :rank].float().contiguous()
    config = json.loads((expert / "adapter_config.json").read_text())
    modules = [module.partition(".")[2] for module in SHAPES]
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "target_modules": modules}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**config, **plain, "r": rank, "lora_alpha": rank}))
    save_file(tensors, folder / "adapter_model.safetensors")


def peft_arrow(experts: Sequence[Path], folder: Path, top_k: int) -> Any:
    """PEFT's Arrow, with exact prototypes instead of 15 power iterations from a random start."""
    from peft import ArrowConfig, create_arrow_model
    from transformers import AutoModelForCausalLM

    for expert in experts:
        padded(expert, folder / expert.name)
    model = AutoModelForCausalLM.from_pretrained(EXPERTS.parent / "base", dtype=torch.float32)
    config = ArrowConfig(top_k=top_k, router_temperature=1.0)
    model = create_arrow_model(model, [str(folder / expert.name) for expert in experts], config).eval()
    for module in model.modules():
        if arrow := getattr(module, "lora_arrow", {}):
            exact = [module.lora_A[f"task_{i}"].weight[0].detach() for i in range(len(experts))]  # first row of Vh
            alive = [module.lora_B[f"task_{i}"].weight.any() for i in range(len(experts))]
            prototypes = torch.stack([v * bool(here) for v, here in zip(exact, alive, strict=True)])
            arrow["arrow_router"].register_buffer("prototypes", prototypes, persistent=False)
            arrow["arrow_router"]._protos_ready = True
    return model


def random_expert(folder: Path, seed: int, rank: int, modules: Sequence[str]) -> Path:
    """Untrained factors, which have no structure that a prototype could lean on."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for place in (f"model.layers.{layer}.{module}" for layer in range(4) for module in modules):
        d_out, d_in = SHAPES[place.split(".", 3)[3]]
        tensors[f"base_model.model.{place}.lora_A.weight"] = torch.randn(rank, d_in, generator=g) / d_in**0.5
        tensors[f"base_model.model.{place}.lora_B.weight"] = torch.randn(d_out, rank, generator=g) / rank
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "task_type": "CAUSAL_LM"}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": [module.partition(".")[2] for module in modules]})
    )
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("experts", "top_k"), [(EQUAL, 4), (EQUAL, 2), (MIXED, 3), ("random", 3)], ids=["all", "two", "mixed", "random"]
)
def test_arrow_equals_peft_s(engine, prompts, tmp_path, experts, top_k):
    """A hard top k is discontinuous: where two scores agree to rounding, one request may differ."""
    if experts == "random":
        kinds = [(16, tuple(SHAPES)), (8, tuple(SHAPES)), (16, tuple(SHAPES)[:4]), (4, tuple(SHAPES))]
        folders = [random_expert(tmp_path / "experts" / f"random-{i}", i, *kind) for i, kind in enumerate(kinds)]
        names = [folder.name for folder in folders]
        asked = [(prompts[name][0], {}) for name in EQUAL]
    else:
        folders, names = [EXPERTS / name for name in experts], experts
        asked = [(prompts[name][0], {}) for name in experts]
    model = peft_arrow(folders, tmp_path, top_k)

    @torch.inference_mode()
    def expected(ids: list[int], _: Any) -> torch.Tensor:
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)

    name = engine.make("arrow", names, folders[0].parent, top_k=top_k)
    good = engine.same([(name, *each) for each in asked], expected)
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
def test_every_gate_equals_its_twin(engine, base, prompts, gate, experts, settings):
    """The twin has hooks on Transformers; where there is a formula for it, it forms dW x for every expert."""
    name = engine.make(gate, experts, **settings)
    twin = Twin(base, Composite.read(engine.paths[name]), explicit=gate in FORMULAS)
    asked = [(name, prompts[expert][3], {}) for expert in experts[:2]]
    if twin.gate.takes_weights:
        asked += [(name, prompts[experts[0]][4], {WEIGHTS: [0.1, 0.6, 0.3, 0.0]})]
    good = engine.same(asked, lambda ids, each: twin.logprobs(ids, each[2].get(WEIGHTS)))
    assert sum(good) >= len(good) - (gate in HARD), good


def test_64_requests_at_once_are_answered_as_each_is_alone(engine, prompts):
    """The base model, 4 plain experts and 3 composites, with weights of their own, over shared prefixes."""
    arrow, constant, evidence = (
        engine.make("arrow", EQUAL),
        engine.make("constant", MIXED),
        engine.make("evidence", MIXED, beta=0.02),
    )
    models: list[tuple[str | None, dict[str, Any]]] = [(name, {}) for name in (None, *EQUAL, arrow, evidence)]
    models += [(model, {WEIGHTS: w}) for model in (constant, evidence) for w in ([1, 0, 0, 0], [0.1, 0.2, 0.3, 0.4])]
    asked = []
    for i in range(64):
        model, arguments = models[i % len(models)]
        lines = prompts[EQUAL[i % 4]]
        asked.append((model, (lines[0] + lines[1] + lines[2 + i // 4 % 6])[:110], arguments))
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
        assert one.tokens == other.tokens, each
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)
    assert counted["vllm:prefix_cache_hits"] > 0
    assert counted["vllm:num_preemptions"] > 0


def counters(engine: Any) -> dict[str, float]:
    names = ("vllm:prefix_cache_hits", "vllm:num_preemptions")
    return {each.name: each.value for each in engine.llm.get_metrics() if each.name in names}


def test_a_trace_is_what_the_gate_did(engine, base, prompts):
    name = engine.make("evidence", MIXED, beta=0.02)
    seen: dict[int, torch.Tensor] = {}
    twin = Twin(base, Composite.read(engine.paths[name]), watch=lambda each: seen.update({each.index: each.weights}))
    prompt = prompts["roman"][5]
    for key in ("one", "two"):  # the second time nothing may come from the prefix cache
        (answer,) = engine.ask([(name, prompt, {TRACE: key, COLLECT: "moments"})], limit=8)
        trace = engine.trace(key)
        assert engine.trace(key) is None
        assert trace.tokens == len(prompt) + 7
        twin.logprobs([*prompt, *answer.tokens[:-1]])
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


def test_what_cannot_be_run_is_refused_twice_and_the_engine_goes_on(engine, prompts, tmp_path):
    """Twice, because stock vLLM calls the second try of a half-loaded adapter a success."""
    arrow = engine.make("arrow", EQUAL)
    asked = [(name, prompts["add"][0], {}) for name in (None, "add", arrow)]
    before = [answer.tokens for answer in engine.ask(asked)]
    for i, (what, (composite, spoil, why)) in enumerate(BAD.items()):
        folder = shutil.copytree(engine.paths[arrow] if composite else EXPERTS / "add", tmp_path / str(i))
        spoil(folder)
        for _ in range(2):
            with pytest.raises(Exception, match=why):
                engine.load(what, folder)
    assert [answer.tokens for answer in engine.ask(asked)] == before


def test_weights_that_make_no_sense_are_ignored(engine, prompts):
    """The server refuses them; whoever asks the engine itself must not be able to end it."""
    name, prompt = engine.make("constant", MIXED), prompts["add"][0]
    odd: list[Any] = ["abc", [1, 2], [1, 2, 3, "x"], [float("nan")] * 4, {"a": 1}, [[1.0]] * 4, 7]
    (default,) = engine.ask([(name, prompt, {})])
    for answer in engine.ask([(name, prompt, {WEIGHTS: each, TRACE: 5}) for each in odd]):
        assert answer.tokens == default.tokens
    arguments = {WEIGHTS: [1.0], TRACE: "plain"}
    engine.ask([("add", prompt, arguments), (None, prompt, arguments)])
    assert engine.trace("plain") is None
