"""Prompts of token ids, as lm-evaluation-harness sends them, in words for the router."""

from __future__ import annotations

from typing import Any

from serving.internal import post
from serving.service import Service


async def in_words(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """The body with its prompt's token ids as text, as much of them as the router reads; any other body as it is.

    So is one whose ids the engine does not know; it will say so itself. Raises EngineUnavailable.
    """
    ids = token_ids(body.get("prompt"))
    if not ids:
        return body
    budget = service.settings.router.budget  # characters, and a token has about one or more
    asked = {"model": service.engine.base_model, "tokens": ids[:budget] + ids[budget:][-budget:]}
    response = await post(service.engine, "/detokenize", asked)
    return {**body, "prompt": response.json()["prompt"]} if response.status_code == 200 else body


def token_ids(prompt: Any) -> list[int]:
    """The ids of a prompt, or of several one after another; [] for a prompt in words, and for what is none."""
    if not isinstance(prompt, list):
        return []
    rows = prompt if all(isinstance(row, list) for row in prompt) else [prompt]
    ids = [token for row in rows for token in row]
    return ids if all(type(token) is int for token in ids) else []
