from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters_registry.lora import CONFIG, WEIGHTS
from router.adapter import Adapter
from router.similarity import Likeness, cosine, length, most_similar, overlap
from tests.router.conftest import Deltas, deltas

MakeAdapter = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of different ranks, modules and scales."""
    root = tmp_path_factory.mktemp("likeness")
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return [
        make_adapter(root / "plain", seed=0),
        make_adapter(root / "rank-1", seed=1, r=1, lora_alpha=3),
        make_adapter(root / "rslora", seed=2, r=3, target_modules=everything, use_rslora=True),
        make_adapter(
            root / "patterns",
            seed=3,
            target_modules=everything,
            rank_pattern={"v_proj": 7, "layers.1.self_attn.q_proj": 2},
            alpha_pattern={"q_proj": 32},
        ),
        make_adapter(root / "elsewhere", seed=4, target_modules=["down_proj"]),
    ]


def dense_cosine(one: Deltas, other: Deltas) -> float:
    product = sum(float((one[m] * other[m]).sum()) for m in one.keys() & other.keys())
    lengths = [sum(float(dW.square().sum()) for dW in each.values()) ** 0.5 for each in (one, other)]
    return product / (lengths[0] * lengths[1])


def dense_overlap(one: Deltas, other: Deltas) -> float:
    """By the SVD of dW: the squared cosines of the principal angles are the squared singular values of Q_1^T Q_2."""
    found = []
    for module in one.keys() & other.keys():
        bases = []
        for dW in (one[module], other[module]):
            U, S, _ = torch.linalg.svd(dW)
            bases.append(U[:, : int((1e-6 * S[0] < S).sum())])
        angles = torch.linalg.svdvals(bases[0].mT @ bases[1])
        found.append(float(angles.square().mean()))
    return sum(found) / len(found)


def copied(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(folder, to)
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
    save_file(tensors, to / WEIGHTS, {"format": "pt"})
    return to


def test_likeness_is_that_of_the_updates_that_peft_forms(folders: list[Path]) -> None:
    adapters, dense = [Adapter(folder) for folder in folders], [deltas(folder) for folder in folders]
    for one, W1 in zip(adapters, dense, strict=True):
        for other, W2 in zip(adapters, dense, strict=True):
            assert cosine(one, other) == pytest.approx(dense_cosine(W1, W2), abs=1e-6)
            if W1.keys() & W2.keys():
                assert overlap(one, other) == pytest.approx(dense_overlap(W1, W2), abs=1e-5)


def test_adapters_on_different_modules_are_nothing_alike(folders: list[Path]) -> None:
    one, other = Adapter(folders[0]), Adapter(folders[4])
    assert cosine(one, other) == 0
    assert overlap(one, other) == 0


def test_a_copy_is_found_however_it_is_scaled_or_factored(folders: list[Path], tmp_path: Path) -> None:
    def refactored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        M = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        return {n: M.inverse() @ t if "lora_A" in n else -3 * t @ M for n, t in tensors.items()}

    copy = Adapter(copied(folders[0], tmp_path / "copy", refactored))
    assert cosine(Adapter(folders[0]), copy) == pytest.approx(-1, abs=1e-5)
    assert overlap(Adapter(folders[0]), copy) == pytest.approx(1, abs=1e-5)


def test_padding_with_rank_that_does_nothing_hides_no_copy(folders: list[Path], tmp_path: Path) -> None:
    def padded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(0)
        return {
            n: torch.cat([t, torch.randn(t.shape, generator=random)])
            if "lora_A" in n
            else 2 * torch.cat([t, torch.zeros_like(t)], 1)
            for n, t in tensors.items()
        }

    folder = copied(folders[0], tmp_path / "padded", padded)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"r": 8}))
    assert cosine(Adapter(folders[0]), Adapter(folder)) == pytest.approx(1, abs=1e-6)
    assert overlap(Adapter(folders[0]), Adapter(folder)) == pytest.approx(1, abs=1e-5)


def test_an_adapter_that_changes_nothing_is_like_nobody(folders: list[Path], tmp_path: Path) -> None:
    silent = Adapter(
        copied(folders[0], tmp_path / "silent", lambda all_: {n: 0 * t if "B" in n else t for n, t in all_.items()})
    )
    assert (length(silent), cosine(silent, silent), overlap(silent, Adapter(folders[0]))) == (0, 0, 0)


def test_the_most_similar_come_first_and_opposites_count_as_alike(folders: list[Path], tmp_path: Path) -> None:
    def opposite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: -t if "lora_B" in n else t for n, t in tensors.items()}

    def nearly(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(0)
        return {n: t + 0.1 * t.std() * torch.randn(t.shape, generator=random) for n, t in tensors.items()}

    there = {folder.name: folder for folder in folders[1:]}
    there["opposite"] = copied(folders[0], tmp_path / "opposite", opposite)
    there["nearly"] = copied(folders[0], tmp_path / "nearly", nearly)
    there["twin"] = there["nearly"]
    opened: list[str] = []

    def one_by_one() -> Iterator[tuple[str, Adapter]]:
        for name, folder in there.items():
            opened.append(name)
            yield name, Adapter(folder)

    newcomer = Adapter(folders[0])
    found = most_similar(newcomer, one_by_one(), k=3)
    assert [each.name for each in found] == ["opposite", "nearly", "twin"]
    assert found[0].cosine == pytest.approx(-1)
    assert found[1] == Likeness(
        "nearly", cosine(newcomer, Adapter(there["nearly"])), overlap(newcomer, Adapter(there["nearly"]))
    )
    assert found[1].cosine > 0.95
    assert opened == list(there)
    assert most_similar(newcomer, []) == []
    assert json.loads(json.dumps(found[0].json()))["name"] == "opposite"
