"""The slow twin of the gated engine, against PEFT and against itself cut into pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eval.calibration import calibrate
from eval.testbed.check import load_base
from eval.testbed.tokens import chat
from eval.twin import Composite, Seen, Twin, groups_of, read_deltas

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path("eval/testbed/data")
SAME = ("vowels", "json", "capital-city")  # PEFT's Arrow wants one rank and one set of modules
CLOSE = {"atol": 1e-5, "rtol": 1e-6}  # log-probabilities of what is unlikely go down to -30
LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)


@pytest.fixture(autouse=True)
def exact_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own are what 15 steps of power iteration make of a random vector."""

    def exact(self: object, A: Tensor, B: Tensor, iters: int = 0, eps: float = 0) -> Tensor:
        return torch.linalg.svd(B.double() @ A.double()).Vh[0].float()

    monkeypatch.setattr(ArrowLoraLinearLayer, "top_right_singular_vec_from_BA", exact)


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


@pytest.fixture(scope="module")
def experts(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unequal as those of different people are: ranks, scalings, modules."""
    root = tmp_path_factory.mktemp("experts")
    shapes: dict[str, dict[str, Any]] = {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "b": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
        "c": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 3}},
    }
    return {
        name: make_adapter(root / name, seed=seed, llama=LLAMA, **shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def plain(model: Any, tokens: list[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("top_k", "temperature"), [(3, 1.0), (2, 0.5), (1, 1.0)])
def test_arrow_is_pefts_on_the_testbeds_experts(explicit: bool, top_k: int, temperature: float) -> None:
    base, tokenizer = load_base(DATA)
    folders = {name: DATA / "experts" / name for name in SAME}
    settings = {"top_k": top_k, "temperature": temperature}
    twin = Twin(base, Composite.stack(folders, "arrow", settings), explicit=explicit)
    tokens = tokenizer(chat("Name the capital of France"), add_special_tokens=False)["input_ids"]
    ours, answer = twin.logprobs(tokens), twin.generate([tokens], limit=6)[0]

    config = ArrowConfig(top_k=top_k, router_temperature=temperature)
    theirs = create_arrow_model(load_base(DATA)[0], [str(folder) for folder in folders.values()], config).eval()
    torch.testing.assert_close(ours, plain(theirs, tokens), **CLOSE)
    for token in answer:  # every step of the greedy answer, computed without a cache
        assert int(plain(theirs, tokens)[-1].argmax()) == token
        tokens = [*tokens, token]


@pytest.mark.parametrize("gate", ["arrow", "spectr", "smile"])
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 1}, {"top_k": 2, "temperature": 0.7, "shared": True}, {"normalise": "unit"}]
)
def test_gates_on_rank_rows_are_those_on_dense_updates(
    tiny: LlamaForCausalLM, experts: dict[str, Path], gate: str, settings: dict[str, Any]
) -> None:
    composite = Composite.stack(experts, gate, settings)
    fast, explicit = (Twin(tiny, composite, explicit=each).logprobs(ids(16)) for each in (False, True))
    torch.testing.assert_close(fast, explicit, **CLOSE)
    assert (fast - plain(tiny, ids(16))).abs().max() > 1e-2, "the experts do something"


@pytest.mark.parametrize("explicit", [False, True])
def test_weights_that_a_request_brings_are_a_weighted_sum_of_updates(
    tiny: LlamaForCausalLM, experts: dict[str, Path], explicit: bool
) -> None:
    twin = Twin(tiny, Composite.stack(experts, "constant"), explicit=explicit)
    alone = PeftModel.from_pretrained(LlamaForCausalLM(LLAMA), experts["b"])
    alone.base_model.model.load_state_dict(tiny.state_dict(), strict=False)
    for name, module in alone.base_model.model.named_modules():  # PEFT moves an adapted layer's weights
        if name.endswith("base_layer"):
            module.load_state_dict(tiny.get_submodule(name.removesuffix(".base_layer")).state_dict())
    torch.testing.assert_close(twin.logprobs(ids(16), [0.0, 1.0, 0.0]), plain(alone.eval(), ids(16)), **CLOSE)

    uniform = [1 / 3] * 3
    torch.testing.assert_close(twin.logprobs(ids(16)), twin.logprobs(ids(16), uniform), **CLOSE)
    torch.testing.assert_close(twin.logprobs(ids(16), [float("nan")] * 3), twin.logprobs(ids(16), uniform), **CLOSE)
    torch.testing.assert_close(twin.logprobs(ids(16), [0.0] * 3), plain(tiny, ids(16)), **CLOSE)


GATES: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 2}),
    ("evidence", {"beta": 0.1, "normalise": "unit"}),
    ("probe", {"normalise": "none"}),
]


@pytest.mark.parametrize(("gate", "settings"), GATES)
def test_an_answer_does_not_depend_on_how_a_request_is_cut(
    tiny: LlamaForCausalLM, experts: dict[str, Path], gate: str, settings: dict[str, Any]
) -> None:
    twin = Twin(tiny, Composite.stack(experts, gate, settings))
    whole = twin.logprobs(ids(20))
    for chunks in (2, 3, 20):
        torch.testing.assert_close(twin.logprobs(ids(20), chunks=chunks), whole, **CLOSE)


@pytest.mark.parametrize(("gate", "settings"), GATES)
def test_a_batch_answers_as_each_request_alone(
    tiny: LlamaForCausalLM, experts: dict[str, Path], gate: str, settings: dict[str, Any]
) -> None:
    twin = Twin(tiny, Composite.stack(experts, gate, settings))
    prompts = [ids(length, seed=length) for length in (3, 17, 9)]
    together = twin.generate(prompts, limit=8)
    assert together == [twin.generate([prompt], limit=8)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, together, strict=True):  # and as one long prompt says, in one step
        best = twin.logprobs(prompt + answer)[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert best == answer


@pytest.mark.parametrize("score", ["arrow", "spectr", "smile"])
def test_evidence_is_that_of_dense_updates(tiny: LlamaForCausalLM, experts: dict[str, Path], score: str) -> None:
    kept = calibrate(tiny, experts, [ids(12, seed=seed) for seed in range(3)], score=score)
    composite = Composite.stack(experts, "evidence", {"score": score, "beta": 0.05}, kept)
    for given in (None, [0.1, 0.6, 0.3], [0.0, 0.5, 0.5]):
        fast, explicit = (Twin(tiny, composite, explicit=each).logprobs(ids(16), given) for each in (False, True))
        torch.testing.assert_close(fast, explicit, **CLOSE)


@pytest.mark.parametrize("gate", ["phatgoose", "meteora"])
def test_an_expert_that_lacks_a_module_has_no_trained_vector_there(
    tiny: LlamaForCausalLM, experts: dict[str, Path], gate: str
) -> None:
    kept = {
        name: {gate: {module: torch.randn(delta.shape[1]) for module, delta in read_deltas(folder)[0].items()}}
        for name, folder in experts.items()
    }
    seen: list[Seen] = []
    composite = Composite.stack(experts, gate, {"top_k": None}, kept)
    Twin(tiny, composite, watch=seen.append).logprobs(ids(7))
    assert seen[3].modules[0].endswith("down_proj")  # which "a" does not adapt
    assert (seen[3].weights[..., 0] == 0).all()
    assert (seen[3].weights[..., 1:] > 0).all()
    torch.testing.assert_close(seen[3].weights.sum(-1), torch.ones(1, 7, 1))


def test_an_answer_ends_before_its_end_of_text(tiny: LlamaForCausalLM, experts: dict[str, Path]) -> None:
    twin = Twin(tiny, Composite.stack(experts, "arrow"))
    whole = twin.generate([ids(5)], limit=8)[0]
    eos = whole[3]
    assert twin.generate([ids(5)], limit=8, eos=eos)[0] == whole[: whole.index(eos)]


def test_the_model_is_left_as_it_was(tiny: LlamaForCausalLM, experts: dict[str, Path]) -> None:
    before = plain(tiny, ids(9))
    Twin(tiny, Composite.stack(experts, "arrow")).generate([ids(9)], limit=2)
    torch.testing.assert_close(plain(tiny, ids(9)), before, rtol=0, atol=0)


def test_what_passes_a_group_can_be_watched(tiny: LlamaForCausalLM, experts: dict[str, Path]) -> None:
    seen: list[Any] = []
    Twin(tiny, Composite.stack(experts, "arrow"), watch=seen.append).logprobs(ids(7))
    assert [each.index for each in seen] == list(range(8))
    assert [len(each.modules) for each in seen] == [3, 1, 2, 1] * 2
    assert seen[0].z.shape == (1, 7, 3, 14)
    assert seen[0].weights.shape == (1, 7, 3, 3)
    torch.testing.assert_close(seen[0].weights.sum(-1), torch.ones(1, 7, 3))
    assert seen[3].table.present.tolist() == [[False, True, True]]


def test_a_composite_of_another_model_is_refused(tiny: LlamaForCausalLM) -> None:
    experts = {name: DATA / "experts" / name for name in SAME}
    with pytest.raises(ValueError, match=r"no linear modules model\.layers\.2\.self_attn\.k_proj"):
        Twin(tiny, Composite.stack(experts, "arrow"))


def test_groups_come_in_the_order_of_computation() -> None:
    names = [f"model.layers.{n}.{part}" for n in (0, 1) for part in ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")]
    assert groups_of([*names, "lm_head"]) == [
        ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
        ["model.layers.0.mlp.down_proj"],
        ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"],
        ["model.layers.1.mlp.down_proj"],
    ]


def test_the_scaling_of_every_module_is_in_its_update(experts: dict[str, Path]) -> None:
    deltas, rank = read_deltas(experts["c"])
    assert rank == 8
    model = PeftModel.from_pretrained(LlamaForCausalLM(LLAMA), experts["c"])
    for module, delta in deltas.items():
        layer = model.base_model.model.get_submodule(module)
        torch.testing.assert_close(delta.float(), layer.get_delta_weight("default"), **CLOSE)
