"""Who may call, and what for."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from starlette.datastructures import Headers

from serving.auth import OPERATOR, Authenticator, bearer

REVERSE = "spell cherry backwards"


def with_key(token):
    return {"authorization": f"Bearer {token}"}


@asynccontextmanager
async def keyed(serve, **settings):
    """A server with an operator's key of each scope, and one of the tenant `ann`."""
    async with serve(**settings) as world:
        create = world.registry.keys.create
        keys = {
            "admin": (await asyncio.to_thread(create, "operator", ["admin"]))[1],
            "infer": (await asyncio.to_thread(create, "operator", ["infer"]))[1],
            "ann": (await asyncio.to_thread(create, "ann", ["infer", "admin"]))[1],
        }
        yield world, keys


async def test_on_loopback_without_keys_everything_is_open(world):
    assert (await world.ask("auto", REVERSE)).status_code == 200
    assert (await world.http.get("/metrics")).status_code == 200


async def test_the_first_key_closes_the_door(serve):
    async with keyed(serve) as (world, keys):
        response = await world.ask("auto", REVERSE)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert (await world.ask("auto", REVERSE, headers=with_key(keys["infer"]))).status_code == 200


async def test_off_loopback_a_key_is_always_asked_for_even_when_none_is_left(serve):
    async with serve(server={"host": "0.0.0.0"}) as world:
        assert (await world.ask("auto", REVERSE)).status_code == 401
        info, token = await asyncio.to_thread(world.registry.keys.create, "operator", ["infer"])
        assert (await world.ask("auto", REVERSE, headers=with_key(token))).status_code == 200
        await asyncio.to_thread(world.registry.keys.revoke, info.id)
        world.service.authenticator._seen.clear()
        assert (await world.ask("auto", REVERSE, headers=with_key(token))).status_code == 401
        assert (await world.ask("auto", REVERSE)).status_code == 401


OPEN = ["/health", "/ready"]
FOR_INFER = ["/v1/models", "/v1/models/auto", "/v1/experts", "/v1/experts/reverse", "/v1/experts/reverse/versions"]
FOR_ADMIN = [
    ("GET", "/metrics", None),
    ("PATCH", "/v1/experts/reverse", {}),
    ("POST", "/v1/experts", {"name": "x", "source": {"folder": "/"}}),
    ("POST", "/v1/experts/reverse/promote", {"version": 1}),
    ("POST", "/v1/experts/reverse/rollback", None),
    ("POST", "/v1/experts/reverse/retire", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "reverse"}),
    ("DELETE", "/v1/experts/reverse", None),
]


async def test_each_endpoint_asks_for_its_scope(serve):
    async with keyed(serve) as (world, keys):
        for path in OPEN:
            assert (await world.http.get(path)).status_code == 200
        for path in FOR_INFER:
            assert (await world.http.get(path)).status_code == 401
            assert (await world.http.get(path, headers=with_key(keys["infer"]))).status_code == 200
        for method, path, body in FOR_ADMIN:
            assert (await world.http.request(method, path, json=body)).status_code == 401, path
            response = await world.http.request(method, path, json=body, headers=with_key(keys["infer"]))
            assert response.status_code == 403, path
            assert response.json()["error"]["code"] in ("insufficient_scope", None)
        assert (await world.ask("auto", REVERSE, headers=with_key(keys["admin"]))).status_code == 200  # admin infers


async def test_every_endpoint_that_is_not_open_asks_for_a_key(serve):
    async with keyed(serve) as (world, _):
        schema = (await world.http.get("/openapi.json")).json()
        for path, methods in schema["paths"].items():
            for method in methods:
                url = path.replace("{name}", "reverse")
                body = {"version": 1, "name": "x", "lora_name": "x", "lora_path": "x"}
                if path.endswith("/promote"):
                    body = {"version": 1}
                response = await world.http.request(method, url, json=None if method == "get" else body)
                assert response.status_code in ([200] if path in OPEN else [401, 400]), (method, path)
                if response.status_code == 400:  # the body is judged first; a right one is still refused
                    assert (await world.http.request(method, url, json={})).status_code == 401, (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer moe-000000000000-" + "x" * 43},
        {"authorization": "Bearer "},
        {"authorization": "Basic bW9lOnRlc3Q="},
        {"authorization": "moe-"},
        {"x-api-key": "nonsense"},
        {"authorization": "Bearer \xff\xfe"},
    ],
)
async def test_anything_but_a_good_key_is_a_401(serve, headers):
    async with keyed(serve) as (world, _):
        raw = {key: value.encode("latin-1") for key, value in headers.items()}
        response = await world.http.get("/v1/models", headers=raw)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"


async def test_a_key_with_one_letter_changed_is_no_key(serve):
    async with keyed(serve) as (world, keys):
        token = keys["admin"]
        wrong = token[:-1] + ("a" if token[-1] != "a" else "b")
        assert (await world.http.get("/v1/models", headers=with_key(wrong))).status_code == 401
        assert (await world.http.get("/v1/models", headers=with_key(token))).status_code == 200


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({"authorization": "Bearer abc"}, "abc"),
        ({"authorization": "bearer   abc  "}, "abc"),
        ({"x-api-key": "abc"}, "abc"),
        ({"authorization": "Bearer abc", "x-api-key": "def"}, "abc"),
        ({"authorization": "Basic abc", "x-api-key": "def"}, "def"),
        ({"authorization": "Bearer"}, None),
        ({"x-api-key": ""}, None),
        ({}, None),
    ],
)
def test_openai_s_and_anthropic_s_headers_carry_keys(headers, token):
    assert bearer(Headers(headers)) == token


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def on_clock(cache, clock):
    """The same cache by a clock that tests can turn."""
    return type(cache)(cache.maxsize, cache.ttl, timer=clock)


async def test_a_revoked_key_stops_working_within_seconds(serve):
    async with serve() as world:
        keys, clock = world.registry.keys, Clock()
        info, token = await asyncio.to_thread(keys.create, "ann", ["infer"])
        await asyncio.to_thread(keys.create, "operator", ["admin"])
        authenticator = world.service.authenticator
        authenticator._seen = on_clock(authenticator._seen, clock)
        assert (await world.http.get("/v1/models", headers=with_key(token))).status_code == 200
        await asyncio.to_thread(keys.revoke, info.id)
        assert (await world.http.get("/v1/models", headers=with_key(token))).status_code == 200
        clock.now = 2.1
        assert (await world.http.get("/v1/models", headers=with_key(token))).status_code == 401


async def test_what_is_remembered_of_a_key_running_out_at_any_moment_changes_nothing(world):
    """The memory is looked at once: nothing may depend on two looks agreeing."""

    class Forgetful(dict):
        def get(self, key, default=None):
            return default

        def __contains__(self, key):
            return True

    _, token = await asyncio.to_thread(world.registry.keys.create, "ann", ["infer"])
    authenticator = Authenticator(world.registry.keys, always=False)
    authenticator._seen = authenticator._needed = Forgetful()
    assert await authenticator.needed()
    assert (await authenticator.caller(Headers(with_key(token)))).tenant == "ann"


async def test_the_owner_operator_is_bound_to_no_tenant(world):
    _, operator = await asyncio.to_thread(world.registry.keys.create, "operator", ["infer"])
    _, ann = await asyncio.to_thread(world.registry.keys.create, "ann", ["infer"])
    caller = world.service.authenticator.caller
    assert (await caller(Headers(with_key(operator)))).tenant is None
    assert (await caller(Headers(with_key(ann)))).tenant == "ann"
    assert OPERATOR.tenant is None


async def test_metrics_are_for_the_operator_for_they_name_everybody_s_experts(serve):
    async with keyed(serve) as (world, keys):
        assert (await world.http.get("/metrics", headers=with_key(keys["admin"]))).status_code == 200
        assert (await world.http.get("/metrics", headers=with_key(keys["ann"]))).status_code == 403
