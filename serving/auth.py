"""Who is calling. Without keys the server is a single user's, on loopback; with keys every call carries one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cachetools import TTLCache
from starlette.datastructures import Headers

from adapters_registry.keys import ApiKeys, Scope
from serving.errors import Forbidden, Unauthorized

#: For how long a verified (or revoked) key is remembered, in seconds.
MEMORY = 2.0


@dataclass(frozen=True)
class Caller:
    """`tenant` None is the operator, who sees and may change everything."""

    tenant: str | None
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Raise Forbidden without the scope; `admin` includes `infer`."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise Forbidden(f"This API key does not have the scope '{scope}'.")


class Unknown:
    """Remembered of a key that is none, or revoked."""


OPERATOR_NAME = "operator"
OPERATOR = Caller(None, frozenset({"infer", "admin"}))


class Authenticator:
    """Turns request headers into a Caller. `always` asks for a key even while there is none."""

    def __init__(self, keys: ApiKeys, *, always: bool) -> None:
        self._keys = keys
        self._always = always
        self._needed: TTLCache[str, bool] = TTLCache(maxsize=1, ttl=MEMORY)
        self._seen: TTLCache[str, Caller | Unknown] = TTLCache(maxsize=4096, ttl=MEMORY)

    async def needed(self) -> bool:
        """True off loopback, and as soon as there is a key in force."""
        if self._always:
            return True
        if (needed := self._needed.get("")) is None:
            keys = await asyncio.to_thread(self._keys.list)
            needed = self._needed[""] = any(key.revoked_at is None for key in keys)
        return needed

    async def caller(self, headers: Headers) -> Caller:
        """Raises Unauthorized when a key is needed and this is none."""
        if not await self.needed():
            return OPERATOR
        token = bearer(headers)
        if token is None:
            raise Unauthorized("No API key: send 'Authorization: Bearer moe-...' (`moerge keys create` makes one).")
        # Asked once: what is remembered may run out between two looks at it.
        if (caller := self._seen.get(token)) is None:
            info = await asyncio.to_thread(self._keys.verify, token)
            caller = self._seen[token] = Unknown() if info is None else Caller(tenant_of(info.owner), info.scopes)
        if isinstance(caller, Unknown):
            raise Unauthorized("This API key is not valid.")
        return caller


def tenant_of(owner: str) -> str | None:
    """Keys of the owner `operator` are not bound to a tenant."""
    return None if owner == OPERATOR_NAME else owner


def bearer(headers: Headers) -> str | None:
    """The key of `Authorization: Bearer` (OpenAI) or `x-api-key` (Anthropic)."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None
