from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.prompts import TOLD, BadPrompts, Files, read_prompts
from router.text import BUDGET, combine, shorten

Write = Callable[..., tuple[Path, ...]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, rows)`: rows are objects, or lines as they are."""

    def write(name: str, rows: Sequence[Any]) -> tuple[Path, ...]:
        file = tmp_path / f"{name}.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        file.write_bytes(b"\n".join(lines))
        return (file,)

    return write


def row(task: str, text: str, field: str = "instance", **others: Any) -> dict[str, Any]:
    return {"task": task, field: text, **others}


REGISTER = [row("b", "one"), row("a", "two"), row("b", " three "), row("a", "two"), row("b", "four")]
TEST = [row("a", "five"), row("c", "six"), row("b", "one"), row("c", "seven")]


def problems(files: Files) -> tuple[str, ...]:
    with pytest.raises(BadPrompts) as caught:
        read_prompts(files)
    return caught.value.problems


def test_rows_become_samples_and_test_prompts(write: Write) -> None:
    prompts = read_prompts(Files(write("r", REGISTER), write("t", TEST), samples=2))
    assert prompts.samples == {"a": ("two", "two"), "b": ("one", "three")}
    assert list(prompts.samples) == ["a", "b"]
    assert prompts.test == (("a", "five"), ("b", "one"))
    assert prompts.left_out == {"c": 2}
    assert prompts.repeated == 1
    assert prompts.texts() == ["two", "one", "three", "five"]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_do_no_harm(write: Write) -> None:
    files = Files(
        write("r", [b"\xef\xbb\xbf" + json.dumps(REGISTER[0]).encode() + b"\r", b"", *REGISTER[1:]]), write("t", TEST)
    )
    assert read_prompts(files).samples["b"] == ("one", "three", "four")


def test_files_are_joined_and_each_gives_its_own_samples_and_fields(write: Write) -> None:
    forms = write("forms", [row("a", "bare", brief="short"), row("b", "b"), row("b", "not this one")])
    told = write("told", [row("a", "the task a", "definition"), row("b", "the task b", "definition")])
    wanted = ("instance", "brief", "definition")
    prompts = read_prompts(Files(forms + told, write("t", TEST), register_fields=wanted, samples=1))
    assert prompts.samples == {"a": ("bare", "short", "the task a"), "b": ("b", "the task b")}


def test_two_columns_are_read_as_instruction_and_input(write: Write) -> None:
    long = "x" * BUDGET
    rows = [row("a", "in", told="say"), row("b", long, told=long), row("c", long, told="say")]
    prompts = read_prompts(Files(write("r", rows), write("t", rows), fields=("told+instance",)))
    assert prompts.samples["a"] == ("say\n\nin",)
    assert prompts.samples["b"] == (combine(long, long),)
    assert dict(prompts.test)["c"] == combine("say", long)
    assert read_prompts(Files(write("r", rows), write("t", rows))).samples["b"] == (shorten(long, BUDGET),)


def test_one_file_may_register_and_test(write: Write) -> None:
    rows = [row(task, f"{task} {split}", split=split) for task in "ab" for split in ("train", "test", "validation")]
    both = write("both", rows)
    prompts = read_prompts(Files(both, both))
    assert prompts.samples == {"a": ("a train",), "b": ("b train",)}
    assert prompts.test == (("a", "a test"), ("b", "b test"))
    alone = write("alone", [row("a", "one"), row("b", "two")])
    assert problems(Files(alone, alone)) == (
        f"{alone[0]} registers and tests, and no row's 'split' is register or train; there are: None",
        f"{alone[0]} registers and tests, and no row's 'split' is test; there are: None",
    )


def test_descriptions_stand_beside_samples_or_alone(write: Write) -> None:
    told = write("told", [{"task": "a", "about": "the task a"}, {"task": "b", "about": ""}])
    prompts = read_prompts(Files(told, write("t", TEST), description="about"))
    assert (prompts.samples, prompts.descriptions) == ({"a": (), "b": ()}, {"a": "the task a"})
    prompts = read_prompts(Files(told + write("r", REGISTER), write("t", TEST), description="about"))
    assert prompts.samples["a"] == ("two", "two")
    assert prompts.descriptions == {"a": "the task a"}


def test_no_samples_leaves_only_names(write: Write) -> None:
    prompts = read_prompts(Files(write("r", REGISTER), write("t", TEST), samples=0))
    assert prompts.samples == {"a": (), "b": ()}


def test_clusters_and_prompts_out_of_domain(write: Write) -> None:
    tasks = write("tasks", [{"task": "a", "cluster": "x"}, {"task": "b"}])
    ood = write("ood", [{"source": "s", "instance": "where"}, row("other", "who"), {"instance": "when"}])
    prompts = read_prompts(Files(write("r", REGISTER), write("t", TEST), ood, tasks))
    assert prompts.clusters == {"a": "x"}
    assert prompts.ood == (("s", "where"), ("other", "who"), ("", "when"))


def test_every_bad_row_is_named_by_file_and_line(write: Write) -> None:
    rows = [
        row("a", "fine", id=1),
        b"{not json",
        b"[1]",
        b"\xff",
        {"instance": "whose?"},
        {"task": 7, "instance": "x"},
        row("a", ""),
        row("a", 5),  # type: ignore[arg-type]
        row("a", "again", id=1),
        {"task": "b", "prompt": "x"},
        row("b", "\ud800"),
        row("b", "fine"),
    ]
    register = write("r", rows)
    found = problems(Files(register, write("t", [row("a", "  ")])))
    places = [problem.partition(": ")[0].removeprefix(str(register[0])) for problem in found]
    assert sorted(places[:-1], key=lambda place: int(place[1:])) == [f":{n}" for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
    assert found[-1].endswith("t.jsonl:1: 'instance' is \"  \"; it must be a text, and not empty")
    assert f"{register[0]}:9: the id '1' is also that of {register[0]}:1" in found
    assert f"{register[0]}:10: no field 'instance'; there are: task, prompt" in found


def test_only_the_first_problems_are_listed(write: Write) -> None:
    files = Files(write("r", [row("a", "")] * 100 + [row("b", "x")]), write("t", TEST))
    with pytest.raises(BadPrompts) as caught:
        read_prompts(files)
    assert len(caught.value.problems) == 100
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (TOLD + 1, f"... and {100 - TOLD} more")


def test_an_unknown_field_is_told_with_those_that_exist(write: Write) -> None:
    register, test, tasks = write("r", REGISTER), write("t", TEST), write("tasks", TEST)
    assert problems(Files(register, test, tasks=tasks, fields=("question",), description="about")) == (
        f"{register[0]}: no row has a field 'about'; there are: task, instance",
        f"{register[0]}: no row has a field 'question'; there are: task, instance",
        f"{test[0]}: no row has a field 'question'; there are: task, instance",
        f"{tasks[0]}: no row has a field 'cluster'; there are: task, instance",
    )
    assert len(problems(Files(register, test, fields=("a+b",)))) == 2


def test_what_cannot_be_measured_at_all_says_why(write: Write, tmp_path: Path) -> None:
    register, test = write("r", REGISTER), write("t", TEST)
    one = write("one", [row("a", "x")])
    assert problems(Files(one, test)) == (f"{one[0]}: routing needs two tasks at least; there is a",)
    other = write("other", [row("c", "x")])
    assert problems(Files(register, other)) == (f"{other[0]}: no row is of a registered task; those are a, b",)
    assert problems(Files(register, test, ood=test))[0] == (
        f"{test[0]}:1: task 'a' is registered, so its prompts are not out of domain"
    )
    absent, empty = tmp_path / "absent", write("empty", [b"", b" "])
    assert problems(Files((absent,), empty)) == (f"{absent}: No such file or directory", f"{empty[0]}: holds no rows")
