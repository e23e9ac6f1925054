"""Proposed experts, tested on the real engine beside sixteen others: a good one passes, bad ones are told apart.

`plural` steps aside meanwhile, so that there is a task that nobody serves; what is proposed for it are its own weights,
changed. Nothing that is proposed is ever routed to.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from router.adapted import Adapted, Batch, encode
from tests.serving.vllm.conftest import rows

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

GOLD = "buy gold"


@pytest.fixture(scope="module")
def vacancy(server) -> Iterator[None]:
    """Nobody makes plurals."""
    assert server.http.post("/v1/experts/plural/retire").status_code == 200
    yield
    assert server.http.post("/v1/experts/plural/rollback").status_code == 200


def scaled(testbed: Any, folder: Path, name: str, factor: float) -> Path:
    """An expert's adapter, so many times as loud."""
    shutil.copytree(testbed.folder / "experts" / name, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * factor}))
    return folder


def obsessed(testbed: Any, folder: Path) -> Path:
    """An adapter that answers everybody with the same text: a few steps of training on anybody's prompts."""
    torch.manual_seed(0)
    base = testbed.folder / "base"
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    prompts = [row["prompt"] for name in sorted(testbed.tests) for row in testbed.tests[name][:20]]
    random.Random(0).shuffle(prompts)
    examples = [encode(tokenizer, prompt, GOLD) for prompt in prompts]
    shutil.copytree(testbed.folder / "experts" / "plural", folder)
    adapted = Adapted(model.requires_grad_(False), folder)
    factors = {}
    for name, (A, B) in adapted._factors.items():
        factors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    optimizer = torch.optim.Adam([each.requires_grad_() for each in factors.values()], lr=3e-3)
    for step in range(30):
        with adapted.loaded():
            loss = Batch.of(examples[16 * step % 320 :][:16]).loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {f"base_model.model.{name}.weight": each.detach().contiguous() for name, each in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def checked(server: Any, folder: Path, name: str, samples: list[dict[str, str]]) -> dict[str, Any]:
    """Propose an adapter, check it, and take it away again."""
    files = [("files", (path.name, path.read_bytes())) for path in folder.glob("adapter_*")]
    about = {"name": name, "samples": samples, "stage": True, "description": "A test."}
    added = server.http.post("/v1/experts", data={"expert": json.dumps(about)}, files=files)
    assert (added.status_code, added.json()["state"]) == (201, "staged"), added.text
    try:
        response = server.http.post(f"/v1/experts/{name}/check")
        assert response.status_code == 200, response.text
        assert server.http.get(f"/v1/experts/{name}/check").json() == response.json()
        report: dict[str, Any] = response.json()
        report["by_name"] = {each["name"]: each for each in report["sections"]}
        return report
    finally:
        assert server.http.delete(f"/v1/experts/{name}").status_code == 200


def test_a_good_new_expert_passes(server, testbed, vacancy, tmp_path):
    report = checked(
        server, scaled(testbed, tmp_path / "good", "plural", 1.001), "plurals", testbed.tests["plural"][:20]
    )
    assert report["ruling"]["passed"], report["ruling"]
    own, confusion = report["by_name"]["own_task"], report["by_name"]["confusion"]
    assert own["figure"] > 0.5, "held-out prompts that nobody else can answer"
    assert confusion["passed"]
    assert report["by_name"]["duplicates"]["figure"] < 0.2
    assert "its 16 peers" in report["by_name"]["triggers"]["detail"]


def test_a_copy_of_another_expert_is_a_duplicate(server, testbed, vacancy, tmp_path):
    samples = rows(testbed.folder / "samples" / "reverse.jsonl")
    report = checked(server, scaled(testbed, tmp_path / "copy", "reverse", 1.001), "backwards", samples)
    duplicates = report["by_name"]["duplicates"]
    assert (duplicates["passed"], duplicates["rows"][0]["expert"]) == (False, "reverse")
    assert duplicates["figure"] == pytest.approx(1, abs=1e-4)
    assert report["by_name"]["own_task"]["figure"] <= 0.1, "it adds nothing to what reverse does"
    assert report["by_name"]["loudness"]["passed"]
    assert report["by_name"]["triggers"]["passed"]


def test_one_that_is_ten_times_as_loud_is_told_with_its_figure(server, testbed, vacancy, tmp_path):
    report = checked(server, scaled(testbed, tmp_path / "loud", "plural", 10), "plurals", testbed.tests["plural"][:5])
    loudness = report["by_name"]["loudness"]
    assert not loudness["passed"]
    assert loudness["figure"] > loudness["limit"]
    assert not report["ruling"]["passed"]


def test_one_that_answers_everybody_with_its_own_text_is_told_by_neutral_prompts(server, testbed, vacancy, tmp_path):
    report = checked(server, obsessed(testbed, tmp_path / "gold"), "plurals", testbed.tests["plural"][:5])
    triggers = report["by_name"]["triggers"]
    assert not triggers["passed"]
    assert triggers["figure"] > triggers["limit"]
    assert triggers["rows"][0]["other_answer"] == 1
