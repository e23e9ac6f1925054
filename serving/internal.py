"""What the server itself asks the engine: behaviour checks, probes, calibration, traced routes."""

from __future__ import annotations

from typing import Any

import httpx

from serving.engine import Engine

#: What makes a request one token long, by path; and fields that would change what is generated, not what is read.
ONE_TOKEN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"max_tokens": 1},
    "/v1/completions": {"max_tokens": 1},
    "/v1/responses": {"max_output_tokens": 1, "store": False},
    "/v1/messages": {"max_tokens": 1},
}
GENERATION = frozenset(
    """background best_of echo functions function_call guided_choice guided_decoding_backend guided_grammar guided_json
    guided_regex logit_bias logprobs max_completion_tokens max_tokens max_output_tokens max_tool_calls min_tokens
    modalities n parallel_tool_calls prompt_logprobs response_format stop stop_sequences stop_token_ids store
    stream stream_options structured_outputs suffix text tool_choice top_logprobs use_beam_search""".split()  # noqa: SIM905
)


async def post(engine: Engine, path: str, body: dict[str, Any]) -> httpx.Response:
    """The engine's answer. An exception inside it is a 500. Raises EngineUnavailable when there is no engine."""
    transport = httpx.ASGITransport(app=engine.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client:  # noqa: S113
        return await client.post(path, json=body)


def one_token(path: str, body: dict[str, Any], model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same prompt, to be read by `model`, which answers with one token; `arguments` are for the engine."""
    kept = {key: value for key, value in body.items() if key not in GENERATION}
    if kept.get("tools") and path == "/v1/chat/completions":
        kept["tool_choice"] = "none"  # they stay in the prompt
    given = kept.get("vllm_xargs")
    arguments = {**(given if isinstance(given, dict) else {}), **arguments}
    return {**kept, **ONE_TOKEN[path], "model": model, "vllm_xargs": arguments, "temperature": 0}
