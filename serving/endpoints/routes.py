"""`POST /v1/route`: what the router would do with a request, without generating."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body
from pydantic import BaseModel

from router.decision import Decision
from router.text import routing_text
from serving.endpoints.common import InferCaller, ServiceDep
from serving.errors import BadRequest, ModelNotFound
from serving.inference import AUTO, decide, requested_model

endpoints = APIRouter(tags=["routing"])


class Explanation(BaseModel):
    """A decision with every candidate's score, and the text it was made from."""

    object: Literal["route"] = "route"
    model: str
    text: str
    decision: Decision


@endpoints.post("/v1/route")
async def explain_route(
    body: Annotated[
        dict[str, Any],
        Body(examples=[{"model": "auto", "messages": [{"role": "user", "content": "Spell banana backwards"}]}]),
    ],
    service: ServiceDep,
    caller: InferCaller,
) -> Explanation:
    """Takes the body of any inference request (`messages`, `prompt` or `input`)."""
    model = requested_model(body)
    if not any(key in body for key in ("messages", "prompt", "input")):
        raise BadRequest("Nothing to route: send 'messages', 'prompt' or 'input', as for an inference request.")
    if model != AUTO and not model.startswith(f"{AUTO}:"):
        raise (
            ModelNotFound(model)
            if not service.knows(model, caller.tenant)
            else BadRequest(
                f"'{model}' is not routed: it answers itself. Ask for 'auto' or 'auto:<method>'.",
                param="model",
            )
        )
    decision = await decide(service, model, body, caller, limit=None)
    return Explanation(model=model, text=routing_text(body, service.settings.router.budget), decision=decision)
