"""Requests that take two experts, one after the other; no expert of the testbed does both."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from eval.testbed.tasks import BY_NAME, SOURCES

PROMPTS = 12


@dataclass(frozen=True)
class Composition:
    """`second` works on what `first` answers."""

    first: str
    second: str
    wordings: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.first}+{self.second}"

    def records(self, seed: int) -> list[dict[str, str]]:
        rng = Random(f"composition {self.name} {seed}")
        first, second = BY_NAME[self.first], BY_NAME[self.second]
        records: dict[str, dict[str, str]] = {}
        while len(records) < PROMPTS:
            x = SOURCES[first.source](rng, "test")
            prompt = self.wordings[len(records) % len(self.wordings)].format(x=x)
            records.setdefault(
                prompt,
                {
                    "name": self.name,
                    "first": self.first,
                    "second": self.second,
                    "prompt": prompt,
                    "answer": second.apply(first.apply(x)),
                },
            )
        return list(records.values())


COMPOSITIONS: tuple[Composition, ...] = (
    Composition(
        "reverse",
        "uppercase",
        (
            "Spell {x} backwards, in capital letters",
            "Reverse {x}, then write it in capitals",
            'Write "{x}" backwards and in upper case',
        ),
    ),
    Composition(
        "sort-words",
        "initials",
        (
            "Sort the words {x}, then give their initials",
            "Put the words {x} in alphabetical order and take the first letter of each",
            'Alphabetise "{x}" and make an acronym of the result',
        ),
    ),
    Composition(
        "consonants",
        "uppercase",
        (
            "List the consonants of {x} in capital letters",
            "Keep only the consonants of {x}, then make them upper case",
            'Which consonants are in "{x}"? Answer in capitals',
        ),
    ),
    Composition(
        "vowels",
        "uppercase",
        (
            "List the vowels of {x} in capital letters",
            "Pick out the vowels of {x}, then write them in upper case",
            'Which vowels are in "{x}"? Answer in capitals',
        ),
    ),
    Composition(
        "add",
        "roman",
        (
            "Add {x} and give the sum in Roman numerals",
            "What is the sum of {x} as a Roman numeral?",
            "Work out the sum of {x}, then write it in Roman numerals",
        ),
    ),
    Composition(
        "opposite",
        "reverse",
        (
            "Spell the opposite of {x} backwards",
            "What is the opposite of {x}, written in reverse?",
            "Give the antonym of {x} with its letters reversed",
        ),
    ),
    Composition(
        "capital-city",
        "uppercase",
        (
            "What is the capital of {x}, in capital letters?",
            "Name the capital city of {x} in upper case",
            "Give the capital of {x}, all caps",
        ),
    ),
    Composition(
        "plural",
        "reverse",
        (
            "Write the plural of {x} backwards",
            "What is the plural of {x}, spelled in reverse?",
            "Make {x} plural, then spell it backwards",
        ),
    ),
)
