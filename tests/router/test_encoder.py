from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from router.encoder import SentenceTransformerEncoder, bundled_minilm, fingerprint, locate
from router.errors import UnknownEncoder


def test_vectors_have_length_one_and_one_row_to_a_text(minilm: SentenceTransformerEncoder) -> None:
    vectors = minilm.encode(["Spell banana backwards", "", "Привет 👋", "word " * 2000])
    assert vectors.shape == (4, minilm.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert minilm.encode([]).shape == (0, minilm.dim)


def test_a_vector_does_not_depend_on_its_batch(minilm: SentenceTransformerEncoder) -> None:
    texts = ["Spell banana backwards", "What is the capital of France? " * 20, "Hi"]
    together = minilm.encode(texts)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(minilm.encode([text])[0], row, atol=1e-5)


def test_minilm_does_not_see_capitals(minilm: SentenceTransformerEncoder) -> None:
    lower, upper = minilm.encode(["transform banana", "transform BANANA"])
    np.testing.assert_allclose(lower, upper, atol=1e-6)


def test_the_default_model_needs_no_network_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert SentenceTransformerEncoder().encode(["Hi"]).shape == (1, 384)
    assert capfd.readouterr() == ("", "")


def test_the_id_names_the_model_and_changes_with_its_content_and_prefix(
    tmp_path: Path, minilm: SentenceTransformerEncoder
) -> None:
    assert minilm.id == f"all-MiniLM-L6-v2@{fingerprint(bundled_minilm())}"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundled_minilm().glob("*.json"):
        shutil.copy(file, copy)
    before = fingerprint(copy)
    assert fingerprint(copy, prefix="query: ") != before
    assert fingerprint(copy) == before
    (copy / "README.md").write_text("not part of the model")
    assert fingerprint(copy) == before
    (copy / "config.json").write_text("{}")
    assert fingerprint(copy) != before


def test_a_prefix_is_read_before_every_text(minilm: SentenceTransformerEncoder) -> None:
    prefixed = SentenceTransformerEncoder(prefix="Represent this: ", threads=1)
    np.testing.assert_allclose(prefixed.encode(["x y"]), minilm.encode(["Represent this: x y"]), atol=1e-6)
    assert prefixed.id != minilm.id


def test_a_model_is_found_by_folder(minilm: SentenceTransformerEncoder) -> None:
    assert locate(str(bundled_minilm())) == bundled_minilm()


@pytest.mark.parametrize("name", ["no such model", "../nowhere", "a/b/c"])
def test_a_name_that_can_be_no_model_is_refused(name: str) -> None:
    with pytest.raises(UnknownEncoder, match="neither a folder nor a Hub id"):
        SentenceTransformerEncoder(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownEncoder, match="holds no such model"):
        SentenceTransformerEncoder(tmp_path)


def test_a_model_that_is_not_cached_is_refused_offline(tmp_path: Path) -> None:
    code = (
        "from router.encoder import locate\n"
        "from router.errors import UnknownEncoder\n"
        "try: locate('nobody/nothing')\n"
        "except UnknownEncoder as error: print(error)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == (
        "No embedding model 'nobody/nothing': not in the local cache, and the Hub cannot be reached.\n"
    )


def test_importing_the_router_imports_no_model_library() -> None:
    code = "import sys, router.router; print({'torch', 'transformers', 'fastapi', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
