"""The `vllm.general_plugins` entry point: vLLM calls `register` in every process it starts."""

from __future__ import annotations

from serving.engine import private


def register() -> None:
    """Install what serving needs in this vLLM process. Safe to call more than once."""
    private.check_version()
    private.use_first_model_runner()
    private.use_our_punica()
    private.accept_composites()
    private.know_the_model()
    private.check_adapters()
    private.fill_slots()
    private.follow_steps()
    private.key_prefix_cache()
    private.hand_out_traces()
