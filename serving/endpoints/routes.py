"""`POST /v1/route`: what the router would do with a request, without generating."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body
from pydantic import BaseModel

from router.decision import Decision
from serving.auth import Caller
from serving.deciding import decide, is_routed, read_text, requested_model, turn_of
from serving.endpoints.common import InferCaller, ServiceDep
from serving.errors import BadRequest, ModelNotFound
from serving.extension import take_extension
from serving.inference import arguments
from serving.internal import one_token, post
from serving.probing import probe
from serving.service import Service
from serving.tokens import in_words
from serving.traces import Trace, trace_of

endpoints = APIRouter(tags=["routing"])


class Explanation(BaseModel):
    """A decision with every candidate's score, the text it was made from, and how the gates weighed its tokens."""

    object: Literal["route"] = "route"
    model: str
    text: str
    decision: Decision
    trace: Trace | None = None


#: Where a body of this kind would be sent.
KINDS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/responses"}


@endpoints.post("/v1/route")
async def explain_route(
    body: Annotated[
        dict[str, Any],
        Body(examples=[{"model": "auto", "messages": [{"role": "user", "content": "Spell banana backwards"}]}]),
    ],
    service: ServiceDep,
    caller: InferCaller,
) -> Explanation:
    """Takes the body of any inference request (`messages`, `prompt` or `input`).

    With `"trace": true` the prompt is read once, to see which experts a gate uses for it.
    """
    model = requested_model(body)
    wanted = body.get("trace", False)
    if not isinstance(wanted, bool):
        raise BadRequest(f"'trace' is true or false; got {wanted!r:.80}.", param="trace")
    body, extension = take_extension({key: value for key, value in body.items() if key != "trace"})
    path = next((path for key, path in KINDS.items() if key in body), None)
    if path is None:
        raise BadRequest("Nothing to route: send 'messages', 'prompt' or 'input', as for an inference request.")
    if not is_routed(model):
        raise (
            ModelNotFound(model)
            if not service.knows(model, caller.tenant)
            else BadRequest(
                f"'{model}' is not routed: it answers itself. Ask for 'auto' or 'auto:<method>'.",
                param="model",
            )
        )
    words = await in_words(service, body)
    turn = await turn_of(service, model, words, caller, extension)
    decision = await decide(service, model, words, caller, extension=extension, limit=None, turn=turn)
    trace = None
    if wanted or extension.trace:
        decision = service.groups.within(decision)
        decision, trace = await traced(service, path, body, decision, model, caller)
    return Explanation(model=model, text=read_text(service, words), decision=decision, trace=trace)


async def traced(
    service: Service, path: str, body: dict[str, Any], decision: Decision, model: str, caller: Caller
) -> tuple[Decision, Trace | None]:
    """The decision as it is made with the prompt read, and the trace of that; None where no gate weighs anything.

    Raises as `service.hold` does, and BadRequest when the engine does not take the prompt.
    """
    if decision.verdict is not None:
        decision = await probe(service, path, body, decision, trace=True, tenant=caller.tenant)
    if decision.kind == "gate":
        async with service.hold(decision) as name:
            response = await post(service.engine, path, one_token(path, body, name, arguments(decision, decision.id)))
            found = await service.engine.trace(decision.id)
        if response.status_code != 200:
            raise BadRequest(f"The engine does not take this prompt: {response.text:.300}")
        if found is not None:
            service.traces.put(caller.tenant, trace_of(model, decision, decision, found))
    return decision, service.traces.get(decision.id, caller.tenant)
