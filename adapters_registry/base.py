"""The base model as adapters see it: which linear modules it has, and of which shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from adapters_registry.errors import BaseModelError

Shape = tuple[int, int]  # (d_out, d_in)


@dataclass(frozen=True)
class BaseSpec:
    """A base model's name, the other names it goes by, and its linear modules `{path: (d_out, d_in)}`.

    `aliases` are the names under which adapters may refer to it: Hub ids, mirrors of the same weights.
    """

    name: str
    modules: Mapping[str, Shape] = field(repr=False)
    aliases: frozenset[str] = frozenset()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        aliases: frozenset[str] | set[str] = frozenset(),
    ) -> BaseSpec:
        """Read a folder or a Hub repo's `config.json`; weights are neither needed nor read.

        The model is built on PyTorch's meta device, so every architecture that transformers knows works.
        Raises BaseModelError when there is no readable configuration.
        """
        reference = str(model)
        folder = Path(model)
        stamp = 0
        if folder.is_dir():
            reference = str(folder.resolve())
            config = folder / "config.json"
            if not config.is_file():
                raise BaseModelError(f"No config.json in {folder}; give the folder of a transformers model.")
            stamp = config.stat().st_mtime_ns
        modules = _linear_modules(reference, revision, stamp)
        known = {str(model), reference, *aliases}
        return cls(name=name or folder.name, modules=modules, aliases=frozenset(known))

    @property
    def accepted(self) -> frozenset[str]:
        """Every name under which an adapter may mean this model, case-folded."""
        return frozenset(each.casefold() for each in (self.name, *self.aliases))


@lru_cache(maxsize=8)
def _linear_modules(reference: str, revision: str | None, stamp: int) -> Mapping[str, Shape]:
    """`stamp` (the configuration's modification time) only makes the cache notice a changed file."""
    # Imported here: transformers takes seconds, and most users of this package never need it.
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    try:
        config = transformers.AutoConfig.from_pretrained(reference, revision=revision)
        # The declared class first: of a multimodal model the causal one would show only a part.
        declared = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if declared is not None:
                model = declared(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise BaseModelError(f"Cannot read the configuration of base model '{reference}': {error}") from error
    shapes: dict[str, Shape] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[path] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
    if not shapes:
        raise BaseModelError(f"Base model '{reference}' has no linear modules that an adapter could target.")
    return MappingProxyType(shapes)
