from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from eval.routebench import prompt_sets, quickstart_set
from router import onnx as onnx_module
from router.encoder import Backend, SentenceTransformerEncoder, Vectors, bundled_minilm, fingerprint, load_encoder
from router.errors import UnknownEncoder, UnsupportedEncoder
from router.onnx import OnnxEncoder, Precision, batches, export, keep, session
from router.onnx_graph import Graph, dense, quantised, smoothing
from router.text import BUDGET, shorten

ROUTEBENCH = Path(__file__).parents[3] / "shared" / "routebench"
ODD = ["", " \n", "Hi", "Привет 👋", "日本語のテキスト", "word " * 2000, "transform BANANA", "x" * 5000]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user cache") / "encoders"


@pytest.fixture(scope="module")
def fp32(cache: Path) -> OnnxEncoder:
    return OnnxEncoder(precision="fp32", threads=1, cache=cache)


@pytest.fixture(scope="module")
def int8(cache: Path) -> OnnxEncoder:
    return OnnxEncoder(precision="int8", threads=1, cache=cache)


def some(texts: Sequence[str], count: int) -> list[str]:
    return [shorten(text.strip(), BUDGET) for text in random.Random(0).sample(sorted(set(texts)), count)]


def cosines(a: Vectors, b: Vectors) -> Vectors:
    """(n,) of the rows of a and b, both of length 1."""
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    return np.asarray((a * b).sum(axis=1))


# Torch is the slow twin.


def test_fp32_is_torch_but_for_rounding_so_they_share_an_id(
    fp32: OnnxEncoder, minilm: SentenceTransformerEncoder
) -> None:
    texts = some([text for _, text in quickstart_set().test], 30) + ODD
    vectors = fp32.encode(texts)
    np.testing.assert_allclose(vectors, minilm.encode(texts), atol=1e-5)
    assert vectors.dtype == np.float32
    assert (fp32.id, fp32.dim) == (minilm.id, minilm.dim)


def test_int8_is_close_to_torch_on_the_testbed_and_has_an_id_of_its_own(
    int8: OnnxEncoder, minilm: SentenceTransformerEncoder
) -> None:
    texts = some([text for _, text in quickstart_set().test], 60)
    assert cosines(int8.encode(texts), minilm.encode(texts)).min() > 0.99
    assert cosines(int8.encode(ODD), minilm.encode(ODD)).min() > 0.98
    assert int8.id == f"all-MiniLM-L6-v2-int8.1@{fingerprint(bundled_minilm())}"


@pytest.mark.skipif(not ROUTEBENCH.is_dir(), reason=f"no prompts in {ROUTEBENCH}")
def test_both_are_close_to_torch_on_real_prompts(
    fp32: OnnxEncoder, int8: OnnxEncoder, minilm: SentenceTransformerEncoder
) -> None:
    texts = [text for read in prompt_sets(ROUTEBENCH).values() for text in some([text for _, text in read().test], 8)]
    exact = minilm.encode(texts)
    assert cosines(fp32.encode(texts), exact).min() > 0.9999
    assert cosines(int8.encode(texts), exact).min() > 0.99


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sentence encoder like bge: 2 layers, 4 heads, random weights, what the first token says."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path / "tiny"
    shutil.copytree(bundled_minilm(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    model = BertModel(BertConfig(vocab_size=30522, num_attention_heads=4, layer_norm_eps=1e-3, **small))
    for name, weight in model.named_parameters():
        if "LayerNorm" in name or "bias" in name:
            torch.nn.init.normal_(weight, mean=float(name.endswith("Norm.weight")), std=0.3)
    model.save_pretrained(folder)
    pooling = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_another_bert_that_pools_by_its_first_token(folder: Path, cache: Path) -> None:
    exact = SentenceTransformerEncoder(folder, threads=1)
    texts = ["Spell banana backwards", "What is the capital of France? " * 20, *ODD]
    fp32 = OnnxEncoder(folder, threads=1, cache=cache)
    np.testing.assert_allclose(fp32.encode(texts), exact.encode(texts), atol=1e-5)
    assert (fp32.id, fp32.dim) == (exact.id, 64)
    int8 = OnnxEncoder(folder, precision="int8", threads=1, cache=cache)
    assert cosines(int8.encode(texts), exact.encode(texts)).min() > 0.98


# One text, one vector.


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_a_vector_does_not_depend_on_its_batch(name: str, request: pytest.FixtureRequest) -> None:
    encoder: OnnxEncoder = request.getfixturevalue(name)
    texts = [*ODD, *(f"text {n} " * n for n in range(1, 30))]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), alone, atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_a_prefix_is_read_before_every_text_and_is_part_of_the_id(int8: OnnxEncoder, cache: Path) -> None:
    prefixed = OnnxEncoder(precision="int8", prefix="Represent this: ", threads=1, cache=cache)
    np.testing.assert_allclose(prefixed.encode(["x y"]), int8.encode(["Represent this: x y"]), atol=1e-6)
    assert prefixed.id != int8.id


@given(st.lists(st.integers(2, 256)), st.integers(1, 512))
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(lengths: list[int], most: int) -> None:
    found = list(batches(lengths, most))
    assert sorted(n for batch in found for n in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[n] for n in batch) <= most for batch in found)


# The mathematics of a quantised layer.


def run(product: Any, x: Vectors, W: Vectors, name: str) -> Vectors:
    graph = Graph()
    output = product(graph, "x", W, name)
    values = [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in ("x", output)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_graph(graph.nodes, "product", values[:1], values[1:], graph.constants)
    model: onnx.ModelProto = helper.make_model(proto, opset_imports=opsets, ir_version=9)
    return np.asarray(session(model.SerializeToString(), 1).run(None, {"x": x})[0])


def int8_product(x: Vectors, W: Vectors, *, positive: bool) -> Vectors:
    """r_t c_n sum_k (P_tk - z) Q_kn - shift c_n sum_k Q_kn, number by number."""
    y = np.zeros((len(x), W.shape[1]))
    shift, z, levels = (0.17, 0, 255) if positive else (0.0, 128, 127)
    for t, row in enumerate(x):
        r = (max(row) + shift if positive else max(abs(row))) / levels
        for n, column in enumerate(W.T):
            c = max(abs(column)) / 63
            for k in range(len(row)):
                P, Q = np.rint((row[k] + shift) / r) + z, np.rint(column[k] / c)
                y[t, n] += r * c * (P - z) * Q - shift * c * Q
    return y


@pytest.mark.parametrize("positive", [False, True])
def test_a_quantised_product_is_what_its_equation_says(positive: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 12)).astype(np.float32) * np.array([[1], [100], [1e-3], [1], [7]], np.float32)
    x = np.abs(x) - np.float32(0.1) if positive else x
    W = rng.normal(size=(12, 7)).astype(np.float32)
    y = run(quantised({}), x, W, "0.down" if positive else "0.o")
    scale = np.abs(x).max(axis=1, keepdims=True)
    np.testing.assert_allclose(y / scale, int8_product(x, W, positive=positive) / scale, atol=0.02)
    np.testing.assert_allclose(run(dense, x, W, "0.o"), x @ W, rtol=1e-5, atol=1e-5 * scale.max())


def test_smoothing_takes_from_loud_channels_and_changes_no_product() -> None:
    rng = np.random.default_rng(0)
    size = np.array([30, 1, 1, 1, 1, 1, 1, 1], np.float32)
    x, W = (rng.normal(size=shape).astype(np.float32) for shape in ((100, 8), (8, 4)))
    x *= size
    s = smoothing(size, W)
    np.testing.assert_allclose((x / s) @ (W * s[:, None]), x @ W, rtol=1e-3, atol=1e-4)
    exact = x @ W
    plain, smooth = (np.abs(run(quantised(given), x, W, "0.up") - exact).mean() for given in ({}, {"0.up": size}))
    assert smooth < plain


# What is kept.


def test_an_encoder_is_exported_once(cache: Path, int8: OnnxEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_module, "export", lambda *_: pytest.fail("exported again"))
    again = OnnxEncoder(precision="int8", threads=1, cache=cache)
    np.testing.assert_array_equal(again.encode(["Hi"]), int8.encode(["Hi"]))


def test_an_export_is_the_same_every_time(folder: Path) -> None:
    assert export(folder, "int8") == export(folder, "int8")


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\0" + content[1:], lambda _: b""])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "encoders" / "model"
    assert keep(path, lambda: b"right") == b"right"
    (file,) = path.parent.iterdir()
    file.write_bytes(damage(b"right"))
    assert keep(path, lambda: b"right") == b"right"
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"right"]
    assert keep(path, lambda: b"never made") == b"right"


def test_many_at_once_leave_one_file(tmp_path: Path) -> None:
    path = tmp_path / "encoders" / "model"
    found: list[bytes] = []
    start = threading.Barrier(8)

    def use() -> None:
        start.wait()
        found.append(keep(path, lambda: b"right" * 10_000))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"right" * 10_000] * 8
    assert len(list(path.parent.iterdir())) == 1


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert keep(tmp_path / "file" / "encoders" / "model", lambda: b"right") == b"right"


# What runs what.


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", {"model_type": "mpnet"}, "its architecture is mpnet, not bert"),
        ("config.json", {"hidden_act": "relu"}, "its activation is relu, not gelu"),
        ("config.json", {"position_embedding_type": "relative_key"}, "its positions are relative_key, not absolute"),
        ("modules.json", [{"type": "a.Transformer"}], "its parts are Transformer, not Transformer, Pooling, Normalize"),
        ("modules.json", None, "its parts are not listed, not Transformer, Pooling, Normalize"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "its pooling is max, not mean or cls"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "it lower-cases before its tokenizer"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "it has a prompt of its own"),
        ("tokenizer.json", None, "it has no tokenizer.json"),
        ("model.safetensors", None, "it has no model.safetensors"),
    ],
)
def test_what_is_no_plain_bert_is_refused(folder: Path, cache: Path, file: str, change: Any, reason: str) -> None:
    if change is None:
        (folder / file).unlink()
    else:
        before = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(before | change if isinstance(change, dict) else change))
    with pytest.raises(UnsupportedEncoder) as caught:
        OnnxEncoder(folder, cache=cache)
    assert str(caught.value) == f"ONNX Runtime cannot run this encoder: {reason}. Use the backend torch."


def test_weights_in_another_type_are_refused(folder: Path, cache: Path) -> None:
    from transformers import BertModel

    BertModel.from_pretrained(folder).half().save_pretrained(folder)
    with pytest.raises(UnsupportedEncoder, match="its weights are float16, not float32"):
        OnnxEncoder(folder, cache=cache)


@pytest.fixture
def home(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache is the tests'."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: cache.parent)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("backend", "kind", "name"),
    [
        ("auto", OnnxEncoder, "all-MiniLM-L6-v2-int8.1+layers"),
        ("onnx-int8", OnnxEncoder, "all-MiniLM-L6-v2-int8.1+layers"),
        ("onnx", OnnxEncoder, "all-MiniLM-L6-v2+layers"),
        ("torch", SentenceTransformerEncoder, "all-MiniLM-L6-v2"),
    ],
)
def test_a_backend_is_chosen_by_name(backend: Backend, kind: type, name: str) -> None:
    encoder = load_encoder(backend=backend, threads=1)
    assert type(encoder) is kind
    assert encoder.id == f"{name}@{fingerprint(bundled_minilm())}"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("missing", ["onnxruntime", "tokenizers"])
def test_torch_does_it_where_onnx_runtime_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SentenceTransformerEncoder(threads=1)
    monkeypatch.setattr("router.encoder.SentenceTransformerEncoder", lambda *_, **__: torch)
    monkeypatch.setitem(sys.modules, missing, None)
    assert load_encoder(threads=1) is torch
    with pytest.raises(UnsupportedEncoder, match=f"{missing} is not installed"):
        load_encoder(backend="onnx", threads=1)


@pytest.mark.usefixtures("home")
def test_torch_does_it_for_other_models(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, "pooling_mode": "max"})
    )
    assert type(load_encoder(folder, threads=1)) is SentenceTransformerEncoder
    with pytest.raises(UnsupportedEncoder, match="its pooling is max"):
        load_encoder(folder, backend="onnx-int8")
    with pytest.raises(UnknownEncoder, match="neither a folder nor a Hub id"):
        load_encoder("no such model")


def test_a_start_imports_neither_torch_nor_what_builds_graphs(int8: OnnxEncoder, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from router.onnx import OnnxEncoder\n"
        "vector = OnnxEncoder(precision='int8', threads=1, cache=Path(sys.argv[1])).encode(['Hi'])\n"
        "print(vector.shape, {'torch', 'transformers', 'sentence_transformers', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 384) set()\n"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_inner_layers_stand_behind_the_same_vector(precision: Precision, cache: Path, fp32: OnnxEncoder) -> None:
    """Slow twin: transformers' hidden states, averaged over the tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["Spell banana backwards", "Übersetze das: 你好 👋", "a longer text. " * 30]
    encoder = OnnxEncoder(precision=precision, threads=1, cache=cache, layers=True)
    assert (encoder.dim, encoder.head) == (3 * 384, 384)
    vectors = encoder.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    blocks = vectors.reshape(3, 3, 384) * 3**0.5  # (texts, blocks, d)

    folder = bundled_minilm()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for text, found in zip(texts, blocks, strict=True):
        with torch.no_grad():
            states = model(**tokenizer([text], return_tensors="pt"), output_hidden_states=True).hidden_states
        wanted = np.stack([states[n][0].mean(0).numpy() for n in (6, 2, 4)])
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        assert (wanted * found).sum(axis=1).min() > (0.99999 if precision == "fp32" else 0.99)
    np.testing.assert_allclose(blocks[:, 0], OnnxEncoder(precision=precision, cache=cache).encode(texts), atol=1e-5)
    assert fp32.head == fp32.dim == 384
