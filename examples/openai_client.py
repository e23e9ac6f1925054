"""Ask a running server through OpenAI's own client: routed, streamed, and by an expert's name.

    moerge serve ...                    # or: make serve
    python examples/openai_client.py "Spell banana backwards"

`MOERGE_URL` and `MOERGE_API_KEY` say where the server is, and who asks.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

# ruff: noqa: T201 (it prints)


def main(client: OpenAI, question: str) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]

    # `auto` lets the router choose. The response's `model` names the expert that answered, or the base model.
    reply = client.chat.completions.create(model="auto", messages=messages)
    print(f"{reply.model}: {reply.choices[0].message.content}")

    # The same, streamed; the headers carry the whole decision.
    raw: Any = client.chat.completions.with_raw_response.create(model="auto", messages=messages, stream=True)
    for chunk in raw.parse():
        print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
    print()
    for name in ("decision-id", "method", "experts", "confidence", "route-ms"):
        print(f"  x-moerge-{name}: {raw.headers.get(f'x-moerge-{name}')}")

    # Every name that `model` may take; experts have the base model as their parent.
    print("models:", ", ".join(model.id for model in client.models.list()))


if __name__ == "__main__":
    url = os.environ.get("MOERGE_URL", "http://127.0.0.1:8000")
    key = os.environ.get("MOERGE_API_KEY", "none")
    main(OpenAI(base_url=f"{url}/v1", api_key=key), " ".join(sys.argv[1:]) or "Spell banana backwards")
