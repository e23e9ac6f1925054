"""One step of the engine: which request owns which rows of the batch, and where its KV cache lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Keys of a request's `vllm_xargs` that the plugin reads.
WEIGHTS, TRACE, COLLECT = "moerge_weights", "moerge_trace", "moerge_collect"


@dataclass(frozen=True, eq=False)
class Request:
    """A request's share in a step.

    id         the engine's own, unique among those that are running
    slot       of its adapter
    tokens     rows of the batch that are its own, one after another
    computed   tokens of it that were computed, or found in the prefix cache, before this step
    blocks     physical KV blocks of all its tokens, in order
    arguments  what it brought along (`vllm_xargs`)
    """

    id: str
    slot: int
    tokens: int
    computed: int
    blocks: NDArray[np.integer[Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests whose slot holds a composite, in the order of their rows; the KV cache's geometry."""

    requests: tuple[Request, ...]
    block_size: int = 16
    num_blocks: int = 0
