"""Writing safetensors as the tensors come, so that a file may be larger than what fits in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, float32


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor]) -> None:
    """Write float32 `tensors`, which come in the order of `shapes`.

    The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, the header as JSON padded to
    a multiple of 8, the tensors one after the other.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.dtype == float32
            assert tuple(tensor.shape) == shape
            file.write(tensor.contiguous().numpy().data.cast("B"))
