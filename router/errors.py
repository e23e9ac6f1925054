"""What can go wrong in the router, and what to do about it.

RouterError
├── UnknownMethod        a method that this router does not serve
├── UnknownEncoder       no embedding model under that name or path
├── UnsupportedEncoder   an embedding model that ONNX Runtime cannot run here
├── EncoderFailed        the embedding model raised, or returned something that is no embedding
├── RouterClosed         used after close()
└── NotReady             routed before the first refresh()
"""

from __future__ import annotations

from collections.abc import Iterable


class RouterError(Exception):
    """Any error that the router raises on purpose."""


class UnknownMethod(RouterError):
    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(f"No routing method {name!r}. Served: {', '.join(self.known)}.")


class UnknownEncoder(RouterError):
    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(f"No embedding model {name!r}: {detail}")


class UnsupportedEncoder(RouterError):
    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"ONNX Runtime cannot run this encoder: {'; '.join(self.reasons)}. Use the backend torch.")


class EncoderFailed(RouterError):
    """The embedding model did not return unit vectors; `__cause__` is its own exception, if it raised."""


class RouterClosed(RouterError):
    def __init__(self) -> None:
        super().__init__("This router is closed. Build a new one.")


class NotReady(RouterError):
    def __init__(self) -> None:
        super().__init__("The router has no experts yet: call refresh() first.")
