"""Agreement with PEFT's `add_weighted_adapter`, on random adapters and on the testbed's trained ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import eval.testbed
from router.adapter import Adapter
from router.blending import blend
from router.blending.elementwise import drop_and_rescale
from router.blending.plan import mask_seed
from router.composite import Part

MakePart = Callable[..., Part]
TRAINED = Path(eval.testbed.__file__).parent / "data"
WEIGHTS = [0.6, 0.5, -0.3]


@pytest.fixture(scope="module", params=["random", "trained"])
def case(
    request: pytest.FixtureRequest, base_folder: Path, adapters: list[Path], part: MakePart
) -> tuple[PeftModel, list[Part]]:
    """A model with three adapters of one rank, and the same adapters as members."""
    if request.param == "random":
        folders, config = adapters[:3], LlamaConfig.from_pretrained(base_folder)
    else:
        folders = [TRAINED / "experts" / name for name in ("reverse", "plural", "initials")]
        config = LlamaConfig.from_pretrained(TRAINED / "base")
    return loaded(config, folders), [part(folder, folder.name) for folder in folders]


def loaded(config: LlamaConfig, folders: Sequence[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(LlamaForCausalLM(config), str(folders[0]), adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    return model


def peft_updates(model: PeftModel, name: str) -> dict[str, Tensor]:
    """{module: dW} of an adapter of the model."""
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight(name).detach().double()
        for path, module in model.named_modules()
        if name in getattr(module, "lora_A", {})
    }


def combined(model: PeftModel, members: Sequence[Part], kind: str, weights: Sequence[float], **options: Any) -> Any:
    names = [member.id for member in members]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density")
        model.add_weighted_adapter(names, list(weights), "combined", combination_type=kind, **options)
    try:
        return peft_updates(model, "combined")
    finally:
        model.delete_adapter("combined")


def updates(folder: Path) -> dict[str, Tensor]:
    adapter = Adapter(folder)
    return {module: adapter.dense(module) for module in adapter.modules}  # type: ignore[misc]


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for module, update in theirs.items():
        scale = float(update.abs().max())
        torch.testing.assert_close(ours[module], update, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("operator", "settings", "kind", "options"),
    [
        ("cat", {}, "cat", {}),
        ("linear", {}, "linear", {}),
        ("svd", {}, "svd", {}),
        ("svd", {"rank": 3}, "svd", {"svd_rank": 3}),
        ("ties", {"density": 0.3, "mean": "count", "rank": 6}, "ties_svd", {"density": 0.3, "svd_rank": 6}),
        ("ties", {"density": 1.0, "mean": "count", "rank": 6}, "ties_svd", {"density": 1.0, "svd_rank": 6}),
        ("magnitude_prune", {"density": 0.3, "rank": 6}, "magnitude_prune_svd", {"density": 0.3, "svd_rank": 6}),
    ],
)
def test_agrees_with_peft(
    tmp_path: Path,
    case: tuple[PeftModel, list[Part]],
    operator: str,
    settings: dict[str, Any],
    kind: str,
    options: dict[str, Any],
) -> None:
    model, members = case
    blend(tmp_path / "blend", members, WEIGHTS, operator, settings, max_rank=64)
    agree(updates(tmp_path / "blend"), combined(model, members, kind, WEIGHTS, **options))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_agrees_with_peft_given_the_same_masks(
    tmp_path: Path, case: tuple[PeftModel, list[Part]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, members = case
    theirs = {member.id: peft_updates(model, member.id) for member in members}

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        """Our mask for the member and the module whose dW this is."""
        assert rescale
        for member in members:
            for module, update in theirs[member.id].items():
                if update.shape == tensor.shape and torch.equal(update, tensor.double()):
                    return drop_and_rescale(tensor, density, mask_seed(7, member.digest, module))
        raise AssertionError("no member has this update")

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    settings = {"density": 0.6, "seed": 7, "rank": 6, **({"mean": "count"} if name == "dare_ties" else {})}
    blend(tmp_path / "blend", members, WEIGHTS, name, settings, max_rank=64)
    agree(updates(tmp_path / "blend"), combined(model, members, f"{name}_svd", WEIGHTS, density=0.6, svd_rank=6))


def test_dare_keeps_the_mean_of_what_it_drops(tmp_path: Path, case: tuple[PeftModel, list[Part]]) -> None:
    """The mean over seeds comes near the sum of the members, which is what it is for both."""
    model, members = case
    whole = combined(model, members, "cat", WEIGHTS)
    module = next(iter(whole))
    means = []
    for seed in range(8):
        settings = {"density": 0.8, "seed": seed, "rank": 32}
        blend(tmp_path / str(seed), members, WEIGHTS, "dare_linear", settings, max_rank=64)
        means.append(Adapter(tmp_path / str(seed)).dense(module))
    mean = torch.stack([each for each in means if each is not None]).mean(0)
    assert float((mean - whole[module]).norm() / whole[module].norm()) < 0.35


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_members_that_differ_agree_with_peft(
    tmp_path: Path, base_folder: Path, make_adapter: Callable[..., Path], part: MakePart, kind: str
) -> None:
    """Ranks, alphas, rsLoRA, patterns, target modules. (PEFT scales its result wrongly if the first one has rsLoRA.)"""
    if kind == "trained":
        folders = [TRAINED / "experts" / name for name in ("roman", "sort-words", "vowels")]
        config = LlamaConfig.from_pretrained(TRAINED / "base")
    else:
        options: list[dict[str, Any]] = [
            {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},
            {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            {"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 9}},
        ]
        folders = [make_adapter(tmp_path / f"m{k}", seed=k, **each) for k, each in enumerate(options)]
        config = LlamaConfig.from_pretrained(base_folder)
    members = [part(folder, folder.name) for folder in folders]
    model = loaded(config, folders)
    for operator, combination, settings, given in [
        ("cat", "cat", {}, {}),
        ("svd", "svd", {}, {}),
        ("ties", "ties_svd", {"density": 0.4, "mean": "count", "rank": 5}, {"density": 0.4, "svd_rank": 5}),
    ]:
        blend(tmp_path / operator, members, WEIGHTS, operator, settings, max_rank=64)
        agree(updates(tmp_path / operator), combined(model, members, combination, WEIGHTS, **given))


def test_peft_loads_the_folder_and_computes_with_it(
    tmp_path: Path, base_folder: Path, adapters: list[Path], part: MakePart
) -> None:
    config = LlamaConfig.from_pretrained(base_folder)
    model = loaded(config, adapters[:2]).eval()
    members = [part(folder, folder.name) for folder in adapters[:2]]
    blend(tmp_path / "blend", members, [0.7, 0.4], max_rank=64)
    model.load_adapter(str(tmp_path / "blend"), adapter_name="blend")
    model.add_weighted_adapter(["adapter0", "adapter1"], [0.7, 0.4], "combined", combination_type="cat")
    tokens = torch.arange(12)[None]
    logits = {}
    for name in ("blend", "combined"):
        model.set_adapter(name)
        with torch.no_grad():
            logits[name] = model(tokens).logits
    torch.testing.assert_close(logits["blend"], logits["combined"], rtol=1e-4, atol=1e-4)
