"""BERT as an ONNX graph, built from its safetensors weights: fp32, or int8 with a scale for every token.

ONNX Runtime's own dynamic quantisation has one scale for a whole batch: MiniLM's vectors come out with a cosine of
.993 to the right ones (at worst .983), and a text's vector depends on its neighbours in the batch. Here every token has
its own scale, as in ZeroQuant (https://arxiv.org/abs/2206.01861), and channels that are always large are shrunk
beforehand, as in SmoothQuant (https://arxiv.org/abs/2211.10438): as fast, .998 (.993), and nothing else matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Pooling = Literal["mean", "cls"]
Weights = Mapping[str, NDArray[np.float32]]
# Largest absolute value of every channel of the input of a linear layer, by the layer's name.
Ranges = Mapping[str, NDArray[np.float32]]
# (graph, input, W (k, n), name) -> x W
Product = Callable[["Graph", str, NDArray[np.float32], str], str]

FUSED = frozenset({"EmbedLayerNormalization", "MultiHeadAttention", "BiasGelu", "MatMulIntegerToFloat"})
WEIGHT_MAX = 63  # 7 bits: without VNNI, x86 adds pairs of products in 16 bits, and 2 * 255 * 63 just fits
GELU_MIN = 0.17  # gelu(x) >= -0.16998
SMOOTHING = 0.6  # how much of the spread of a channel goes from the input to the weights


@dataclass(frozen=True)
class Bert:
    """What a BERT sentence encoder is, besides its weights."""

    layers: int
    heads: int
    eps: float
    pooling: Pooling


class Graph:
    """Nodes and constants in the order in which they were added; everything is called by its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype, order="C"), name))
        return name

    def node(self, op: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        domain = "com.microsoft" if op in FUSED else ""
        self.nodes.append(helper.make_node(op, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs[0]

    def model(self, outputs: Mapping[str, Sequence[Any]]) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT32, ["n", "s"]) for name in ("ids", "mask")]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self.nodes, "bert", inputs, results, self.constants)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def build(
    bert: Bert, weights: Weights, product: Product, probes: Sequence[str] = (), layers: Sequence[int] = ()
) -> onnx.ModelProto:
    """ids, mask (n, s) int32, padded on the right -> `vectors` (n, d), of length 1; and the `probes`, by name.

    With `layers`, the mean outputs of these layers are behind the text's vector, each scaled to the same length:
    (n, d + d len(layers)), of length 1.
    """
    graph = Graph()
    constant, node = graph.constant, graph.node
    # All word pieces belong to segment 0, so its vector is part of the positions'.
    positions = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    tables = [constant("words", weights["embeddings.word_embeddings.weight"]), constant("positions", positions)]
    norm = _norm_constants(graph, weights, "embeddings.LayerNorm", "embeddings")
    inputs = ["ids", "", tables[0], tables[1], "", *norm, "mask"]
    x = node("EmbedLayerNormalization", inputs, "0", "lengths", epsilon=bert.eps)  # (n, s, d), (n,)
    for n in range(bert.layers):
        x = _layer(graph, bert, weights, product, x, n)

    first = constant("first", [1], np.int64)
    node("Cast", ["mask"], "mask32", to=TensorProto.FLOAT)
    node("Unsqueeze", ["mask32", first], "row")  # (n, 1, s)

    def mean(x: str) -> str:
        """mask x is the sum over tokens, which has the mean's direction."""
        return node("Squeeze", [node("MatMul", ["row", x], f"{x}.total"), first], f"{x}.mean")

    pooled = mean(x) if bert.pooling == "mean" else node("Gather", [x, constant("cls", 0, np.int64)], "cls.of", axis=1)
    blocks = [pooled, *(mean(str(n)) for n in layers)]
    if layers:
        units = [node("LpNormalization", [block], f"{block}.unit", axis=-1, p=2) for block in blocks]
        pooled = node("Concat", units, "blocks", axis=-1)
    node("LpNormalization", [pooled], "vectors", axis=-1, p=2)
    d = weights["embeddings.word_embeddings.weight"].shape[1] * len(blocks)
    return graph.model({"vectors": ["n", d]} | {probe: ["n", "s", None] for probe in probes})


def _layer(graph: Graph, bert: Bert, weights: Weights, product: Product, x: str, n: int) -> str:
    """h = LN(x + O attention(Q x, K x, V x)); LN(h + D gelu(U h)). Returns the name of its output, (n, s, d).

    Sums and norms are nodes of their own: ONNX Runtime's fused SkipLayerNormalization takes six times as long
    on a CPU, which is why a session must not optimise beyond the basic level.
    """

    def matrix(*names: str) -> NDArray[np.float32]:
        return np.concatenate([weights[f"encoder.layer.{n}.{name}.weight"].T for name in names], axis=1)

    def bias(*names: str) -> str:
        value = np.concatenate([weights[f"encoder.layer.{n}.{name}.bias"] for name in names])
        return graph.constant(f"{n}.{names[-1]}.bias", value)

    def norm(x: str, added: str, name: str, output: str) -> str:
        total = graph.node("Add", [x, added], f"{output}.sum")
        constants = _norm_constants(graph, weights, f"encoder.layer.{n}.{name}", output)
        return graph.node("LayerNormalization", [total, *constants], output, axis=-1, epsilon=bert.eps)

    qkv = [f"attention.self.{name}" for name in ("query", "key", "value")]
    product_of_qkv = product(graph, x, matrix(*qkv), f"{n}.qkv")
    parts = [f"{n}.q", f"{n}.k", f"{n}.v"]
    graph.node("Split", [product_of_qkv], *parts, axis=-1, num_outputs=3)
    read = graph.node("MultiHeadAttention", [*parts, bias(*qkv), "lengths"], f"{n}.read", num_heads=bert.heads)
    read = product(graph, read, matrix("attention.output.dense"), f"{n}.o")
    read = graph.node("Add", [read, bias("attention.output.dense")], f"{n}.attention")
    h = norm(x, read, "attention.output.LayerNorm", f"{n}.h")

    up = product(graph, h, matrix("intermediate.dense"), f"{n}.up")
    active = graph.node("BiasGelu", [up, bias("intermediate.dense")], f"{n}.active")
    down = product(graph, active, matrix("output.dense"), f"{n}.down")
    down = graph.node("Add", [down, bias("output.dense")], f"{n}.mlp")
    return norm(h, down, "output.LayerNorm", str(n + 1))


def _norm_constants(graph: Graph, weights: Weights, name: str, label: str) -> list[str]:
    return [graph.constant(f"{label}.norm.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias")]


def dense(graph: Graph, x: str, W: NDArray[np.float32], name: str) -> str:
    """x W in fp32."""
    return graph.node("MatMul", [x, graph.constant(f"{name}.weight", W)], f"{name}.product")


def quantised(ranges: Ranges) -> Product:
    """x W in int8, smoothed where `ranges` knows the input's channels.

    With Q = round(W / c), c_n = max_k |W_kn| / 63 (int8), and for every token t its own r_t = max_k |x_tk| / 127 and
    P = 128 + round(x / r) (uint8):

        x W ~ r_t c_n sum_k (P_tk - 128) Q_kn

    What comes from a GELU is never below -.17, so there r_t = (max_k x_tk + .17) / 255, P = round((x + .17) / r),
    and .17 c_n sum_k Q_kn, a constant, is taken off.

    Smoothing: x_k / s_k and s_k W_k instead, s_k = max |x_k|^.6 / max_n |W_kn|^.4.
    """

    def product(graph: Graph, x: str, W: NDArray[np.float32], name: str) -> str:
        constant, node = graph.constant, graph.node
        if name in ranges:
            s = smoothing(ranges[name], W)
            W = W * s[:, None]
            x = node("Mul", [x, constant(f"{name}.smoothing", 1 / s)], f"{name}.smoothed")
        c = np.maximum(np.abs(W).max(axis=0), 1e-12) / WEIGHT_MAX
        Q = np.rint(W / c)
        positive = name.endswith(".down")

        if positive:
            x = node("Add", [x, constant(f"{name}.shift", GELU_MIN)], f"{name}.shifted")
        size = x if positive else node("Abs", [x], f"{name}.size")
        top = node("ReduceMax", [size, constant(f"{name}.axis", [-1], np.int64)], f"{name}.max", keepdims=1)
        r = node("Div", [top, constant(f"{name}.levels", 255 if positive else 127)], f"{name}.scale")  # (n, s, 1)
        zero = constant(f"{name}.zero", 0 if positive else 128, np.uint8)
        one = constant(f"{name}.one", 1)
        scaled = node("Div", [x, r], f"{name}.scaled")
        P = node("QuantizeLinear", [scaled, one, zero], f"{name}.input")
        factors = [P, constant(f"{name}.weight", Q, np.int8), one, constant(f"{name}.scales", c), zero]
        y = node("MatMulIntegerToFloat", factors, f"{name}.unscaled")
        y = node("Mul", [y, r], f"{name}.rescaled" if positive else f"{name}.product")
        if not positive:
            return y
        return node("Sub", [y, constant(f"{name}.constant", GELU_MIN * (Q * c).sum(axis=0))], f"{name}.product")

    return product


def smoothing(size: NDArray[np.float32], W: NDArray[np.float32]) -> NDArray[np.float32]:
    """(k,): what the channels of the input, `size` (k,) at most, are divided by, and the rows of W multiplied by."""
    s = np.maximum(size, 1e-3) ** SMOOTHING / np.maximum(np.abs(W).max(axis=1), 1e-6) ** (1 - SMOOTHING)
    return np.asarray(s / np.exp(np.log(s).mean()), np.float32)


def probes(bert: Bert) -> dict[str, str]:
    """The nodes that feed the layers to be smoothed, by the layer's name: both are outputs of a LayerNorm."""
    return {f"{n}.qkv": str(n) for n in range(bert.layers)} | {f"{n}.up": f"{n}.h" for n in range(bert.layers)}
