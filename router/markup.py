"""Turns of a conversation in a prompt that a chat template has already been applied to.

Such prompts come to completions: from lm-evaluation-harness, and from clients with templates of their own. What a
template puts around the words would drown them: with markup left in, 30 of 136 prompts of the quickstart found their
expert, without it all of them.
"""

from __future__ import annotations

import re

#: Where a turn begins: ChatML, Llama 3 and 4, gpt-oss, Granite; Gemma; Phi, Zephyr, Command R, DeepSeek (its bars are
#: U+FF5C); Llama 2, Mistral.
_BEGIN = re.compile(
    r"""<\|(?:im_start|start_header_id|header_start|start_of_role|start)\|>(?P<header>\w+)
        (?:<\|(?:end_header_id|header_end|end_of_role|message)\|>)?
      | <start_of_turn>(?P<gemma>\w+)
      | <[|\uff5c](?P<name>system|developer|user|assistant|chatbot)(?:_token)?[|\uff5c]>
      | (?P<marked>\[/?INST\]|<</?SYS>>)""",
    re.VERBOSE | re.IGNORECASE,
)
_MARKED = {"[INST]": "user", "[/INST]": "assistant", "<<SYS>>": "system", "<</SYS>>": "user"}
#: What else templates put in: beginnings and ends of texts and turns.
_SPECIAL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|</?s>|<(?:bos|eos|pad|end_of_turn|BOS_TOKEN)>")


def turns_of(prompt: str) -> list[dict[str, str]]:
    """Messages, `role` and `content`; [] for a prompt without such markup. What stands before it is the system's."""
    found = list(_BEGIN.finditer(prompt))
    if not found:
        return []
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(prompt)]
    roles = ["system", *(_role(match) for match in found)]
    contents = [_SPECIAL.sub("", prompt[start:end]).strip() for start, end in zip(starts, ends, strict=True)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True) if content]


def _role(match: re.Match[str]) -> str:
    word = next(group for group in match.groups() if group)
    return _MARKED.get(word.upper(), word.lower())
