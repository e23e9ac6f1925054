from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.routing import (
    Embedder,
    PromptSet,
    calibration_error,
    library_of,
    measure,
    prompt_sets,
    quickstart_set,
)
from router.methods.retrieval import Retrieval, RetrievalSettings

AXES = np.eye(4, dtype=np.float32)
REGISTER = (("a", "one"), ("b", "two"), ("a", "three"), ("c", "four"))


def test_what_is_measured_on_four_directions() -> None:
    library = library_of(REGISTER, AXES)
    assert [expert.name for expert in library.experts] == ["a", "b", "c"]
    method = Retrieval.fit(library, RetrievalSettings(scoring="best", threshold=0.5))
    test = [("a", "right"), ("b", "taken by c"), ("c", "right but lost")]
    near_c = np.array([0, 0.6, 0, 0.8], np.float32)
    result = measure(method, library, test, np.stack([AXES[0], near_c, 0.4 * AXES[3]]), np.stack([0.1 * AXES[0]]))
    assert result.top1 == pytest.approx(2 / 3)
    assert result.top3 == 1
    assert result.routed == pytest.approx(1 / 3)
    assert result.lost == pytest.approx(1 / 2)
    assert result.ood_rejected == 1


def test_calibration_error_is_the_distance_of_confidence_from_accuracy() -> None:
    assert calibration_error(np.array([0.95, 0.95]), np.array([1, 0])) == pytest.approx(0.45)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0


def test_the_halves_share_no_prompt_and_make_the_whole() -> None:
    whole = PromptSet("x", REGISTER, REGISTER, ("p", "q", "r"))
    (tune, even), (report, odd) = whole.half("tune"), whole.half("report")
    assert sorted(tune + report) == whole.half("all")[0] == [0, 1, 2, 3]
    assert {REGISTER[n][0] for n in tune} == {"a", "c"}
    assert (whole.ood[even], whole.ood[odd]) == (("p", "r"), ("q",))


def test_embeddings_are_kept_in_a_folder(tmp_path: Path) -> None:
    class Counting:
        id, dim, calls = "counting", 4, 0

        def encode(self, texts: Any) -> Any:
            self.calls += 1
            return np.ones((len(texts), 4), np.float32)

    encoder = Counting()
    for _ in range(2):
        assert Embedder(encoder, tmp_path / "new")(["a", "b"]).shape == (2, 4)
    assert encoder.calls == 1


def test_prompt_sets_are_read_from_their_folder(tmp_path: Path) -> None:
    forms = {"instance": "i", "brief": "b", "instruct": "d"}
    files: dict[str, list[dict[str, str]]] = {
        "scale/test": [{"task": "clinc_a", "instance": "s"}, {"task": "t0_a", "instance": "t"}],
        "ni150/register": [{"task": "n", **forms}],
        "ni150/test": [{"task": "n", **forms}],
        "ni150/ood": [forms],
        "flan48/register": [{"task": "f", "prompt": "p"}],
        "flan48/test": [{"task": "f", "prompt": "q"}],
        "paraphrase/prompts": [
            {"task": "p", "split": "register", "prompt": "one"},
            {"task": "p", "split": "test", "prompt": "two"},
        ],
    }
    for name, rows in files.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))
    sets = {each.name: each for each in prompt_sets(tmp_path)}
    assert list(sets) == ["ni150 instance", "ni150 brief", "ni150 instruct", "flan48", "paraphrase"]
    assert sets["ni150 brief"].ood == ("b",)
    assert sets["flan48"].ood == ("s",)
    assert (sets["paraphrase"].register, sets["paraphrase"].test) == ((("p", "one"),), (("p", "two"),))


def test_the_quickstart_set_registers_every_expert_and_tests_the_instruction_told() -> None:
    prompts = quickstart_set()
    tested = {task for task, _ in prompts.test}
    assert len(tested) >= 12
    assert tested < {task for task, _ in prompts.register}
    assert len(prompts.ood) == 100
