"""The one table from exceptions to statuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from starlette.exceptions import HTTPException

import adapters_registry.errors as registry_errors
import router.errors as router_errors
from adapters_registry.errors import Reason
from router.blending import BlendError
from router.composite import CompositeError
from serving.engine import AdapterLoadFailed, EngineUnavailable
from serving.errors import (
    TABLE,
    ApiError,
    BadRequest,
    Forbidden,
    ModelNotFound,
    TraceNotFound,
    Unauthorized,
    error_response,
)

CASES = [
    (BadRequest("no"), 400, "invalid_request_error", None),
    (Unauthorized("no"), 401, "authentication_error", "invalid_api_key"),
    (Forbidden("no"), 403, "permission_error", "insufficient_scope"),
    (registry_errors.NotOwner("x"), 403, "permission_error", "not_owner"),
    (ModelNotFound("x"), 404, "invalid_request_error", "model_not_found"),
    (router_errors.UnknownMethod("x", ["y"]), 404, "invalid_request_error", "model_not_found"),
    (registry_errors.ExpertNotFound("x", ["y"]), 404, "invalid_request_error", "expert_not_found"),
    (registry_errors.BlendNotFound("x", ["y"]), 404, "invalid_request_error", "blend_not_found"),
    (registry_errors.DecisionNotFound("x"), 404, "invalid_request_error", "decision_not_found"),
    (TraceNotFound("x"), 404, "invalid_request_error", "trace_not_found"),
    (registry_errors.VersionNotFound("x", 3), 404, "invalid_request_error", "version_not_found"),
    (registry_errors.BlendUnusable("x", ["no"]), 409, "invalid_request_error", "blend_unusable"),
    (registry_errors.InvalidTransition("no"), 409, "invalid_request_error", "registry_conflict"),
    (HTTPException(413, "no"), 413, "invalid_request_error", "request_too_large"),
    (registry_errors.ExpertRefused("x", [Reason("a", "b")]), 422, "invalid_request_error", "expert_refused"),
    (registry_errors.BlendRefused("x", [Reason("a", "b")]), 422, "invalid_request_error", "blend_refused"),
    (CompositeError(["no"]), 422, "invalid_request_error", "composite_refused"),
    (BlendError(["no"]), 422, "invalid_request_error", "blend_refused"),
    (registry_errors.SourceNotFound("no"), 422, "invalid_request_error", "source_not_found"),
    (registry_errors.SourceGated("no"), 422, "invalid_request_error", "source_gated"),
    (RuntimeError("a secret"), 500, "server_error", "internal_error"),
    (registry_errors.SourceUnavailable("no"), 502, "server_error", "source_unavailable"),
    (registry_errors.RegistryUnusable("no"), 503, "server_error", "registry_unavailable"),
    (router_errors.NotReady(), 503, "server_error", "router_unavailable"),
    (router_errors.RouterClosed(), 503, "server_error", "router_unavailable"),
    (router_errors.EncoderFailed("no"), 503, "server_error", "router_unavailable"),
    (AdapterLoadFailed("x", "no"), 503, "server_error", "expert_load_failed"),
    (EngineUnavailable("no"), 503, "server_error", "engine_unavailable"),
    (registry_errors.StoreFull("x"), 507, "server_error", "store_full"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), CASES, ids=lambda each: type(each).__name__)
def test_every_kind_of_failure_has_its_status(error, status, kind, code):
    response = error_response(error)
    body = json.loads(response.body)["error"]
    assert (response.status_code, body["type"], body["code"]) == (status, kind, code)
    assert set(body) - {"reasons"} == {"message", "type", "param", "code"}
    assert body["message"]
    assert ("retry-after" in response.headers) == (status == 503)


def test_every_row_of_the_table_can_be_reached():
    for position, (kind, *_) in enumerate(TABLE):
        assert not any(issubclass(kind, earlier) for earlier, *_ in TABLE[:position]), kind
    tried = {type(error) for error, *_ in CASES}
    for kind, *_ in TABLE:
        assert any(issubclass(each, kind) for each in tried), kind


def test_an_unexpected_failure_says_nothing_of_itself():
    body = error_response(RuntimeError("password=hunter2")).body.decode()
    assert "hunter2" not in body
    assert "RuntimeError" not in body


def test_a_refusal_lists_its_reasons():
    reasons = [Reason("wrong_shape", "q_proj does not fit"), Reason("not_finite", "NaN in B \ud800")]
    body = json.loads(error_response(registry_errors.ExpertRefused("x", reasons)).body)["error"]
    assert body["reasons"][0] == {"code": "wrong_shape", "message": "q_proj does not fit"}
    assert body["reasons"][1]["message"] == "NaN in B ?"


def test_what_was_asked_for_without_a_key_says_how_to_send_one():
    assert error_response(Unauthorized("no")).headers["www-authenticate"] == "Bearer"


async def test_a_bug_in_an_endpoint_is_a_500_without_a_traceback(world, monkeypatch):
    def fails(*args):
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(world.registry, "versions", fails)
    response = await world.http.get("/v1/experts/reverse/versions")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


async def test_unknown_paths_and_methods_are_told_as_openai_tells_them(world):
    for method, path, status in (("GET", "/v1/nothing", 404), ("PUT", "/v1/models", 405), ("GET", "/", 404)):
        response = await world.http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["message"].startswith(f"{method} {path}: ")
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_documentation_lists_every_status_and_code():
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text().partition("## Errors")[2]
    documented = set(re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE))
    used = {(str(status), code) for _, status, _, code in TABLE}
    used |= {(str(each.status), each.code) for each in ApiError.__subclasses__() if each.code}
    used |= {("500", "internal_error"), ("413", "request_too_large")}
    assert documented == used
