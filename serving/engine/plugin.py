"""The `vllm.general_plugins` entry point: vLLM calls `register` in every process it starts."""

from __future__ import annotations

from serving.engine import private


def register() -> None:
    """Install what serving needs in this vLLM process. Safe to call more than once."""
    private.check_version()
    private.use_segment_punica_on_cpu()
