"""Examples of a suite's data, and what is said about rows that cannot be used."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval import rows
from eval.asking import Prompt
from eval.examples import Example
from eval.extra import ExtraMissing
from eval.reading import SHOWN, BadData, examples_of
from eval.records import TaskInfo
from eval.suite import Suite, read_suite

CHOICES = {"metric": "accuracy", "choices": "options", "gold": "label | int", "answers": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "ann", "bob"):
        (tmp_path / name).mkdir()
    experts = [{"name": name, "source": name, "samples": [f"ask {name}"]} for name in ("ann", "bob")]
    manifest = {"base_model": {"name": "tiny", "path": "base"}, "experts": experts}
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return tmp_path


def suite_of(folder: Path, *tasks: dict[str, Any], **more: Any) -> Suite:
    """Tasks are ann's sums, but for what is given."""
    usual = {"name": "sums", "experts": ["ann"], "data": "rows.jsonl"}
    content = {"name": "mine", "manifest": "manifest.yaml", "defaults": {"answer": "{{ answer }}"}, **more}
    content["tasks"] = [usual | task for task in tasks or ({},)]
    (folder / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_suite(folder / "suite.yaml")


def write(folder: Path, *lines: Any, name: str = "rows.jsonl") -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("".join(f"{text}\n" for text in texts))


def read(folder: Path, *tasks: dict[str, Any], **options: Any) -> tuple[tuple[Example, ...], tuple[TaskInfo, ...]]:
    return examples_of(suite_of(folder, *tasks), **options)


def problems(folder: Path, *tasks: dict[str, Any], **options: Any) -> list[str]:
    """The problems, without the folder they are in."""
    with pytest.raises(BadData) as error:
        read(folder, *tasks, **options)
    return [each.replace(f"{folder}/", "") for each in error.value.problems]


def sums(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n} + 1", "answer": str(n + 1)} for n in range(count)]


def ids(examples: Sequence[Example]) -> list[str]:
    return [example.id for example in examples]


def test_a_row_is_an_example(folder: Path) -> None:
    write(folder, {"q": "1 + 1", "right": ["2", "two"], "level": "easy", "program": "assert f() == 2"}, "")
    (example,), (info,) = read(
        folder,
        {
            "prompt": "What is {{ q }}?",
            "system": "Say a number.",
            "answers": "right",
            "tests": "{{ program }}",
            "tags": ["maths"],
            "tag_columns": ["level"],
            "stop": ["\n"],
            "extract": "[0-9]+",
            "max_tokens": 4,
            "n": 2,
            "temperature": 0.5,
            "form": "completion",
        },
    )
    assert example == Example(
        id="sums/1",
        task="sums",
        owners=("ann",),
        prompt=Prompt(text="What is 1 + 1?", system="Say a number.", form="completion"),
        answers=("2", "two"),
        extract="[0-9]+",
        tests="assert f() == 2",
        max_tokens=4,
        stop=("\n",),
        n=2,
        temperature=0.5,
        tags=("maths", "level:easy"),
    )
    tags = ("maths", "level:easy")
    assert info == TaskInfo(name="sums", metric="exact_match", owners=("ann",), tags=tags, examples=1)


def test_choices_are_joined_to_a_completion_by_a_space_and_not_to_a_chat(folder: Path) -> None:
    write(folder, {"prompt": "Water is", "options": ["wet", " dry"], "label": "1"})
    (completion, chat, own), _ = read(
        folder,
        {**CHOICES, "form": "completion"},
        {**CHOICES, "name": "chat"},
        {**CHOICES, "name": "own", "delimiter": "\n"},
    )
    assert (completion.choices, completion.gold) == ((" wet", " dry"), 1)
    assert chat.choices == ("wet", " dry")
    assert own.choices == ("\nwet", " dry")


def test_the_right_choice_may_be_told_by_its_text(folder: Path) -> None:
    write(folder, {"prompt": "Water is", "options": ["wet", "dry"], "label": "dry"})
    (example,), _ = read(folder, {**CHOICES, "gold": "label", "form": "completion"})
    assert (example.choices, example.gold) == ((" wet", " dry"), 1)


def test_the_answer_follows_the_prompt_where_its_likelihood_is_asked_for(folder: Path) -> None:
    write(folder, *sums(1))
    (likely, text), _ = read(
        folder,
        {"metric": "log_likelihood", "form": "completion"},
        {"name": "text", "form": "completion"},
    )
    assert (likely.answers, text.answers) == ((" 1",), ("1",))


def test_owners_can_be_in_the_rows(folder: Path) -> None:
    write(folder, {"first": "ann", "second": "bob", **sums(1)[0]}, {"first": "bob", "second": "bob", **sums(2)[1]})
    examples, (info,) = read(folder, {"experts": ["{{ first }}", "{{ second }}"]})
    assert [example.owners for example in examples] == [("ann", "bob"), ("bob",)]
    assert info.owners == ("ann", "bob")


def test_prompts_of_nobody_need_no_answers(folder: Path) -> None:
    write(folder, {"prompt": "Hello"})
    (example,), (info,) = read(folder, {"experts": []})
    assert (example.owners, example.answers, example.metric, info.metric) == ((), (), "none", "none")


def test_rows_keep_their_ids_which_are_their_own_or_their_lines(folder: Path) -> None:
    write(folder, {"id": "x", **sums(1)[0]}, "", *sums(1))
    assert ids(read(folder)[0]) == ["sums/x", "sums/3"]
    assert ids(read(folder, {"id_column": None})[0]) == ["sums/1", "sums/3"]
    assert ids(read(folder, {"id_column": "prompt", "limit": 1})[0]) == ["sums/0 + 1"]


def test_a_condition_selects_rows_and_limits_count_what_it_leaves(folder: Path) -> None:
    write(folder, *sums(10))
    even = {"where": "answer | int % 2 == 0"}
    assert ids(read(folder, even)[0]) == ["sums/2", "sums/4", "sums/6", "sums/8", "sums/10"]
    assert ids(read(folder, even | {"limit": 3})[0]) == ["sums/2", "sums/4", "sums/6"]
    assert ids(read(folder, even | {"limit": 3}, limit=2)[0]) == ["sums/2", "sums/4"]
    assert len(examples_of(suite_of(folder, even, limit=1))[0]) == 1


def test_shuffled_rows_are_the_same_rows_in_an_order_of_their_seed(folder: Path) -> None:
    write(folder, *sums(30))
    plain = read(folder)[0]
    shuffled = read(folder, {"shuffle": 1})[0]
    assert ids(shuffled) != ids(plain)
    assert sorted(shuffled, key=lambda e: int(e.id[5:])) == list(plain)
    assert read(folder, {"shuffle": 1})[0] == shuffled
    assert read(folder, {"shuffle": 1, "limit": 5})[0] == shuffled[:5]
    assert ids(read(folder, {"shuffle": 2})[0]) != ids(shuffled)


def test_only_the_tasks_that_are_wanted_are_read(folder: Path) -> None:
    write(folder, *sums(1))
    suite = suite_of(folder, {}, {"name": "broken", "prompt": "{{ absent }}"})
    assert ids(examples_of(suite, tasks=["sums"])[0]) == ["sums/1"]
    with pytest.raises(BadData, match="there is no task 'sum'; there are: sums, broken"):
        examples_of(suite, tasks=["sum"])


def test_what_is_being_read_is_told(folder: Path) -> None:
    write(folder, *sums(1))
    told: list[tuple[str, int, int]] = []
    read(folder, {}, {"name": "more"}, tell=lambda what, done, total: told.append((what, done, total)))
    assert told == [("reading sums", 0, 2), ("reading more", 1, 2)]


def test_with_a_limit_the_rest_of_a_file_is_not_looked_at(folder: Path) -> None:
    write(folder, *sums(3), "this is not JSON")
    assert len(read(folder, limit=3)[0]) == 3
    assert len(problems(folder)) == 1


def test_a_large_file_is_never_in_memory(folder: Path) -> None:
    write(folder, *({"prompt": f"{n} {'x' * 10_000}", "answer": "x"} for n in range(2000)))  # 20 MB
    suite = suite_of(folder, {"where": "prompt.startswith('1999 ')", "shuffle": 0})
    tracemalloc.start()
    examples, _ = examples_of(suite)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ids(examples) == ["sums/2000"]
    assert peak < 8_000_000


@pytest.mark.parametrize(
    ("row", "task", "said"),
    [
        ("{", {}, "rows.jsonl:2: sums: not JSON: Expecting property name enclosed in double quotes"),
        ("[1]", {}, "rows.jsonl:2: sums: not an object with columns, but a list"),
        ({"answer": "1"}, {}, "rows.jsonl:2: sums.prompt: 'prompt' is undefined; the row has answer"),
        ({"prompt": " ", "answer": "1"}, {}, "rows.jsonl:2: sums.prompt: is empty"),
        ({"prompt": None, "answer": "1"}, {}, "rows.jsonl:2: sums.prompt: a column that it shows has no value (null)"),
        ({"prompt": "a"}, {}, "rows.jsonl:2: sums.answers: 'answer' is undefined"),
        ({"prompt": "a", "answer": ""}, {}, "rows.jsonl:2: sums.answers: is empty"),
        ({"prompt": "a", "answer": []}, {"answers": "answer"}, "sums: no right answer, which 'exact_match' needs"),
        ({"prompt": "a", "answer": {}}, {"answers": "answer"}, "sums.answers: {} is no text and no list of texts"),
        (
            {"prompt": "a", "answer": "1", "id": "1"},
            {"id_column": "answer"},
            "sums.id: 'sums/1' is also the id of rows.",
        ),
        ({"prompt": "a", "answer": "1", "who": "eve"}, {"experts": ["{{ who or 'ann' }}"]}, "there is no expert 'eve'"),
        ({"prompt": "a", "answer": "1"}, {"tag_columns": ["level"]}, "sums.tag_columns: there is no column 'level'"),
        ({"prompt": "a", "answer": "1"}, {"where": "level > 3"}, "rows.jsonl:2: sums.where: 'level' is undefined"),
        ({"prompt": "a", "answer": "1"}, {"where": "answer > 3"}, "sums.where: TypeError: '>' not supported between"),
        ({"prompt": "a", "options": ["x", "y"], "label": 2}, CHOICES, "the right choice is 2, not one of 0 to 1"),
        ({"prompt": "a", "options": ["x"], "label": 0}, CHOICES, "1 choices, where 'accuracy' needs two or more"),
        ({"prompt": "a", "options": ["x", "y"]}, CHOICES, "rows.jsonl:2: sums.gold: 'label' is undefined"),
        (
            {"prompt": "a", "options": ["x", "y"], "label": "0"},
            CHOICES | {"gold": "label"},
            "'0' is no choice and no position; if",
        ),
        ({"prompt": "a", "options": None, "label": 0}, CHOICES, "sums.choices: None is no text and no list of texts"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(folder: Path, row: Any, task: dict[str, Any], said: str) -> None:
    good = {"prompt": "b", "answer": "1", "options": ["x", "y"], "label": 1, "who": "", "level": 4}
    write(folder, good | {"answer": ["1"]} if task.get("answers") == "answer" else good, row)
    if "where" in task or "tag_columns" in task:
        write(folder, {"prompt": "", "answer": "1"}, row)
    (found, *_) = [each for each in problems(folder, task) if "rows.jsonl:2" in each]
    assert said in found


def test_text_that_is_not_utf8_is_a_bad_row(folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "1"}\n')
    assert problems(folder)[0].startswith("rows.jsonl:1: sums: is not UTF-8: invalid start byte")


def test_bad_rows_may_be_left_out_and_are_named(folder: Path) -> None:
    write(folder, *sums(1), "{", {"prompt": ""}, *sums(2))
    examples, (info,) = read(folder, {"on_bad_row": "skip"})
    assert ids(examples) == ["sums/1", "sums/4", "sums/5"]
    assert info.examples == 3
    assert [each.replace(f"{folder}/", "")[:25] for each in info.left_out] == [
        "rows.jsonl:2: sums: not J",
        "rows.jsonl:3: sums.prompt",
    ]


def test_a_file_of_bad_rows_is_given_up(folder: Path) -> None:
    write(folder, *["{"] * 100)
    found = problems(folder)
    assert len(found) == SHOWN + 1
    assert found[-1] == f"suite.yaml:6: sums: {SHOWN} bad rows; it was not read further"


def test_an_empty_task_is_an_error_and_says_why(folder: Path) -> None:
    write(folder)
    assert problems(folder) == ["suite.yaml:6: sums.data: rows.jsonl: it has no rows"]
    write(folder, *sums(2))
    nothing = {"where": "answer == 'x'"}
    said = "suite.yaml:6: sums.data: rows.jsonl: `where: answer == 'x'` holds for none of its 2 rows"
    assert problems(folder, nothing) == [said]
    write(folder, "{")
    assert problems(folder, {"on_bad_row": "skip"})[:1] == [
        "suite.yaml:6: sums.data: rows.jsonl: none of its 1 rows can be used"
    ]


def test_the_problems_of_all_tasks_are_told_at_once(folder: Path) -> None:
    write(folder, "{")
    write(folder, {"prompt": ""}, name="more.jsonl")
    found = problems(folder, {}, {"name": "more", "data": "more.jsonl"})
    assert [each.partition(": ")[0] for each in found] == ["rows.jsonl:1", "more.jsonl:1"]


def test_templates_cannot_leave_their_sandbox(folder: Path) -> None:
    write(folder, *sums(1))
    (said,) = problems(folder, {"prompt": "{{ prompt.__class__.__mro__ }}"})
    assert "access to attribute '__class__' of 'str' object is unsafe" in said


def copy_of_the_hub(folder: Path) -> Path:
    """As `hf download` leaves a data set: a card that says where configurations and splits are, and the files."""
    local = folder / "downloaded"
    (local / "easy").mkdir(parents=True)
    write(local, *sums(3), name="easy/test.jsonl")
    files = [{"split": "test", "path": "easy/test.jsonl"}]
    card = yaml.safe_dump({"configs": [{"config_name": "easy", "data_files": files}]})
    (local / "README.md").write_text(f"---\n{card}---\n")
    return local


def test_a_folder_can_stand_in_for_a_data_set_of_the_hub(folder: Path, cached_here: None) -> None:
    task = {"data": {"hub": "org/sums", "config": "easy", "split": "test"}}
    local = {"org/sums": copy_of_the_hub(folder)}
    assert ids(read(folder, task, local=local)[0]) == ["sums/0", "sums/1", "sums/2"]
    shuffled = read(folder, task | {"shuffle": 0, "limit": 2}, local=local)[0]
    assert shuffled == read(folder, task | {"shuffle": 0}, local=local)[0][:2]
    (said,) = problems(folder, task | {"prompt": "{{ absent }}", "limit": 1, "where": "answer == '2'"}, local=local)
    assert said.startswith("org/sums (easy, test), row 1: sums.prompt: 'absent' is undefined")


def test_a_configuration_or_split_that_a_data_set_lacks_is_told(folder: Path, cached_here: None) -> None:
    local = {"org/sums": copy_of_the_hub(folder)}
    (said,) = problems(folder, {"data": {"hub": "org/sums", "config": "hard", "split": "test"}}, local=local)
    assert said.startswith("suite.yaml:6: sums.data: org/sums (hard, test) cannot be read: ValueError: BuilderConfig")
    (said,) = problems(folder, {"data": {"hub": "org/sums", "config": "easy", "split": "tset"}}, local=local)
    assert "ValueError: Unknown split" in said
    (said,) = problems(folder, {"data": {"hub": "a/b", "split": "test"}}, local={"a/b": folder / "absent"})
    assert said.endswith(": --data a/b=absent: it is not there")


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json", "rows.tsv"])
def test_other_files_are_read_by_datasets(folder: Path, cached_here: None, name: str) -> None:
    import pandas

    table = pandas.DataFrame(sums(2))
    {
        "rows.csv": lambda path: table.to_csv(path, index=False),
        "rows.tsv": lambda path: table.to_csv(path, index=False, sep="\t"),
        "rows.parquet": table.to_parquet,
        "rows.json": lambda path: table.to_json(path, orient="records"),
    }[name](folder / name)
    examples, _ = read(folder, {"data": name})
    assert [(example.id, example.prompt.text, example.answers) for example in examples] == [
        ("sums/0", "0 + 1", ("1",)),
        ("sums/1", "1 + 1", ("2",)),
    ]


def test_a_file_of_another_kind_is_refused(folder: Path) -> None:
    (folder / "rows.xlsx").write_text("")
    (said,) = problems(folder, {"data": "rows.xlsx"})
    assert "rows.xlsx: a file of an unknown kind; there are .jsonl, .ndjson, .json, .csv" in said


def test_data_that_everybody_gets_for_themselves_has_to_be_given(folder: Path) -> None:
    write(folder, *sums(2))
    task = {"data": {"given": "cloze", "source": "https://example.org"}}
    assert ids(read(folder, task, local={"cloze": folder / "rows.jsonl"})[0]) == ["sums/1", "sums/2"]
    assert problems(folder, task, task | {"name": "more of it"}) == [
        "suite.yaml:6: sums.data: say where you have 'cloze', which is from https://example.org: --data cloze=PATH"
    ]


def test_a_data_set_that_is_not_here_says_how_to_get_it(folder: Path, no_hub: list[str]) -> None:
    task = {"data": {"hub": "org/sums", "config": "easy", "split": "test", "revision": "abc"}}
    (said, second) = problems(folder, task, {**task, "name": "second"})
    assert said == (
        "suite.yaml:6: sums.data: org/sums (easy, test) cannot be read: ConnectionError: Couldn't reach 'org/sums'\n"
        "  To have it without the Hub: `hf download --repo-type dataset org/sums --revision abc --local-dir FOLDER` "
        "where there is internet, then `--data org/sums=FOLDER`; or bring that machine's cache along (HF_HOME)."
    )
    assert second.endswith("second.data: org/sums was not looked for after that")
    assert no_hub == ["org/sums"]  # half a minute each, and the answer is known


def test_told_to_be_offline_it_looks_for_every_data_set_in_the_cache(
    folder: Path, no_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    task = {"data": {"hub": "org/sums", "split": "test"}}
    other = {"name": "second", "data": {"hub": "org/more", "split": "test"}}
    assert len(problems(folder, task, other)) == 2
    assert no_hub == ["org/sums", "org/more"]


def test_datasets_itself_says_that_it_is_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    (said,) = problems(folder, {"data": {"hub": "moerge-tests/absent", "split": "test"}})
    assert "`hf download --repo-type dataset moerge-tests/absent --local-dir FOLDER`" in said


def test_without_the_extra_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ExtraMissing(module)

    monkeypatch.setattr(rows, "extra", missing)
    write(folder, *sums(1))
    assert len(read(folder)[0]) == 1  # JSONL needs nothing
    with pytest.raises(ExtraMissing):
        read(folder, {"data": {"hub": "org/sums", "split": "test"}})


@pytest.fixture
def cached_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that cannot be reached; what it was asked for."""
    asked: list[str] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append(path)
        raise ConnectionError(f"Couldn't reach '{path}'")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    return asked
