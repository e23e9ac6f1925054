"""Sends the testbed's prompts to a running Moerge server: does `auto` find the right expert and answer?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

from eval.testbed.check import Tests

Advance = Callable[[], None]

ROUTED_LIMIT = 0.95  # of the instruction-told prompts
EXACT_LIMIT = 0.90
_ANSWER_TOKENS = 32


class Share(BaseModel):
    """Over `prompts` prompts: the shares (0 to 1) sent to their own expert, and answered to the letter."""

    model_config = ConfigDict(frozen=True)

    prompts: int
    routed: float
    exact: float


class Report(BaseModel):
    model_config = ConfigDict(frozen=True)

    experts: dict[str, Share]
    told: dict[str, Share]  # the same, over the instruction-told and the input-told experts
    ood_to_base: float  # the share of out-of-domain prompts that no expert was given

    def failures(self) -> list[str]:
        share = self.told.get("instruction")
        if share is None:
            return []
        problems = []
        if share.routed < ROUTED_LIMIT:
            problems.append(
                f"{share.routed:.3f} of the instruction-told prompts reach their own expert, less than {ROUTED_LIMIT}"
            )
        if share.exact < EXACT_LIMIT:
            problems.append(f"{share.exact:.3f} of the instruction-told answers are right, less than {EXACT_LIMIT}")
        return problems


@dataclass(frozen=True)
class Reply:
    text: str
    model: str  # what the response says answered
    experts: tuple[tuple[str, float], ...]  # names and weights, heaviest first; empty when the base answered

    @property
    def expert(self) -> str | None:
        return self.experts[0][0] if self.experts else None


def parse_experts(header: str) -> tuple[tuple[str, float], ...]:
    """`reverse=0.7,vowels=0.3` as pairs, heaviest first; an empty header means the base model."""
    pairs = [part.strip().rpartition("=") for part in header.split(",") if "=" in part]
    return tuple(sorted(((name, float(weight)) for name, _, weight in pairs), key=lambda pair: -pair[1]))


async def ask(client: AsyncOpenAI, prompt: str) -> Reply:
    raw = await client.chat.completions.with_raw_response.create(
        model="auto",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=_ANSWER_TOKENS,
    )
    completion = raw.parse()
    return Reply(
        text=(completion.choices[0].message.content or "").strip(),
        model=completion.model,
        experts=parse_experts(raw.headers.get("x-moerge-experts", "")),
    )


async def measure(
    client: AsyncOpenAI,
    tests: Tests,
    told: Mapping[str, str],
    ood: Sequence[str],
    *,
    concurrency: int = 16,
    advance: Advance = lambda: None,
) -> Report:
    """Asks for every test prompt once. `told` says of each expert how it is told apart."""
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: str) -> Reply:
        async with gate:
            reply = await ask(client, prompt)
        advance()
        return reply

    rows = [(name, test) for name, records in tests.items() for test in records]
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(one(test["prompt"])) for _, test in rows]
        outside = [group.create_task(one(prompt)) for prompt in ood]
    marks: dict[str, list[tuple[bool, bool]]] = {name: [] for name in tests}
    for (name, test), task in zip(rows, asked, strict=True):
        reply = task.result()
        marks[name].append((reply.expert == name, reply.text == test["answer"]))
    groups = {kind: [m for name in tests if told[name] == kind for m in marks[name]] for kind in told.values()}
    return Report(
        experts={name: _share(found) for name, found in marks.items()},
        told={kind: _share(found) for kind, found in groups.items() if found},
        ood_to_base=sum(task.result().expert is None for task in outside) / max(1, len(outside)),
    )


def _share(marks: Sequence[tuple[bool, bool]]) -> Share:
    n = len(marks)
    return Share(
        prompts=n,
        routed=sum(routed for routed, _ in marks) / n,
        exact=sum(exact for _, exact in marks) / n,
    )
