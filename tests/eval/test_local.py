"""The engine in process, against PEFT's merged weights, hooks, dense composites and log-likelihoods one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from adapters_registry.expert import Sample
from adapters_registry.manifest import BaseRef
from eval.arena import DATA
from eval.asking import Ask, Prompt, Reply
from eval.calibration import calibrate
from eval.local import Local, batches, until
from eval.recipe import Recipe, uniform
from eval.testbed.check import load_base, load_expert
from eval.testbed.generate import answers
from eval.testbed.manifest import read_jsonl
from eval.testbed.tokens import chat
from eval.twin import Composite, Twin, read_deltas
from router.decision import Verdict
from tests.eval.conftest import NAMES, PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDERS = {name: DATA / "experts" / name for name in NAMES}
BASE = BaseRef(name="quickstart", model=str(DATA / "base"), context=512, dtype="float32")
TEXTS = [prompt.text for prompt in PROMPTS]
SAMPLES = {
    name: tuple(Sample.model_validate(row) for row in read_jsonl(DATA / "samples" / f"{name}.jsonl")[:4])
    for name in NAMES
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Local]:
    local = Local(BASE, FOLDERS, samples=SAMPLES, batch=3)
    yield local
    local.close()


def ask(engine: Local, recipe: Recipe, **options: object) -> list[Reply]:
    """The replies to all prompts, in order."""
    asks = [
        Ask.model_validate({"recipe": recipe, "prompt": {"text": text}, "max_tokens": 12, **options}) for text in TEXTS
    ]
    return all_of(engine, asks)


def all_of(engine: Local, asks: Sequence[Ask]) -> list[Reply]:
    async def collect() -> dict[Ask, Reply]:
        return {ask: reply async for ask, reply in engine.answers(asks)}

    replies = asyncio.run(collect())
    return [replies[each] for each in asks]


def texts(replies: Sequence[Reply]) -> list[str]:
    assert [reply.error for reply in replies] == [None] * len(replies)
    return [reply.text.strip() for reply in replies]


def test_the_base_model_answers_as_it_does_alone_whatever_was_on_it(engine: Local) -> None:
    alone = answers(*load_base(DATA), TEXTS, limit=12)
    assert texts(ask(engine, Recipe())) == alone
    ask(engine, Recipe.expert("vowels"))
    ask(engine, Recipe(kind="gate", gate="arrow", experts=tuple((name, 1.0) for name in NAMES)))
    assert texts(ask(engine, Recipe())) == alone


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_answers_as_with_its_update_in_the_weights(engine: Local, name: str) -> None:
    _, tokenizer = load_base(DATA)
    replies = ask(engine, Recipe.expert(name))
    assert texts(replies) == answers(load_expert(DATA, name), tokenizer, TEXTS, limit=12)
    assert [reply.prompt_tokens for reply in replies] == [
        len(tokenizer(chat(text), add_special_tokens=False)["input_ids"]) for text in TEXTS
    ]
    assert replies[NAMES.index(name)].tokens == len(PROMPTS[NAMES.index(name)].answer)


def test_a_blend_answers_as_with_the_weighted_sum_of_updates_in_the_weights(engine: Local) -> None:
    weights = {"roman": 0.5, "vowels": 0.75}
    model, tokenizer = load_base(DATA)
    with torch.no_grad():
        for name, weight in weights.items():
            for module, delta in read_deltas(FOLDERS[name])[0].items():
                model.get_submodule(module).weight += weight * delta.float()
    assert texts(ask(engine, Recipe.blend(weights))) == answers(model, tokenizer, TEXTS, limit=12)


@pytest.mark.parametrize("operator", ["ties", "fisher", "regmean"])
def test_operators_have_what_they_need(engine: Local, operator: str) -> None:
    assert all(texts(ask(engine, uniform(NAMES[1:], operator))))


def test_a_gate_answers_as_a_composite_of_dense_updates(engine: Local) -> None:
    model, tokenizer = load_base(DATA)
    rows = [tokenizer(chat(text), add_special_tokens=False)["input_ids"] for text in TEXTS]
    settings = {"top_k": 2}
    twin = Twin(model, Composite.stack(FOLDERS, "arrow", settings))
    expected = [tokenizer.decode(row) for row in twin.generate(rows, limit=12, eos=tokenizer.eos_token_id)]
    recipe = Recipe(kind="gate", gate="arrow", settings=settings, experts=tuple((name, 1.0) for name in NAMES))
    assert texts(ask(engine, recipe)) == [each.strip() for each in expected]


def test_members_are_prepared_for_a_gate(engine: Local) -> None:
    members = (("roman", 1.0), ("vowels", 1.0))
    plain, cut, minus = (
        Recipe(kind="gate", gate="arrow", experts=members, **options)
        for options in ({}, {"compress": 1}, {"general": "uppercase"})
    )
    assert len({tuple(texts(ask(engine, recipe))) for recipe in (plain, cut, minus)}) > 1


def test_weights_travel_with_a_constant_gate_as_with_a_blend(engine: Local) -> None:
    weights = {"roman": 0.2, "uppercase": 0.5, "vowels": 0.3}
    recipe = Recipe(kind="gate", gate="constant", experts=tuple(weights.items()))
    assert texts(ask(engine, recipe)) == texts(ask(engine, Recipe.blend(weights)))


def test_a_probe_lets_the_expert_answer_that_the_evidence_speaks_for(engine: Local) -> None:
    model, tokenizer = load_base(DATA)
    weights = {"roman": 0.25, "uppercase": 0.25, "vowels": 0.5}
    recipe = Recipe(kind="gate", gate="probe", experts=tuple(weights.items()))
    read = [(name, chat(each.prompt)) for name in NAMES for each in SAMPLES[name]]
    neutral = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in read]
    kept = calibrate(model, FOLDERS, neutral, [name for name, _ in read], score="spectr")
    twin = Twin(model, Composite.stack(FOLDERS, "probe", {}, kept))
    prior = torch.tensor(list(weights.values()))
    for text, reply in zip(TEXTS, ask(engine, recipe), strict=True):
        twin.generate([tokenizer(chat(text), add_special_tokens=False)["input_ids"]], limit=1)
        best = int((prior.log() + Verdict().beta * twin.evidence.total[0]).argmax())
        assert reply.experts == ((NAMES[best], 1.0),)
        assert reply.text == texts(ask(engine, Recipe.expert(NAMES[best])))[TEXTS.index(text)]


def test_log_likelihoods_are_those_of_the_choices_tokens_one_by_one(engine: Local) -> None:
    model, tokenizer = load_base(DATA)
    model = load_expert(DATA, "vowels")
    choices = ("ie", "XIV", "", "OTTER otter")
    for form in ("chat", "completion"):
        for text, reply in zip(
            TEXTS,
            ask(engine, Recipe.expert("vowels"), choices=choices, prompt={"text": TEXTS[0], "form": form}),
            strict=True,
        ):
            del text
            before = (
                tokenizer(chat(TEXTS[0]), add_special_tokens=False)["input_ids"]
                if form == "chat"
                else tokenizer(TEXTS[0])["input_ids"]
            )
            for choice, found in zip(choices, reply.likelihoods, strict=True):
                end = tokenizer(choice, add_special_tokens=False)["input_ids"]
                with torch.inference_mode():
                    logits = model(torch.tensor([before + end])).logits[0].log_softmax(-1)
                each = [float(logits[len(before) + k - 1, token]) for k, token in enumerate(end)]
                assert found.tokens == len(end)
                assert found.logprob == pytest.approx(sum(each), abs=1e-3)
                assert found.greedy == (
                    bool(end) and all(logits[len(before) + k - 1].argmax() == t for k, t in enumerate(end))
                )


def test_an_answer_ends_before_a_stop(engine: Local) -> None:
    whole = texts(ask(engine, Recipe.expert("uppercase")))[1]
    assert whole == "OTTER"
    stopped = ask(engine, Recipe.expert("uppercase"), stop=("TE", "Q"))[1]
    assert stopped.text.strip() == whole[:2]
    assert stopped.tokens == 4, "with what was cut off"
    assert until("abc", ()) == "abc"
    assert until("abcd", ("d", "bc")) == "a"


def test_what_cannot_be_asked_here_says_why_and_the_others_are_answered(engine: Local) -> None:
    def error(**options: object) -> str:
        return str(ask(engine, **{"recipe": Recipe(), **options})[0].error)  # type: ignore[arg-type]

    assert "need a server" in error(n=3)
    assert "need a server" in error(temperature=0.5)
    assert "No expert 'poetry'. There are: roman, uppercase, vowels." in error(recipe=Recipe.expert("poetry"))
    assert "more than the context of 512" in error(max_tokens=500)
    assert "no expert 'auto': ask a server" in error(recipe=Recipe(kind="model", model="auto"))
    assert "moerge gates train" in error(
        recipe=Recipe(kind="gate", gate="phatgoose", experts=(("roman", 1.0), ("vowels", 1.0)))
    )
    assert "No operator 'mean'. There are: cat," in error(
        recipe=Recipe(kind="blend", operator="mean", experts=(("roman", 1.0), ("vowels", 1.0)))
    )
    assert "No gate 'mean'" in error(recipe=Recipe(kind="gate", gate="mean", experts=(("roman", 1.0), ("vowels", 1.0))))
    long = Ask(recipe=Recipe(), prompt=Prompt(text="x" * 600))
    short = Ask(recipe=Recipe(), prompt=Prompt(text="x"))
    assert [bool(reply.error) for reply in all_of(engine, [long, short])] == [True, False]


def test_a_model_s_name_is_the_base_model_s_or_an_expert_s(engine: Local) -> None:
    assert texts(ask(engine, Recipe(kind="model", model="quickstart"))) == texts(ask(engine, Recipe()))
    assert texts(ask(engine, Recipe(kind="model", model="roman"))) == texts(ask(engine, Recipe.expert("roman")))


def test_a_chat_needs_a_template_and_a_completion_none(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for file in (DATA / "base").iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file.resolve())
    local = Local(BaseRef(name="bare", model=str(folder)), {})
    chatted = Ask(recipe=Recipe(), prompt=Prompt(text="x"), max_tokens=2)
    plain = Ask(recipe=Recipe(), prompt=Prompt(text="x", form="completion"), max_tokens=2)
    refused, answered = all_of(local, [chatted, plain])
    local.close()
    assert "bare has no chat template" in str(refused.error)
    assert answered.error is None


def test_the_loop_goes_on_while_the_model_works(engine: Local) -> None:
    async def both() -> int:
        turns, done = 0, asyncio.Event()

        async def work() -> None:
            async for _ in engine.answers(
                [Ask(recipe=Recipe.expert("roman"), prompt=Prompt(text=TEXTS[0]), max_tokens=64)]
            ):
                pass
            done.set()

        task = asyncio.create_task(work())
        while not done.is_set():
            await asyncio.sleep(0)
            turns += 1
        await task
        return turns

    assert asyncio.run(both()) > 3


def test_batches_are_of_one_recipe_and_one_kind() -> None:
    recipes = [Recipe(), Recipe.expert("a")]
    asks = [
        Ask(recipe=recipe, prompt=Prompt(text="x" * length), max_tokens=limit)
        for length in (3, 1, 2)
        for recipe in recipes
        for limit in (4, 8)
    ]
    found = batches(asks, 2)
    assert sorted(len(each) for each in found) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert all(len({(ask.recipe, ask.max_tokens) for ask in each}) == 1 for each in found)
    assert sorted(map(str, (ask for each in found for ask in each))) == sorted(map(str, asks))


def test_its_id_tells_engines_apart_whose_answers_differ() -> None:
    ids = {
        Local(BASE, FOLDERS).id,
        Local(BASE, FOLDERS, max_rank=8).id,
        Local(BASE, FOLDERS, samples=SAMPLES).id,
        Local(BASE.model_copy(update={"dtype": "bfloat16"}), FOLDERS).id,
    }
    assert len(ids) == 4
    assert Local(BASE, {}).id in ids, "experts count by their content, in each question"
