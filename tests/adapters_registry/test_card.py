"""What a model card fills in."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_registry.base import BaseSpec
from adapters_registry.card import Card, read_card
from adapters_registry.expert import State
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry

CARD = """---
base_model: org/tiny-llama
license: apache-2.0
datasets: [squad, org/own]
tags: [lora, "base_model:adapter:org/tiny-llama", qa]
---
# Answers questions

![badge](https://example.org/badge.svg)

An adapter that answers questions
about a paragraph.

More about it.
"""


def card(tmp_path: Path, text: str) -> Card:
    (tmp_path / "README.md").write_text(text)
    return read_card(tmp_path / "README.md")


def test_a_card_says_it_all(tmp_path: Path) -> None:
    assert card(tmp_path, CARD) == Card(
        base_model="org/tiny-llama",
        licence="apache-2.0",
        training_data=("squad", "org/own"),
        tags=("lora", "qa"),
        description="An adapter that answers questions about a paragraph.",
    )


def test_peft_s_unfilled_template_says_nothing(adapter: Path) -> None:
    found = read_card(adapter / "README.md")
    assert (found.description, found.licence, found.base_model) == ("", None, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "---\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: {a: 1}\ndatasets: 7\n---\n",
        "\0",
    ],
)
def test_a_card_never_fails(tmp_path: Path, text: str) -> None:
    assert card(tmp_path, text).licence is None


def test_bytes_that_are_not_text_never_fail(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\0---")
    assert "\0" not in read_card(tmp_path / "README.md").description


def test_no_card_is_an_empty_one(tmp_path: Path) -> None:
    assert read_card(tmp_path / "README.md") == Card()


def test_a_named_licence_is_used_by_its_name(tmp_path: Path) -> None:
    assert card(tmp_path, "---\nlicense: other\nlicense_name: llama2\n---\n").licence == "llama2"


def test_the_caller_comes_first_and_the_card_second(tmp_path: Path, base: BaseSpec, adapter: Path) -> None:
    (adapter / "README.md").write_text(CARD)
    proposal = Proposal(name="a", source=FolderSource(path=adapter), licence="MIT", tags=())
    with Registry.open(tmp_path / "data", base=base) as registry, registry.prepare(proposal) as prepared:
        expert = registry.commit(prepared, state=State.ACTIVE)
    assert (expert.licence, expert.tags) == ("MIT", ())
    assert expert.training_data == ("squad", "org/own")
    assert expert.description.startswith("An adapter that answers")
