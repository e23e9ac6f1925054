"""What the checks' figures say of real adapters, the testbed's, and of some that should not pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters_registry.lora import WEIGHTS
from router.adapter import Adapter
from router.loudness import Loudness, against, loudness
from router.similarity import cosine, most_similar

EXPERTS = Path(__file__).parents[2] / "eval" / "testbed" / "data" / "experts"
#: What a policy may take for a copy, and for too loud (z).
COPY, LOUD = 0.9, 4.0

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {folder.name: Adapter(folder) for folder in sorted(EXPERTS.iterdir())}


@pytest.fixture(scope="module")
def norms(adapters: dict[str, Adapter]) -> dict[str, Loudness]:
    return {name: loudness(adapter) for name, adapter in adapters.items()}


def changed(name: str, to: Path, change: Callable[[str, Tensor], Tensor]) -> Adapter:
    shutil.copytree(EXPERTS / name, to)
    tensors = {key: change(key, tensor).contiguous() for key, tensor in load_file(to / WEIGHTS).items()}
    save_file(tensors, to / WEIGHTS, {"format": "pt"})
    return Adapter(to)


def test_experts_for_different_tasks_are_no_copies_and_not_loud(
    adapters: dict[str, Adapter], norms: dict[str, Loudness]
) -> None:
    for name in ("consonants", "plural", "json"):  # the loudest, the most alike, the quietest
        others = ((other, adapter) for other, adapter in adapters.items() if other != name)
        assert abs(most_similar(adapters[name], others, k=1)[0].cosine) < 0.1
    for name, mine in norms.items():
        standing = against(mine, [norms[other] for other in norms if other != name])
        assert standing.loudest is not None
        assert standing.loudest < LOUD


def test_copies_are_found_whatever_was_done_to_them(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)

    def trained_on(key: str, tensor: Tensor) -> Tensor:
        return tensor + 0.2 * tensor.std() * torch.randn(tensor.shape, generator=random)

    louder = changed("roman", tmp_path / "louder", lambda key, tensor: 10 * tensor if "lora_B" in key else tensor)
    opposite = changed("roman", tmp_path / "opposite", lambda key, tensor: -tensor if "lora_A" in key else tensor)
    further = changed("roman", tmp_path / "further", trained_on)
    for copy, expected in ((louder, 1), (opposite, -1), (further, 0.95)):
        found = most_similar(copy, adapters.items(), k=2)
        assert found[0].name == "roman"
        assert abs(found[0].cosine) > COPY > abs(found[1].cosine)
        assert found[0].cosine == pytest.approx(expected, abs=0.05)
        assert found[0].overlap > COPY > found[1].overlap


@pytest.mark.parametrize("name", ["roman", "json", "transform-lower"])
def test_ten_times_as_loud_is_found(name: str, norms: dict[str, Loudness], tmp_path: Path) -> None:
    louder = changed(name, tmp_path / "louder", lambda key, tensor: 10 * tensor if "lora_B" in key else tensor)
    standing = against(loudness(louder), list(norms.values()))
    assert standing.loudest is not None
    assert standing.loudest > LOUD


def test_random_weights_are_like_nobody(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    drawn = changed(
        "roman", tmp_path / "random", lambda key, tensor: tensor.std() * torch.randn(tensor.shape, generator=random)
    )
    assert max(abs(cosine(drawn, adapter)) for adapter in adapters.values()) < 0.05
