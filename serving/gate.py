"""What every request passes first: the host it names, and how much it sends."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from fastapi import HTTPException
from starlette.datastructures import Headers

from serving.config import ServerSettings
from serving.engine import ASGIApp, Message, Receive, Scope, Send
from serving.errors import BadRequest, error_response

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
#: The one path that takes files, and has a limit of its own.
UPLOADS = "/v1/experts"

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")


class Gate:
    """ASGI middleware.

    A web page that points its own name at 127.0.0.1 must not reach a server without keys, so on loopback only
    known hosts pass. Bodies are counted as they arrive, before anything is done with them.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._hosts = known_hosts(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(raw=scope["headers"])
        if self._hosts and not allowed(headers.get("host", ""), self._hosts):
            error = BadRequest(
                f"The host '{headers.get('host', '')}' is not served here. Ask for {self._hosts[0]}, or list the "
                "name in server.allowed_hosts."
            )
            await error_response(error)(scope, receive, send)
            return
        upload = scope["path"] == UPLOADS and headers.get("content-type", "").startswith("multipart/")
        setting = "max_upload_mb" if upload else "max_body_mb"
        megabytes: float = getattr(self._settings, setting)
        too_large = HTTPException(413, f"The request body is larger than {megabytes:g} MiB (server.{setting}).")
        if (length := headers.get("content-length", "0")).isdecimal() and int(length) > megabytes * 2**20:
            await error_response(too_large)(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > megabytes * 2**20:
                raise too_large
            return message

        await self._app(scope, counted, send)


def known_hosts(settings: ServerSettings) -> tuple[str, ...]:
    """Host names that requests may carry; none means any."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    own = (*LOOPBACK_HOSTS, host) if settings.loopback or settings.allowed_hosts else ()
    return tuple(dict.fromkeys(each.lower() for each in (*own, *settings.allowed_hosts)))


def allowed(host: str, known: Collection[str]) -> bool:
    """Whether a Host header, with or without a port, is one of these; `*.example.com` stands for its subdomains."""
    match = _HOST.fullmatch(host.lower())
    return match is not None and any(fnmatchcase(match[1], each.replace("[", "[[]")) for each in known)
