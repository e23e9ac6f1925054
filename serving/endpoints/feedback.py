"""`POST /v1/feedback`: how good an answer was."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from adapters_registry.expert import Text
from serving.endpoints.common import InferCaller, ServiceDep
from serving.errors import BadRequest

endpoints = APIRouter(prefix="/v1/feedback", tags=["routing"])


class Judgement(BaseModel):
    model_config = ConfigDict(extra="forbid")

    decision_id: Text = Field(max_length=100, description="From the response's header x-moerge-decision-id.")
    score: float = Field(
        ge=0, le=1, allow_inf_nan=False, strict=True, description="From 0 (bad) to 1 (good); 0.5 is neither."
    )
    comment: Text | None = Field(None, max_length=2000, description="For whoever reads it; nothing is learned from it.")


class FeedbackGiven(BaseModel):
    object: Literal["feedback"] = "feedback"
    decision_id: str
    score: float
    comment: str | None
    experts: list[str]
    rated_at: datetime


@endpoints.post("")
async def give_feedback(body: Judgement, service: ServiceDep, caller: InferCaller) -> FeedbackGiven:
    """Say how good the answer to a routed request was. Said again, the last word counts.

    `moerge router train` learns from it. Only for decisions of the caller's own requests.
    """
    if not service.settings.feedback.keep:
        raise BadRequest("This server keeps no decisions, so they cannot be judged (feedback.keep is 0).")
    rated = await service.feedback.rate(body.decision_id, body.score, body.comment, caller.tenant)
    assert rated.score is not None
    assert rated.rated_at is not None
    return FeedbackGiven(
        decision_id=rated.id,
        score=rated.score,
        comment=rated.comment,
        experts=[each["expert"] for each in rated.experts],
        rated_at=rated.rated_at,
    )
