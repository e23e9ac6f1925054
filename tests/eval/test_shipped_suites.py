"""The suites that come along: each is read, and asks of rows of its data sets' shape what lm-evaluation-harness asks.

Rows are made up here, with the columns that the data sets have on the Hub.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters_registry.manifest import read_manifest
from eval.examples import Example
from eval.reading import BadData, examples_of
from eval.suite import BadSuite, Suite, read_suite, shipped
from router.blending import OPERATORS
from router.methods import METHODS

Asked = Callable[[str], dict[str, list[Example]]]

ROOT = Path(__file__).parents[2]
TESTBED = ROOT / "eval" / "testbed" / "data"
#: Suites for whatever library somebody has.
WITHOUT_EXPERTS = ("arrow", "phatgoose")

WINOGRANDE = {"sentence": "Ann gave Bea tea because _ was ill.", "option1": "Ann", "option2": "Bea", "answer": "2"}
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "[header] How to bake [title] Mix  it.",
    "ctx_b": "the baker",
    "endings": ["mixes [step] dough.", "sings.", "[substeps] sleeps.", "runs."],
    "label": "3",
}
ARC = {
    "id": "A1",
    "question": "What melts?",
    "choices": {"text": ["ice", "iron"], "label": ["A", "B"]},
    "answerKey": "B",
}
NLI = {"premise": "It rains.", "hypothesis": "It is wet", "label": 1, "idx": 0}
WORDS = {"sentence1": "A bank of sand", "sentence2": "My bank", "start1": 2, "end1": 6, "label": 0, "word": "bank"}
COREFERENCE = {
    "text": "Mark told Pete many lies about himself.",
    "span1_index": 0,
    "span2_index": 6,
    "span1_text": "Mark",
    "span2_text": "himself.",
    "label": 1,
}
CAUSE = {
    "premise": "The man coughed.",
    "choice1": "It was dusty.",
    "choice2": "It was late.",
    "question": "cause",
    "label": 0,
}
EFFECT = CAUSE | {"question": "effect", "label": 1}
BOOLQ = {"passage": "Ice floats.", "question": "does ice float", "label": 1, "idx": 0}

#: The Hub's id -> configuration -> split -> rows.
HUB: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {
    "baber/piqa": {
        "default": {"validation": [{"goal": "Boil water", "sol1": "heat it", "sol2": "cool it", "label": 0}]}
    },
    "allenai/swag": {
        "regular": {
            "validation": [
                {
                    "startphrase": "Ann sits. She",
                    "ending0": "a",
                    "ending1": "b",
                    "ending2": "c",
                    "ending3": "d",
                    "label": 2,
                }
            ]
        }
    },
    "Rowan/hellaswag": {"default": {"validation": [HELLASWAG]}},
    "allenai/ai2_arc": {"ARC-Easy": {"test": [ARC]}, "ARC-Challenge": {"test": [ARC]}},
    "allenai/winogrande": {
        "winogrande_xl": {"validation": [WINOGRANDE, WINOGRANDE | {"sentence": "_ slept."}]},
    },
    "allenai/openbookqa": {"main": {"test": [{"question_stem": "Ice is", **ARC, "answerKey": " A"}]}},
    "aps/super_glue": {
        "boolq": {"validation": [BOOLQ]},
        "rte": {"validation": [NLI]},
        "cb": {"validation": [NLI | {"label": 2}]},
        "copa": {"validation": [CAUSE, EFFECT]},
        "wsc.fixed": {"validation": [COREFERENCE]},
        "wic": {"validation": [WORDS]},
    },
    "facebook/anli": {"plain_text": {f"dev_{r}": [NLI | {"uid": r}] for r in ("r1", "r2", "r3")}},
    "MU-NLPC/Calc-mawps": {
        "default": {"test": [{"id": "mawps__1", "question": "Ann has 4 figs and eats 1.", "result_float": 3.0}]}
    },
}
#: Data sets of one configuration, whose name nobody has to say.
UNNAMED = ("default", "plain_text")

#: lm-evaluation-harness's file for a task, and where the task is.
HARNESS = {
    "piqa": "piqa/piqa",
    "boolq": "super_glue/boolq/default",
    "swag": "swag/swag",
    "hellaswag": "hellaswag/hellaswag",
    "ARC-Easy": "arc/arc_easy",
    "ARC-Challenge": "arc/arc_challenge",
    "openbookqa": "openbookqa/openbookqa",
    "rte": "super_glue/rte/default",
    "cb": "super_glue/cb/default",
    "copa": "super_glue/copa/default",
    "wsc": "super_glue/wsc/default",
    "wic": "super_glue/wic/default",
    "anli r1": "anli/anli_r1",
    "bbh: boolean_expressions": "bbh/zeroshot/boolean_expressions",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    """A folder, with the Hub out of reach."""
    folder = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        for library in ("datasets.config", "huggingface_hub.constants"):
            patch.setattr(f"{library}.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def local(here: Path) -> dict[str, Path]:
    """Every data set as a folder or file here, as `--data` would name it."""
    bbh = {
        config: {"test": [{"input": f"Is {config} hard?", "target": "Yes"}]}
        for config in (task.data.config for task in suite("arrow", here).tasks if task.data.hub == "SaylorTwift/bbh")
    }
    found = {}
    for hub, configs in {**HUB, "SaylorTwift/bbh": bbh}.items():
        found[hub] = here / "data" / hub
        found[hub].mkdir(parents=True)
        card = []
        for config, splits in configs.items():
            for split, rows in splits.items():
                (found[hub] / f"{config}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            files = [{"split": split, "path": f"{config}-{split}.jsonl"} for split in splits]
            card.append({"config_name": config, "data_files": files})
        (found[hub] / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")
    found["story_cloze"] = here / "cloze.csv"
    with found["story_cloze"].open("w", newline="") as file:
        names = [*(f"InputSentence{n}" for n in range(1, 5)), "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"]
        csv.writer(file).writerows(
            [["InputStoryid", *names, "AnswerRightEnding"], ["x", "One.", "Two.", "Three.", "Four.", "Five.", "No.", 1]]
        )
    found["loraretriever"] = here / "combined_test.json"
    metrics = {"exact_match_loose": "em", "rouge_l": "rouge", "bleu": "bleu"}
    rows = [
        {
            "inputs": f"Do {task.name}.",
            "targets": "yes",
            "task": task.name,
            "domain": "nli",
            "metric": metrics[task.metric],
        }
        for task in suite("flan48", here).tasks
    ]
    found["loraretriever"].write_text(json.dumps(rows))
    return found


def suite(name: str, here: Path) -> Suite:
    """With two experts of the testbed, where the suite has none of its own."""
    if name not in WITHOUT_EXPERTS:
        return read_suite(name)
    experts = [
        {"name": expert, "source": str(TESTBED / "experts" / expert), "samples": [f"Do {expert}"]}
        for expert in ("reverse", "vowels")
    ]
    manifest = here / "library.yaml"
    base = {"name": "tiny", "path": str(TESTBED / "base")}
    manifest.write_text(yaml.safe_dump({"base_model": base, "experts": experts}))
    return read_suite(name, manifest=manifest)


@pytest.fixture(scope="module")
def asked(here: Path, local: dict[str, Path]) -> Asked:
    """A suite's examples, by task."""

    @cache
    def ask(name: str) -> dict[str, list[Example]]:
        by_task: dict[str, list[Example]] = {}
        for example in examples_of(suite(name, here), local=local)[0]:
            by_task.setdefault(example.task, []).append(example)
        return by_task

    return ask


@pytest.mark.parametrize("name", list(shipped()))
def test_every_task_of_a_shipped_suite_can_be_asked(name: str, here: Path, asked: Asked) -> None:
    told = suite(name, here)
    found = asked(name)
    assert list(found) == [task.name for task in told.tasks]
    assert told.description
    assert not told.warnings
    assert all(router.about and router.family for router in told.routers)


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_suites_without_experts_ask_for_a_manifest(name: str) -> None:
    with pytest.raises(BadSuite) as error:
        read_suite(name)
    (said,) = error.value.problems
    assert said.endswith("the suite comes without experts; give a manifest of yours (`--manifest FILE`, or here)")


def test_the_prompts_of_flan48_have_to_be_given() -> None:
    with pytest.raises(
        BadData, match=r"flan48\.yaml:\d+: anli_r1\.data: say where you have 'loraretriever', which is from"
    ):
        examples_of(read_suite("flan48"), tasks=["anli_r1"])


def test_flan48_has_a_task_for_every_expert_with_the_metrics_of_the_paper(asked: Asked) -> None:
    told = read_suite("flan48")
    assert [task.owners for task in told.tasks] == [(task.name,) for task in told.tasks]
    assert {task.name for task in told.tasks} == set(told.names)
    assert len(told.names) == 48
    (example,) = asked("flan48")["wmt14_enfr"]
    assert (example.prompt.text, example.answers, example.tags) == ("Do wmt14_enfr.", ("yes",), ("domain:nli",))


def test_the_example_serves_the_manifest_of_flan48_by_the_same_template() -> None:
    example = ROOT / "examples" / "llama2-flan48"
    assert read_manifest(example / "manifest.yaml").proposals == read_suite("flan48").experts
    template = read_suite("flan48").engine["vllm"]["chat_template"]
    written = (example / "chat_template.jinja").read_text().strip().partition("-#}\n")[2]
    assert template == written


def test_the_suite_of_the_competition_has_its_hour_and_its_experts() -> None:
    told = read_suite("llm-merging")
    assert told.minutes == 60
    assert told.base_model.revision == "01c7f73d771dfac7d292323805ebc428287df4f9"
    assert told.names == ("gsm8k", "stock-forecast")
    lora_land = read_suite("llm-merging", manifest=ROOT / "examples" / "mistral-lora-land" / "manifest.yaml")
    assert lora_land.tasks[0].owners == lora_land.names


@pytest.mark.parametrize("name", ["arrow", "phatgoose", "llm-merging"])
def test_prompts_and_choices_are_those_of_lm_evaluation_harness(name: str, here: Path, asked: Asked) -> None:
    pytest.importorskip("lm_eval")
    found = asked(name)
    compared = HARNESS.keys() & found.keys()
    assert compared
    for task in sorted(compared):
        data = next(each.data for each in suite(name, here).tasks if each.name == task)
        assert data.split is not None
        configs = {
            **HUB,
            "SaylorTwift/bbh": {"boolean_expressions": {"test": [{"input": "Is boolean_expressions hard?"}]}},
        }
        config = configs[str(data.hub)]
        rows = config[data.config or next(key for key in config if key in UNNAMED)][data.split]
        for row, example in zip(rows, sorted(found[task], key=lambda each: each.id), strict=True):
            source, text, choices, gold = asked_by_the_harness(HARNESS[task], row)
            assert source == (data.hub, data.config), task
            assert example.prompt.text == text, task
            assert example.choices == tuple(choices), task
            assert example.gold == gold, task


def asked_by_the_harness(file: str, row: dict[str, Any]) -> tuple[tuple[str, str | None], str, list[str], int | None]:
    """The data set, the prompt, the continuations, and the position of the right one."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    told = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{file}.yaml")
    if "process_docs" in told:
        row = told["process_docs"](OneRow(row)).row

    def fill(field: str) -> Any:
        template = told.get(field)
        if callable(template):
            return template(row)
        if isinstance(template, list) or template is None:
            return template
        return row[template] if template in row else apply_template(template, row)

    source = told["dataset_path"], told.get("dataset_name")
    choices = fill("doc_to_choice")
    if choices is None:
        return source, fill("doc_to_text"), [], None
    choices = ast.literal_eval(choices) if isinstance(choices, str) else choices
    target = fill("doc_to_target")
    gold = choices.index(target) if target in choices else int(target)
    delimited = [choice if choice.startswith(" ") else f" {choice}" for choice in choices]
    return source, fill("doc_to_text"), delimited, gold


class OneRow:
    """A data set as `process_docs` uses it."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row

    def map(self, work: Any) -> OneRow:
        return OneRow(self.row | work(self.row))


def test_winogrande_is_scored_from_the_gap_on(asked: Asked) -> None:
    (example,) = asked("arrow")["winogrande"]  # the other sentence has nothing before its gap
    assert example.prompt.text == "Ann gave Bea tea because"
    assert (example.choices, example.gold) == ((" Ann was ill.", " Bea was ill."), 1)


def test_a_story_has_two_endings(asked: Asked) -> None:
    (example,) = asked("phatgoose")["story cloze"]
    assert example.prompt.text == "One. Two. Three. Four."
    assert (example.choices, example.gold) == ((" Five.", " No."), 0)


def test_mawps_is_about_a_number(asked: Asked) -> None:
    (example,) = asked("llm-merging")["mawps"]
    assert (example.id, example.prompt.text) == ("mawps/mawps__1", "Q: Ann has 4 figs and eats 1.\nA:")
    assert (example.answers, example.metric) == (("3.0",), "number")


def test_the_quickstart_has_every_method_and_operator_that_needs_no_training(here: Path) -> None:
    told = read_suite("quickstart")
    methods = {router.method for router in told.routers}
    assert set(METHODS) - methods == {"bandit", "random", "base", "phatgoose", "meteora"}
    operators = {router.settings.get("operator", "cat") for router in told.routers if router.settings.get("top_k")}
    assert set(OPERATORS) - operators == {"layer_swap"}
    (fixed,) = [router.blend for router in told.routers if router.blend]
    assert fixed.recipe(["vowels", "uppercase"]).operator == "layer_swap"
    assert fixed.recipe(["uppercase"]).settings == {"layers": {"uppercase": "2-3"}}
    assert [router.family for router in told.routers] == sorted(
        (router.family for router in told.routers), key=["selection", "mixture", "operator", "gate"].index
    )


def test_the_quickstart_asks_for_skills_for_two_skills_and_for_none(here: Path) -> None:
    found, tasks = examples_of(read_suite("quickstart"))
    assert {len(example.owners) for example in found} == {0, 1, 2}
    assert [task.name for task in tasks if not task.owners] == ["out-of-domain"]
    assert all(len(example.owners) == 2 for example in found if "composition" in example.tags)
    told = {tag for example in found if len(example.owners) == 1 for tag in example.tags}
    assert told == {"instruction-told", "input-told"}
