"""A vLLM in this process, stepped by hand: for measurements, where a server's own work must not count."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: One process, so that its processor time is the engine's.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class OfflineVllm:
    """`longest` request and `step` in tokens; `plugin=False`: stock vLLM, without Moerge's plugin."""

    def __init__(self, model: Path, *, max_rank: int, slots: int, longest: int, step: int, plugin: bool = True) -> None:
        os.environ.update(ENVIRONMENT if plugin else {**ENVIRONMENT, "VLLM_PLUGINS": "none"})
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from serving.config import EngineSettings

        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model),
                skip_tokenizer_init=True,
                dtype="float32",
                enable_lora=True,
                max_loras=slots,
                max_cpu_loras=2 * slots,
                max_lora_rank=max_rank,
                lora_target_modules=list(EngineSettings().target_modules),
                max_model_len=longest,
                max_num_seqs=64,
                max_num_batched_tokens=step,
                enable_prefix_caching=False,
                enforce_eager=True,
                async_scheduling=False,
                disable_log_stats=True,
            )
        )
        self._adapters: dict[Path, Any] = {}
        self._asked = 0

    def load(self, adapter: Path) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(adapter.name, len(self._adapters) + 1, str(adapter))
        self._engine.add_lora(request)
        self._adapters[adapter] = request

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        adapter: Path | None = None,
        arguments: Mapping[str, Any] | None = None,
        stamp: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Every prompt's greedy continuation; `arguments` as in `vllm_xargs`; `stamp` is called after each step."""
        from vllm.sampling_params import SamplingParams

        lora = self._adapters[adapter] if adapter else None
        for prompt in prompts:
            params = SamplingParams(
                max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=dict(arguments or {})
            )
            self._asked += 1
            self._engine.add_request(str(self._asked), {"prompt_token_ids": list(prompt)}, params, lora_request=lora)
        answers: dict[str, list[int]] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
            stamp()
        return [answers[name] for name in sorted(answers, key=int)]
