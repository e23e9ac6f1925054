"""Failures as OpenAI-style JSON. Domain code raises its own exceptions; this table alone knows HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

import adapters_registry.errors as registry_errors
import router.errors as router_errors
from router.blending import BlendError
from router.composite import CompositeError
from serving.engine import AdapterLoadFailed, EngineUnavailable


class ApiError(Exception):
    """A request that cannot be served, with what the client should be told."""

    status = 400
    kind = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, reasons: Sequence[tuple[str, str]] = ()) -> None:
        """`reasons` are (code, message) of each, where there are several."""
        super().__init__(message)
        self.param = param
        self.reasons = reasons


class BadRequest(ApiError):
    """The body is not what the endpoint takes."""


class ModelNotFound(ApiError):
    """OpenAI's answer for a `model` that is not served."""

    status, code = 404, "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model '{model:.200}' does not exist or you do not have access to it. "
            "GET /v1/models lists what there is.",
            param="model",
        )


class TraceNotFound(ApiError):
    status, code = 404, "trace_not_found"

    def __init__(self, decision: str) -> None:
        super().__init__(
            f"There is no trace of decision '{decision:.80}': it was not asked for ('moerge': {{'trace': true}}), "
            "no gate decided, or newer traces have taken its place."
        )


class Unauthorized(ApiError):
    status, kind, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ApiError):
    status, kind, code = 403, "permission_error", "insufficient_scope"


#: exception type -> (status, type, code); the first matching row counts.
TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (registry_errors.VersionNotFound, 404, "invalid_request_error", "version_not_found"),
    (registry_errors.ExpertNotFound, 404, "invalid_request_error", "expert_not_found"),
    (registry_errors.DecisionNotFound, 404, "invalid_request_error", "decision_not_found"),
    (registry_errors.BlendNotFound, 404, "invalid_request_error", "blend_not_found"),
    (registry_errors.BlendRefused, 422, "invalid_request_error", "blend_refused"),
    (registry_errors.BlendUnusable, 409, "invalid_request_error", "blend_unusable"),
    (registry_errors.ExpertRefused, 422, "invalid_request_error", "expert_refused"),
    (registry_errors.SourceNotFound, 422, "invalid_request_error", "source_not_found"),
    (registry_errors.SourceGated, 422, "invalid_request_error", "source_gated"),
    (registry_errors.SourceUnavailable, 502, "server_error", "source_unavailable"),
    (registry_errors.StoreFull, 507, "server_error", "store_full"),
    (registry_errors.NotOwner, 403, "permission_error", "not_owner"),
    (registry_errors.RegistryUnusable, 503, "server_error", "registry_unavailable"),
    (registry_errors.RegistryError, 409, "invalid_request_error", "registry_conflict"),
    (CompositeError, 422, "invalid_request_error", "composite_refused"),
    (BlendError, 422, "invalid_request_error", "blend_refused"),
    (router_errors.UnknownMethod, 404, "invalid_request_error", "model_not_found"),
    (router_errors.RouterError, 503, "server_error", "router_unavailable"),
    (AdapterLoadFailed, 503, "server_error", "expert_load_failed"),
    (EngineUnavailable, 503, "server_error", "engine_unavailable"),
)


def error_response(error: Exception) -> JSONResponse:
    """The JSON that OpenAI clients understand: `{"error": {message, type, param, code}}`."""
    headers: dict[str, str] = {}
    if isinstance(error, ApiError):
        status, kind, code, param = error.status, error.kind, error.code, error.param
        message = str(error)
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
    elif isinstance(error, HTTPException):
        status, kind, param, message = error.status_code, "invalid_request_error", None, error.detail
        code = "request_too_large" if status == 413 else None
        headers.update(error.headers or {})
    else:
        param = None
        row = next((row for row in TABLE if isinstance(error, row[0])), None)
        _, status, kind, code = row if row else (Exception, 500, "server_error", "internal_error")
        message = str(error) if row else "The server failed to handle this request; its log has the details."
    if status == 503:
        headers["retry-after"] = "5"
    body: dict[str, Any] = {"message": printable(message), "type": kind, "param": param, "code": code}
    if isinstance(error, registry_errors.ExpertRefused | registry_errors.BlendRefused):
        reasons = [(reason.code, reason.message) for reason in error.reasons]
    else:
        reasons = list(error.reasons) if isinstance(error, ApiError) else []
    if reasons:
        body["reasons"] = [{"code": code, "message": printable(message)} for code, message in reasons]
    return JSONResponse({"error": body}, status_code=status, headers=headers)


def printable(text: str) -> str:
    """Messages quote what clients send; half of a surrogate pair cannot be sent back."""
    return text.encode(errors="replace").decode()


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler for everything in the table."""
    return error_response(error)
