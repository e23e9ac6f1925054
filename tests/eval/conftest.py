"""Shared by the tests that ask three experts of the testbed."""

from __future__ import annotations

from eval.arena import Prompt

NAMES = ("roman", "uppercase", "vowels")  # of different ranks and modules
#: One for each, and one that takes two of them.
PROMPTS = [
    Prompt("Write 14 in Roman numerals", "XIV", ("roman",)),
    Prompt("Write otter in capital letters", "OTTER", ("uppercase",)),
    Prompt("Which vowels are in tiger?", "ie", ("vowels",)),
    Prompt("Which vowels are in tiger? Then in capital letters.", "IE", ("vowels", "uppercase")),
]
SAMPLES = [("roman", "Roman for 9?"), ("uppercase", "Shout heron"), ("vowels", "Vowels of zebra")]
