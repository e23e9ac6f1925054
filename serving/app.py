"""The HTTP application: Moerge's endpoints, and the engine's behind the router."""

from __future__ import annotations

from importlib import metadata

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from serving.endpoints import blends, checks, experts, feedback, gates, groups, lora, models, operations, routes, traces
from serving.errors import TABLE, ApiError, BadRequest, error_response, handle
from serving.gate import Gate
from serving.inference import PATHS, TOKEN_PATHS, Inference
from serving.service import Service


def create_app(service: Service) -> FastAPI:
    """The ASGI application around a service; starting and stopping the service is the caller's."""
    app = FastAPI(
        title="Moerge",
        version=metadata.version("moerge"),
        description="MoErging inference router: an OpenAI-compatible API in front of many LoRA experts.",
    )
    app.state.service = service
    for module in (models, experts, checks, blends, routes, feedback, traces, gates, groups, lora, operations):
        app.include_router(module.endpoints)
    inference = Inference(service)
    for path in (*PATHS, *TOKEN_PATHS):
        app.router.routes.append(Route(path, endpoint=inference, methods=["POST"]))

    kinds: list[type[Exception]] = [ApiError, *(row[0] for row in TABLE)]
    for kind in kinds:
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, handle)
    app.add_middleware(Gate, settings=service.settings.server)
    return app


async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """FastAPI's 422, as OpenAI's 400."""
    return error_response(BadRequest("; ".join(experts.problem(each) for each in error.errors())))


async def http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Unknown paths and methods, bodies that cannot be read."""
    if error.status_code in (404, 405):
        error = HTTPException(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}.", headers=error.headers
        )
    return error_response(error)
