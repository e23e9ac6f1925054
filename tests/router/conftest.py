"""Shared by the router's tests: an encoder of words that takes no time, experts in one line, the real MiniLM."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from adapters_registry.expert import Expert, Sample, State
from router.encoder import SentenceTransformerEncoder, Vectors
from tests.conftest import LLAMA

MakeExpert = Callable[..., Expert]
Deltas = dict[str, Tensor]


def deltas(folder: Path) -> Deltas:
    """dW of every module of an adapter for the tiny model, as PEFT forms it."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import LlamaForCausalLM

    model = PeftModel.from_pretrained(LlamaForCausalLM(LLAMA), str(folder))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}


class WordsEncoder:
    """A text is the sum of random vectors, one to each of its words; it records the batches it was given.

    `gate` holds every batch back until it is set; a text with "poison" fails its batch.
    """

    id = "words@1"
    dim = 32

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.batches.append(list(texts))
        assert self.gate.wait(timeout=30)
        if any("poison" in text for text in texts):
            raise ValueError("cannot read this")
        return np.stack([self._one(text) for text in texts]) if texts else np.zeros((0, self.dim), np.float32)

    def _one(self, text: str) -> Vectors:
        total = np.zeros(self.dim)
        for word in text.lower().split() or [""]:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            total += np.random.default_rng(seed).standard_normal(self.dim)
        return (total / np.linalg.norm(total)).astype(np.float32)


@pytest.fixture
def words() -> WordsEncoder:
    return WordsEncoder()


@pytest.fixture(scope="session")
def make_expert() -> MakeExpert:
    def make(name: str, *samples: str, version: int = 1, **fields: object) -> Expert:
        return Expert.model_validate(
            {
                "name": name,
                "version": version,
                "digest": hashlib.sha256(f"{name} {version}".encode()).hexdigest(),
                "state": State.ACTIVE,
                "path": Path(name),
                "base_model": "base",
                "rank": 8,
                "target_modules": ("q_proj",),
                "source": "test",
                "samples": tuple(Sample(prompt=text) for text in samples),
                **fields,
            }
        )

    return make


@pytest.fixture(scope="session")
def minilm() -> SentenceTransformerEncoder:
    return SentenceTransformerEncoder(threads=1)
