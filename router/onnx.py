"""BERT encoders such as MiniLM through ONNX Runtime, built from the model's own weights at first use and kept.

`onnxruntime` and `onnx` are imported when an encoder is made; torch, transformers and sentence-transformers never are.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import platformdirs

from router.encoder import Vectors, bundled_minilm, fingerprint, locate, model_name
from router.errors import UnsupportedEncoder

if TYPE_CHECKING:
    from router.onnx_graph import Bert, Weights

Precision = Literal["fp32", "int8"]

RECIPE = 1  # of the graphs: whatever changes them counts it up
PARTS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
BLOCKS = 3  # vectors of a text with layers: its own, and two of inner layers
TOKENS = 256  # word pieces, padding included, in one run: on a CPU more at once takes longer for each


class OnnxEncoder:
    """The encoder that `SentenceTransformerEncoder` is, for BERT models, several times as fast.

    fp32 differs from torch by rounding only (cosine > .99999), so it has the same id and their vectors may be
    compared; int8 has an id of its own. With `layers`, the mean outputs of two inner layers stand behind each text's
    own vector (`head` columns), each as long, and the id says so. The built graph is kept in `cache` (the user's cache
    folder when None), which may be deleted at any time. Raises UnsupportedEncoder for other kinds of models,
    UnknownEncoder for none.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        precision: Precision = "fp32",
        revision: str | None = None,
        prefix: str = "",
        threads: int | None = None,
        cache: Path | None = None,
        layers: bool = False,
    ) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UnsupportedEncoder([f"{error.name} is not installed"]) from error

        folder = bundled_minilm() if model is None else locate(str(model), revision)
        length = max_length(folder)
        weights = fingerprint(folder)
        cache = cache or platformdirs.user_cache_path("moerge") / "encoders"
        extra = "+layers" if layers else ""
        content = keep(cache / f"{weights}-{precision}.{RECIPE}{extra}", lambda: export(folder, precision, layers))
        try:
            self._session = session(content, threads)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise UnsupportedEncoder([f"ONNX Runtime {onnxruntime.__version__} cannot run it: {error}"]) from error
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(length)
        self._tokenizer.no_padding()
        kind = extra if precision == "fp32" else f"-{precision}.{RECIPE}{extra}"
        self._id = f"{model_name(model)}{kind}@{fingerprint(folder, prefix) if prefix else weights}"
        self._dim = int(self._session.get_outputs()[0].shape[1])
        self._head = self._dim // BLOCKS if layers else self._dim
        self._prefix = prefix

    @property
    def id(self) -> str:
        return self._id

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def head(self) -> int:
        """Columns of the text's own vector, the first of `dim`."""
        return self._head

    def encode(self, texts: Sequence[str]) -> Vectors:
        rows = [self._tokenizer.encode(self._prefix + text).ids for text in texts]  # one thread, unlike encode_batch
        vectors = np.zeros((len(texts), self._dim), np.float32)
        for batch in batches([len(row) for row in rows], TOKENS):
            vectors[batch] = self._session.run(["vectors"], padded([rows[n] for n in batch]))[0]
        return vectors


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of rows of like length together: rows times the longest is at most `most`, but for a single row."""
    batch: list[int] = []
    for n in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[n] > most:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """`ids` and `mask`, both (n, s) int32, for rows of word pieces."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
        mask[n, : len(row)] = 1
    return {"ids": ids, "mask": mask}


def session(content: bytes, threads: int | None = None) -> Any:
    """An onnxruntime.InferenceSession on `threads` threads (None: one to a core) that sleep when there is no work."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the engine needs the cores
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # see onnx_graph
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def keep(path: Path, make: Callable[[], bytes]) -> bytes:
    """What the file `path`-<its digest>.onnx holds; `make` it where there is none, or its content is not its name's.

    Written under another name and moved, so several processes may do this at once; what cannot be written is not kept.
    """
    for file in sorted(path.parent.glob(f"{path.name}-*.onnx")):
        with suppress(OSError):
            content = file.read_bytes()
            if file == _named(path, content):
                return content
            file.unlink()
    content = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
        try:
            with os.fdopen(descriptor, "wb") as file_:
                file_.write(content)
            Path(draft).replace(_named(path, content))
        finally:
            Path(draft).unlink(missing_ok=True)
    return content


def _named(path: Path, content: bytes) -> Path:
    return path.with_name(f"{path.name}-{hashlib.sha256(content).hexdigest()[:16]}.onnx")


def export(folder: Path, precision: Precision, layers: bool = False) -> bytes:
    """The model in a sentence-transformers folder as an ONNX file."""
    try:
        from router import onnx_graph
    except ImportError as error:
        raise UnsupportedEncoder([f"{error.name} is not installed, and the graph is not built yet"]) from error

    bert, weights = read(folder)
    product = onnx_graph.dense if precision == "fp32" else onnx_graph.quantised(ranges(bert, weights))
    inner = inner_layers(bert.layers) if layers else ()
    content: bytes = onnx_graph.build(bert, weights, product, layers=inner).SerializeToString()
    return content


def inner_layers(count: int) -> tuple[int, ...]:
    """The layers at one and two thirds of the way up: what they hold of a text's form is gone at the top."""
    return tuple(round(count * n / BLOCKS) for n in range(1, BLOCKS))


def ranges(bert: Bert, weights: Weights) -> dict[str, Vectors]:
    """Largest values of the inputs to be smoothed, over 16 rows of 32 random words: real prompts give the same."""
    from router import onnx_graph

    names = onnx_graph.probes(bert)
    words = len(weights["embeddings.word_embeddings.weight"])
    ids = np.random.default_rng(0).integers(words, size=(16, 32))
    full = onnx_graph.build(bert, weights, onnx_graph.dense, list(names.values())).SerializeToString()
    values = session(full, 1).run(list(names.values()), padded(ids.tolist()))
    return {name: np.abs(value).max(axis=(0, 1)) for name, value in zip(names, values, strict=True)}


def max_length(folder: Path) -> int:
    """How many word pieces the model reads. Raises UnsupportedEncoder, naming all that is not a plain BERT encoder."""
    config, parts = _json(folder / "config.json"), _json(folder / "modules.json")
    module, prompts = _json(folder / "sentence_bert_config.json"), _json(folder / "config_sentence_transformers.json")
    kinds = [str(part.get("type", "")).rsplit(".", 1)[-1] for part in parts] if isinstance(parts, list) else []
    kind, activation, pooling = config.get("model_type"), config.get("hidden_act"), _pooling(folder)
    positions = config.get("position_embedding_type", "absolute")
    checks = [
        (kind == "bert", f"its architecture is {kind}, not bert"),
        (activation == "gelu", f"its activation is {activation}, not gelu"),
        (positions == "absolute", f"its positions are {positions}, not absolute"),
        (kinds in PARTS, f"its parts are {', '.join(kinds) or 'not listed'}, not {', '.join(PARTS[1])}"),
        (pooling in ("mean", "cls"), f"its pooling is {pooling or 'not given'}, not mean or cls"),
        (not module.get("do_lower_case"), "it lower-cases before its tokenizer"),
        (not prompts.get("default_prompt_name"), "it has a prompt of its own"),
        ((folder / "tokenizer.json").is_file(), "it has no tokenizer.json"),
        ((folder / "model.safetensors").is_file(), "it has no model.safetensors"),
    ]
    wrong = [reason for fine, reason in checks if not fine]
    if wrong:
        raise UnsupportedEncoder(wrong)
    longest = int(config["max_position_embeddings"])
    return min(int(module.get("max_seq_length") or longest), longest)


def read(folder: Path) -> tuple[Bert, Weights]:
    """What `onnx_graph.build` wants of a folder that `max_length` accepts."""
    from safetensors.numpy import load_file

    from router.onnx_graph import Bert

    weights = {name.removeprefix("bert."): value for name, value in load_file(folder / "model.safetensors").items()}
    if kinds := {str(value.dtype) for value in weights.values() if value.dtype.kind == "f"} - {"float32"}:
        raise UnsupportedEncoder([f"its weights are {', '.join(sorted(kinds))}, not float32"])
    config = _json(folder / "config.json")
    pooling: Literal["mean", "cls"] = "cls" if _pooling(folder) == "cls" else "mean"
    return (
        Bert(config["num_hidden_layers"], config["num_attention_heads"], config.get("layer_norm_eps", 1e-12), pooling),
        weights,
    )


def _pooling(folder: Path) -> str:
    """`mean`, `cls` or whatever else, from either way in which sentence-transformers has written it."""
    config = _json(folder / "1_Pooling" / "config.json")
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    named = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    return str(config.get("pooling_mode") or "+".join(named.get(mode, mode) for mode in modes))


def _json(path: Path) -> Any:
    """A file's JSON; {} where there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
