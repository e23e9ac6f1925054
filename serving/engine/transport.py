"""A trace on its way from a worker's process to the server's: JSON and safetensors, no pickle."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load, save

from serving.engine import Trace


def pack(trace: Trace) -> tuple[str, bytes]:
    arrays = {"weights": trace.weights, "top": trace.top, "evidence": trace.evidence}
    arrays |= {f"moments.{name}": each for name, each in trace.moments.items()}
    head = json.dumps({"groups": trace.groups, "tokens": trace.tokens})
    return head, save({name: np.ascontiguousarray(each) for name, each in arrays.items()})


def unpack(head: str, body: bytes) -> Trace:
    about, arrays = json.loads(head), load(body)
    prefix = "moments."
    return Trace(
        groups=tuple(about["groups"]),
        tokens=about["tokens"],
        weights=arrays["weights"],
        top=arrays["top"],
        evidence=arrays["evidence"],
        moments={name.removeprefix(prefix): each for name, each in arrays.items() if name.startswith(prefix)},
    )
