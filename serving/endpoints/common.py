"""What every endpoint needs: the service and the caller."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from serving.auth import Caller
from serving.service import Service


def service_of(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def any_caller(request: Request) -> Caller:
    """Somebody who may ask for answers."""
    caller = await service_of(request).authenticator.caller(request.headers)
    caller.require("infer")
    return caller


async def admin_caller(request: Request) -> Caller:
    """Somebody who may change the registry."""
    caller = await service_of(request).authenticator.caller(request.headers)
    caller.require("admin")
    return caller


ServiceDep = Annotated[Service, Depends(service_of)]
InferCaller = Annotated[Caller, Depends(any_caller)]
AdminCaller = Annotated[Caller, Depends(admin_caller)]
