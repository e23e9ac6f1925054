"""Packages of the extra `eval`: datasets, metrics of text, plots. Moerge serves without them."""

from __future__ import annotations

import importlib
from typing import Any


class ExtraMissing(Exception):
    """A package of the extra is not installed."""


def extra(module: str) -> Any:
    """The module, imported. Raises ExtraMissing, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # installed, and broken in some other way
        raise ExtraMissing(f"This needs the package '{error.name}': pip install 'moerge[eval]'") from error
