"""The routing text of a request: its instruction and the last thing the user said, within a budget.

Pure functions of the request's JSON. Whatever is not text (images, audio, tool calls, token ids, junk)
is passed over; a request without any text gives "".
"""

from __future__ import annotations

import re
from typing import Any

from router.markup import turns_of

# all-MiniLM-L6-v2 reads 256 word pieces, about 1,000 characters of English.
BUDGET = 1000
JOINT = "\n\n"
GAP = "\n...\n"
INSTRUCTION_ROLES = ("system", "developer")

# What chat clients send by default. It says nothing about the task, and drowns short prompts: on the
# quickstart testbed it costs 5 points of routing accuracy (docs/experiments.md).
_GENERIC = re.compile(
    r"you(?: are|'re) (?:an? )?(?:(?:very|helpful|friendly|polite|honest|harmless|useful|knowledgeable|smart"
    r"|intelligent|large|and|ai|language|virtual|digital),? )*(?:assistant|ai|chatbot|model)\s*[.!]?",
    re.IGNORECASE,
)


def routing_text(request: Any, budget: int = BUDGET) -> str:
    """Instruction + last user turn of a request, in at most `budget` characters.

    `request` is the JSON body of chat completions or Anthropic messages (`messages`, `system`),
    responses (`input`, `instructions`) or completions (`prompt`); a bare list of messages or a bare
    prompt will do. Several prompts of one completions request are read as one text; an instruction like
    "You are a helpful assistant." is left out. Where a chat template has been applied to a prompt, its turns are read.
    """
    body = request if isinstance(request, dict) else {"messages": request}
    turns = next((body[key] for key in ("messages", "input", "prompt") if body.get(key)), "")
    if isinstance(turns, str):
        turns = turns_of(turns) or turns
    messages = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []

    told = [body.get("system"), body.get("instructions")]
    told += [message.get("content") for message in messages if message.get("role") in INSTRUCTION_ROLES]
    said = [message.get("content") for message in messages if message.get("role") == "user"]
    if not messages:
        said = ["\n".join(turn for turn in turns if isinstance(turn, str)) if isinstance(turns, list) else turns]

    instruction = JOINT.join(text for text in map(content_text, told) if text and not _GENERIC.fullmatch(text))
    prompt = next((text for text in map(content_text, reversed(said)) if text), "")
    return combine(instruction, prompt, budget)


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or the text parts of a list of parts."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, list):
        return ""
    texts = (part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | dict))
    return "\n".join(text for text in texts if isinstance(text, str)).strip()


def combine(instruction: str, prompt: str, budget: int = BUDGET) -> str:
    """Both, a blank line between them; each is cut only for what the other needs, up to half the budget."""
    if not instruction or not prompt:
        return shorten(instruction or prompt, budget)
    room = max(budget - len(JOINT), 0)
    half = room // 2
    for_instruction = min(len(instruction), max(half, room - len(prompt)))
    both = shorten(instruction, for_instruction) + JOINT + shorten(prompt, room - for_instruction)
    return both[: max(budget, 0)]


def shorten(text: str, budget: int) -> str:
    """At most `budget` characters: head and tail are kept, since instructions stand at either end."""
    if len(text) <= budget:
        return text
    room = budget - len(GAP)
    if room < 2:
        return text[: max(budget, 0)]
    tail = room // 2
    return text[: room - tail] + GAP + text[-tail:]
