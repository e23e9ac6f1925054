"""Tensors that are kept with an expert's version: trained gate vectors, calibration statistics."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load, save

FloatArray = NDArray[np.float32]

#: Bytes under one key. The gate vectors of every module of a 70B Llama take 22 MB.
LIMIT = 64 * 2**20
_KEY = re.compile(r"[a-z0-9][a-z0-9._/-]{0,99}")


def pack(key: str, tensors: Mapping[str, ArrayLike]) -> bytes:
    """Named tensors of any shape as safetensors bytes, float32; the same tensors always give the same bytes.

    Raises ValueError for a key, a name, a value or a size that cannot be stored.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"Tensors cannot be stored under '{key}'. A key matches {_KEY.pattern}.")
    arrays = {name: np.array(tensors[name], dtype="<f4", order="C") for name in sorted(tensors)}
    if not arrays:
        raise ValueError(f"There are no tensors to store under '{key}'.")
    wrong = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        raise ValueError(f"Tensors of '{key}' must be finite; these are not: {', '.join(wrong[:5])}.")
    size = sum(array.nbytes for array in arrays.values())
    if size > LIMIT:
        raise ValueError(f"The tensors of '{key}' take {size:,} bytes, more than {LIMIT:,}.")
    return bytes(save(arrays))


def unpack(data: bytes) -> dict[str, FloatArray]:
    return {name: np.asarray(array, np.float32) for name, array in load(data).items()}
