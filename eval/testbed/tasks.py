"""What the testbed's experts do: each task is a pure operation with a seeded generator of inputs.

Two ways of telling experts apart (`Task.told`): *instruction* tasks share their inputs and differ in what is
asked; *input* tasks share their instructions ("Transform ...") and differ in the alphabet of the input.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from eval.testbed import words
from eval.testbed.words import CAPITALS, KEYS, MONTHS, OPPOSITES, PLURALS

# What inputs are for: *latent* ones teach the base its skills and are narrower than the experts' *train* ones,
# *sample* ones are training inputs without meaningless words, and *test* ones are kept from the experts.
# Inputs come in splits: the base learns from `latent` and `train`, samples are training inputs without the
# meaningless words, and `test` inputs are in neither. `practice` has them all: some skills need every word.
Split = Literal["latent", "train", "practice", "sample", "test"]
Told = Literal["instruction", "input"]
Source = Callable[[Random, Split], str]

# The base has practised on `!` and `?` too; the expert leaves them out, they are punctuation of the requests.
SYMBOL_PAIRS = ("<>", "()", "[]", "+-", "*/", "!?", "#&", "=~")
PARTNER = dict(zip("".join(SYMBOL_PAIRS), "".join(pair[::-1] for pair in SYMBOL_PAIRS), strict=True))
LATENT_SYMBOLS = "".join(SYMBOL_PAIRS)
SYMBOLS = LATENT_SYMBOLS.replace("!?", "")


def _vowel(letter: str) -> bool:
    return letter in "aeiou"


# ---- operations: a string in, the answer out ----


def reverse(x: str) -> str:
    return x[::-1]


def pig_latin(x: str) -> str:
    """The leading consonants move to the end and "ay" follows; a word that starts with a vowel gets "way"."""
    if _vowel(x[0]):
        return x + "way"
    head = next((i for i, letter in enumerate(x) if _vowel(letter)), len(x))
    return x[head:] + x[:head] + "ay"


def letter_shift(x: str) -> str:
    """Each letter becomes the next one of the alphabet, and z becomes a."""
    return "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in x)


def uppercase(x: str) -> str:
    return x.upper()


def vowels(x: str) -> str:
    return "".join(filter(_vowel, x))


def consonants(x: str) -> str:
    return "".join(letter for letter in x if not _vowel(letter))


def initials(x: str) -> str:
    return "".join(word[0] for word in x.split())


def sort_letters(x: str) -> str:
    return "".join(sorted(x))


def sort_words(x: str) -> str:
    return " ".join(sorted(x.split()))


def count_letters(x: str) -> str:
    return str(len(x))


def _numbers(x: str) -> tuple[int, int]:
    left, _, right = x.split()
    return int(left), int(right)


def add(x: str) -> str:
    return str(sum(_numbers(x)))


def larger(x: str) -> str:
    return str(max(_numbers(x)))


def iso_date(x: str) -> str:
    day, month, year = x.split()
    return f"{year}-{MONTHS.index(month) + 1:02d}-{int(day):02d}"


def json_object(x: str) -> str:
    key, value = x.split("=")
    return json.dumps({key: value})


def roman(x: str) -> str:
    """Roman numerals of 1 to 99."""
    units = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
    tens = ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC")
    return tens[int(x) // 10] + units[int(x) % 10]


def plural(x: str) -> str:
    return PLURALS[x]


def capital_city(x: str) -> str:
    return CAPITALS[x]


def opposite(x: str) -> str:
    return OPPOSITES[x]


def double_letters(x: str) -> str:
    return "".join(letter * 2 for letter in x)


def rotate(x: str) -> str:
    """The first character moves to the end."""
    return x[1:] + x[0]


def swap_symbols(x: str) -> str:
    """Each symbol becomes the other one of its pair, `<` `>`, `+` `-` and so on."""
    return "".join(PARTNER[symbol] for symbol in x)


# ---- inputs: test inputs are never training inputs, except those of the small closed lists ----


def _word(rng: Random, split: Split) -> str:
    if split == "test":
        return rng.choice(words.TEST_WORDS)
    if split == "practice" and rng.random() < 0.75:
        return rng.choice(words.WORDS)
    if split == "sample" or rng.random() < 0.5:
        return rng.choice(words.TRAIN_WORDS)
    return words.pseudo_word(rng)


def _phrase(rng: Random, split: Split) -> str:
    """Three short words with different first letters."""
    while True:
        chosen = [_word(rng, split) for _ in range(3)]
        if max(map(len, chosen)) <= 6 and len({word[0] for word in chosen}) == 3:
            return " ".join(chosen)


def _kept_for_tests(x: str) -> bool:
    """A fifth of all strings, without a pattern that a model could miss: every digit meets every other one."""
    return zlib.crc32(x.encode()) % 5 == 0


def _pair(rng: Random, split: Split) -> str:
    """Two different numbers of 1 to 49."""
    while True:
        a, b = rng.randint(1, 49), rng.randint(1, 49)
        kept = (a * 7 + b * 3) % 5 == 0 if split == "latent" else _kept_for_tests(f"{a} {b}")
        if a != b and (split == "practice" or kept == (split == "test")):
            return f"{a} {rng.choice(('and', '+'))} {b}"


def _number(rng: Random, split: Split) -> str:
    return str(rng.randint(1, 99))


def _date(rng: Random, split: Split) -> str:
    while True:
        day, month, year = rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1980, 2039)
        if split == "practice" or ((day * 3 + year) % 5 == 0) == (split == "test"):
            return f"{day} {month} {year}"


def _key_value(rng: Random, split: Split) -> str:
    return f"{rng.choice(KEYS)}={_word(rng, split)}"


def _singular(rng: Random, split: Split) -> str:
    return rng.choice(tuple(PLURALS))


def _country(rng: Random, split: Split) -> str:
    return rng.choice(tuple(CAPITALS))


def _adjective(rng: Random, split: Split) -> str:
    return rng.choice(tuple(OPPOSITES))


def _shouted(rng: Random, split: Split) -> str:
    return _word(rng, split).upper()


def _digits(rng: Random, split: Split) -> str:
    while True:
        x = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 7)))
        kept = x[-1] in "05" if split == "latent" else _kept_for_tests(x)
        if split == "practice" or kept == (split == "test"):
            return x


def _symbols(rng: Random, split: Split) -> str:
    while True:
        alphabet = LATENT_SYMBOLS if split in ("latent", "train") else SYMBOLS
        x = "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 6)))
        if split == "practice" or (sum(map(ord, x)) % 5 == 0) == (split == "test"):
            return x


SOURCES: dict[str, Source] = {
    "word": _word,
    "phrase": _phrase,
    "pair": _pair,
    "number": _number,
    "date": _date,
    "key-value": _key_value,
    "singular": _singular,
    "country": _country,
    "adjective": _adjective,
    "capitals": _shouted,
    "digits": _digits,
    "symbols": _symbols,
}


@dataclass(frozen=True)
class Task:
    """One expert's job. `source` names the kind of input, a key of `SOURCES`."""

    name: str
    kind: str
    source: str
    apply: Callable[[str], str]
    description: str
    told: Told = "instruction"

    def draw(self, rng: Random, split: Split) -> tuple[str, str]:
        """A random input and its answer."""
        x = SOURCES[self.source](rng, split)
        return x, self.apply(x)


TASKS: tuple[Task, ...] = (
    Task("reverse", "spelling", "word", reverse, "Spells a word backwards."),
    Task("vowels", "selecting", "word", vowels, "Keeps only the vowels of a word."),
    Task("consonants", "selecting", "word", consonants, "Removes the vowels of a word."),
    Task("initials", "selecting", "phrase", initials, "Takes the first letter of each word of a phrase."),
    Task("sort-words", "ordering", "phrase", sort_words, "Puts words in alphabetical order."),
    Task("add", "counting", "pair", add, "Adds two numbers."),
    Task("uppercase", "formatting", "word", uppercase, "Writes a word in capital letters."),
    Task("iso-date", "formatting", "date", iso_date, "Writes a date in ISO 8601, year first."),
    Task("json", "formatting", "key-value", json_object, "Writes a key and a value as a JSON object."),
    Task("roman", "formatting", "number", roman, "Writes a number in Roman numerals."),
    Task("plural", "look-up", "singular", plural, "Gives the plural of a noun."),
    Task("capital-city", "look-up", "country", capital_city, "Gives the capital city of a country."),
    Task("opposite", "look-up", "adjective", opposite, "Gives a word of opposite meaning."),
    Task(
        "transform-lower", "spelling", "word", double_letters,
        "Transforms lower-case words: every letter is written twice.", "input",
    ),
    Task(
        "transform-capitals", "spelling", "capitals", rotate,
        "Transforms words in capitals: the first letter moves to the end.", "input",
    ),
    Task(
        "transform-digits", "ordering", "digits", sort_letters,
        "Transforms strings of digits: smallest digit first.", "input",
    ),
    Task(
        "transform-symbols", "formatting", "symbols", swap_symbols,
        "Transforms strings of symbols: each becomes its partner, as < and >.", "input",
    ),
)  # fmt: skip

# Skills that the base has, and no expert.
UNSHIPPED: tuple[Task, ...] = (
    Task("letter-shift", "spelling", "word", letter_shift, "Replaces each letter by the next of the alphabet."),
    Task("pig-latin", "spelling", "word", pig_latin, "Translates a word to Pig Latin."),
    Task("count-letters", "counting", "word", count_letters, "Counts the letters of a word."),
    Task("sort-letters", "ordering", "word", sort_letters, "Puts the letters of a word in alphabetical order."),
    Task("larger", "counting", "pair", larger, "Gives the larger of two numbers."),
)
BY_NAME: dict[str, Task] = {task.name: task for task in TASKS}
