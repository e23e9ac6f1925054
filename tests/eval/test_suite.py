"""Suites: what they mean, and what is said about mistakes, with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from eval.recipe import Recipe
from eval.suite import BadSuite, Blend, RouterEntry, Suite, Task, read_suite, shipped

MANIFEST = """\
base_model: {name: tiny, path: base, aliases: [org/tiny]}
experts:
  - {name: ann, source: experts/ann, samples: [Add one and two]}
  - {name: bob, source: experts/bob, samples: [Spell cat backwards]}
"""
GOOD = """\
name: mine
manifest: manifest.yaml
tasks:
  - name: sums
    expert: ann
    data: sums.jsonl
    answer: "{{ answer }}"
routers:
  - {name: nearest, method: retrieval}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "experts/ann", "experts/bob"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "manifest.yaml").write_text(MANIFEST)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    return tmp_path


def read(folder: Path, text: str) -> Suite:
    (folder / "suite.yaml").write_text(text)
    return read_suite(folder / "suite.yaml")


def problems(folder: Path, text: str) -> list[str]:
    """The problems, without the folder they are in."""
    with pytest.raises(BadSuite) as error:
        read(folder, text)
    return [each.replace(f"{folder}/", "") for each in error.value.problems]


def test_a_suite_is_a_base_model_experts_tasks_and_routers(folder: Path) -> None:
    suite = read(folder, GOOD)
    assert suite.manifest == folder / "manifest.yaml"
    assert suite.base_model.name == "tiny"
    assert suite.names == ("ann", "bob")
    (task,) = suite.tasks
    assert (task.owners, task.answers, task.metric, task.form) == (("ann",), ("{{ answer }}",), "exact_match", "chat")
    assert task.data.path == str(folder / "sums.jsonl")
    assert task.place == f"{folder}/suite.yaml:4"
    assert suite.regimes == ("in-distribution", "semi-ood", "ood")
    assert suite.baseline == "best-single"
    assert suite.warnings == (f"{folder}/suite.yaml: no task is about the expert 'bob'",)


def test_experts_may_stand_in_the_suite_itself(folder: Path) -> None:
    inline = yaml.safe_dump({**yaml.safe_load(GOOD), "manifest": yaml.safe_load(MANIFEST)}, sort_keys=False)
    suite = read(folder, inline)
    assert suite.manifest is None
    assert suite.experts == read(folder, GOOD).experts
    assert suite.digest == read(folder, GOOD).digest


def test_another_manifest_can_take_the_place_of_the_suites_own(folder: Path) -> None:
    other = folder / "other.yaml"
    other.write_text(MANIFEST.replace("tiny", "other"))
    (folder / "suite.yaml").write_text(GOOD)
    suite = read_suite(folder / "suite.yaml", manifest=other)
    assert (suite.manifest, suite.base_model.name) == (other, "other")


def test_defaults_are_for_all_tasks_and_each_is_for_several(folder: Path) -> None:
    (task_a, task_b, own) = read(
        folder,
        """\
name: mine
manifest: manifest.yaml
defaults:
  answer: "{{ answer }}"
  tags: [all]
  max_tokens: 8
  data: {hub: org/sums, split: test}
tasks:
  - each: [ann, bob]
    name: "{{ each }}'s"
    expert: "{{ each }}"
    tags: ["of {{ each }}"]
    data: {config: "c-{{ each }}"}
  - {name: own, expert: ann, data: sums.jsonl, answers: "[answer, 'x']", max_tokens: 9}
""",
    ).tasks
    assert (task_a.name, task_b.name) == ("ann's", "bob's")
    assert (task_a.owners, task_b.owners) == (("ann",), ("bob",))
    assert task_b.tags == ("all", "of bob")
    assert (task_b.data.hub, task_b.data.config, task_b.data.split) == ("org/sums", "c-bob", "test")
    assert (own.answers, own.max_tokens, own.data.hub) == ("[answer, 'x']", 9, None)


def test_a_task_of_nobody_has_no_metric_and_one_of_all_belongs_to_everybody(folder: Path) -> None:
    nobody, everybody = read(
        folder,
        """\
name: mine
manifest: manifest.yaml
defaults: {data: sums.jsonl, answer: "{{ answer }}"}
tasks:
  - {name: chat}
  - {name: held out, experts: all}
""",
    ).tasks
    assert (nobody.experts, nobody.metric, nobody.answers) == ((), "none", ())
    assert everybody.owners == ("ann", "bob")


def test_owners_may_be_the_rows_to_tell(folder: Path) -> None:
    (task,) = read(folder, GOOD.replace("expert: ann", 'experts: ["{{ first }}", ann]')).tasks
    assert task.owners == ()
    assert task.experts == ("{{ first }}", "ann")


def test_routers_have_families_and_say_what_they_compute(folder: Path) -> None:
    suite = read(
        folder,
        GOOD
        + """\
  - {name: three, method: retrieval, settings: {top_k: 3}}
  - {name: merged, method: retrieval, settings: {top_k: 3, operator: ties}}
  - each: [arrow, spectr]
    name: "{{ each }}"
    method: "{{ each }}"
  - {name: all of them, blend: {operator: linear}}
  - {name: the server's, model: auto}
  - {name: mine, method: knn, family: own, about: neighbours}
""",
    )
    families = {router.name: router.family for router in suite.routers}
    assert families == {
        "nearest": "selection",
        "three": "mixture",
        "merged": "operator",
        "arrow": "gate",
        "spectr": "gate",
        "all of them": "blend",
        "the server's": "endpoint",
        "mine": "own",
    }
    about = {router.name: router.about for router in suite.routers}
    assert about["arrow"] == "abs(v_k · x)"
    assert about["mine"] == "neighbours"


def test_a_blend_is_of_those_who_may_answer() -> None:
    assert Blend().recipe(["ann", "bob"]) == Recipe.blend({"ann": 0.5, "bob": 0.5})
    assert Blend(experts=("ann", "eve")).recipe(["ann", "bob"]) == Recipe.expert("ann")
    weighed = Blend(experts={"ann": 0.3, "bob": -0.1}, operator="ties").recipe(["ann", "bob"])
    assert weighed.experts == (("ann", 0.3), ("bob", -0.1))


def test_the_digest_is_of_what_is_said_wherever_it_lies(folder: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in ("base", "experts/ann", "experts/bob"):
        (elsewhere / path).mkdir(parents=True)
    for name in ("manifest.yaml", "sums.jsonl"):
        (elsewhere / name).write_bytes((folder / name).read_bytes())
    here = read(folder, GOOD)
    assert read(elsewhere, GOOD.replace("  - name: sums", "\n  - name: sums")).digest == here.digest
    assert read(elsewhere, GOOD + "seeds: [0, 1]\n").digest != here.digest
    assert here.model_copy(update={"limit": 3}).digest != here.digest


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("name: mine\n", "", "suite.yaml:1: name: Field required"),
        ("name: mine", "name: mine\nnmae: 1", "suite.yaml:2: nmae: Extra inputs are not permitted"),
        ("name: mine", "name: mine\nname: yours", "suite.yaml:2: name: given twice"),
        ("name: mine", "name: [", "suite.yaml:3: not YAML: expected ',' or ']', but got ':'"),
        ("name: mine", "name: mine\nlimit: 0", "suite.yaml:2: limit: Input should be greater than 0"),
        ("name: mine", "name: mine\nseeds: []", "suite.yaml:2: seeds: Tuple should have at least 1 item"),
        ("name: mine", "name: mine\nregimes: [odd]", "suite.yaml:2: regimes.0: Input should be 'in-distribution'"),
        ("name: mine", "name: mine\nstatistics: [hessian]", "suite.yaml:2: statistics.0: Input should be 'gram' or"),
        (
            "name: mine",
            "name: mine\nbaseline: auto",
            "suite.yaml:2: baseline: there is no row 'auto'; there are: base,",
        ),
        (
            "name: mine",
            "name: mine\nbase_model: huge",
            "suite.yaml:2: base_model: the suite is for 'huge', but the base",
        ),
        ("manifest: manifest.yaml\n", "", "suite.yaml:1: manifest: the suite comes without experts; give a manifest"),
        ("manifest: manifest.yaml", "manifest: absent.yaml", "absent.yaml: cannot be read: No such file or directory"),
        ("expert: ann", "expert: eve", "suite.yaml:5: tasks.0.expert: there is no expert 'eve'; there are: ann, bob"),
        ("expert: ann", "expert: ann\n    experts: [bob]", "tasks.0.expert: give `expert` or `experts`, not both"),
        ("expert: ann", 'expert: "{{ each }}"', "suite.yaml:4: tasks.0: 'each' is undefined"),
        ("expert: ann", "each: ann", "suite.yaml:5: tasks.0.each: is a list of words, one for each"),
        ("data: sums.jsonl", "data: absent.jsonl", "suite.yaml:6: tasks.0.data: there is no "),
        (
            "data: sums.jsonl",
            "data: {hub: org/x}",
            "suite.yaml:6: tasks.0.data: a data set of the Hub has",
        ),
        (
            "data: sums.jsonl",
            "data: {split: x}",
            "suite.yaml:6: tasks.0.data: needs exactly one of `path`",
        ),
        ("data: sums.jsonl", "data: sums.jsonl\n    prompt: '{{ a'", "suite.yaml:7: tasks.0.prompt: unexpected end of"),
        ("data: sums.jsonl", "data: sums.jsonl\n    where: '{{ a }}'", "suite.yaml:7: tasks.0.where: "),
        ("data: sums.jsonl", "data: sums.jsonl\n    metric: magic", "suite.yaml:7: tasks.0.metric: there is no metric"),
        (
            "data: sums.jsonl",
            "data: sums.jsonl\n    metric: pass@1",
            "tasks.0.metric: pass@1 needs `tests`, which the task",
        ),
        ("data: sums.jsonl", "data: sums.jsonl\n    metric: accuracy", "tasks.0.metric: accuracy needs `choices`"),
        (
            '    answer: "{{ answer }}"\n',
            "",
            "suite.yaml:4: tasks.0.metric: exact_match needs `answer`, which the task",
        ),
        (
            "    expert: ann",
            "    metric: bleu",
            "suite.yaml:5: tasks.0.metric: nothing is asked of a task that is nobody",
        ),
        ("tasks:", "defaults: {limit: 0}\ntasks:", "suite.yaml:3: defaults.limit: Input should be greater than 0"),
        (
            "retrieval",
            "magic",
            "suite.yaml:9: routers.0.method: there is no routing method 'magic'; there are: retrieval",
        ),
        ("name: nearest, ", "", "suite.yaml:9: routers.0.name: Field required"),
        (
            "method: retrieval",
            "model: auto, method: knn",
            "routers.0: needs exactly one of `method`, `model` and `blend`",
        ),
        ("method: retrieval", "model: auto, settings: {k: 1}", "routers.0: `settings` are a method's"),
        ("retrieval", "retrieval, settings: {depth: 3}", "routers.0.settings.depth: Extra inputs are not permitted"),
        (
            "retrieval",
            "retrieval, settings: {top_k: 2, operator: glue}",
            "routers.0.settings: No operator 'glue'. There",
        ),
        (
            "retrieval",
            "arrow, settings: {gate: {depth: 3}}",
            "routers.0.settings.gate.depth: Extra inputs are not perm",
        ),
        (
            "retrieval",
            "arrow, settings: {group: [ann, eve]}",
            "routers.0.settings: there is no expert 'eve'; there are",
        ),
        ("method: retrieval", "blend: {operator: glue}", "routers.0.blend: No operator 'glue'. There are: cat, linear"),
        ("method: retrieval", "blend: {experts: [eve]}", "routers.0.blend.experts: there is no expert 'eve'"),
        ("method: retrieval", "blend: {experts: []}", "routers.0.blend.experts: names nobody; write `all`"),
        ("name: nearest", "name: oracle", "suite.yaml:9: routers.0.name: 'oracle' is a row that every run has"),
        ("name: nearest", "name: expert:ann", "routers.0.name: 'expert:ann' is a row that every run has"),
        (
            "  - {name: nearest",
            "  - {name: nearest, method: knn}\n  - {name: nearest",
            "suite.yaml:10: routers.1.name: there",
        ),
        (
            "  - {name: nearest",
            "  - 3\n  - {name: nearest",
            "suite.yaml:9: routers.0: Input should be a valid dictionary",
        ),
    ],
)
def test_mistakes_are_named_with_file_and_line(folder: Path, was: str, becomes: str, said: str) -> None:
    assert was in GOOD
    assert said in problems(folder, GOOD.replace(was, becomes, 1))[0]


def test_all_problems_are_told_at_once_those_of_the_manifest_too(folder: Path) -> None:
    (folder / "manifest.yaml").write_text(MANIFEST.replace("experts/bob", "experts/absent"))
    found = problems(folder, GOOD.replace("sums.jsonl", "absent.jsonl").replace("retrieval", "magic"))
    assert [each.split(" ")[0] for each in found] == ["manifest.yaml:4:", "suite.yaml:6:", "suite.yaml:9:"]


def test_without_a_manifest_nothing_else_is_said_to_be_missing(folder: Path) -> None:
    found = problems(folder, GOOD.replace("manifest: manifest.yaml\n", "").replace("expert: ann", "experts: all"))
    assert len(found) == 1


def test_a_default_that_is_wrong_is_told_once(folder: Path) -> None:
    text = GOOD.replace("tasks:\n", "defaults: {stop: 7}\ntasks:\n  - {name: b, expert: bob, data: sums.jsonl}\n")
    found = problems(folder, text)
    assert [each for each in found if "defaults.stop" in each] == [
        "suite.yaml:3: defaults.stop: Input should be a valid tuple"
    ]


def test_two_tasks_of_one_name_are_refused(folder: Path) -> None:
    (said,) = problems(folder, GOOD.replace("name: sums", "name: sums\n    each: [a, b]"))
    assert said == "suite.yaml:4: tasks.0.name: there are two tasks called 'sums'"


def test_an_endpoint_is_only_asked_in_distribution(folder: Path) -> None:
    text = GOOD.replace("method: retrieval", "model: auto") + "regimes: [ood]\n"
    assert problems(folder, text)[0].startswith("suite.yaml:9: routers.0.model: an endpoint is only asked")


def test_what_is_hardly_meant_is_a_warning(folder: Path) -> None:
    (folder / "manifest.yaml").write_text(MANIFEST.replace(", samples: [Spell cat backwards]", ""))
    suite = read(
        folder,
        GOOD.replace("expert: ann", "experts: all")
        + "  - {name: m, blend: {operator: regmean}}\n  - {name: phatgoose, method: phatgoose}\n",
    )
    said = [each.replace(f"{folder}/", "") for each in suite.warnings]
    assert said == [
        "suite.yaml:10: regmean needs the experts' gram statistics; write `statistics: [gram]`",
        "suite.yaml:11: phatgoose needs experts with trained vectors (moerge gates train)",
        "suite.yaml: the expert 'bob' has no sample prompts to be found by",
        "suite.yaml:4: all experts own 'sums', so semi-ood and ood leave nobody for it",
    ]


def test_what_is_neither_a_file_nor_a_shipped_suite_is_told_the_names() -> None:
    with pytest.raises(BadSuite, match=r"no file quickstrat.*There are: arrow, flan48"):
        read_suite("quickstrat")
    with pytest.raises(BadSuite, match=r"absent\.yaml: cannot be read: No such file"):
        read_suite("absent.yaml")


def test_a_file_that_is_no_mapping_is_no_suite(folder: Path) -> None:
    (said,) = problems(folder, "")
    assert said.startswith("suite.yaml:1: suite: Input should be a valid dictionary")


def test_a_suite_survives_json(folder: Path) -> None:
    suite = read(folder, GOOD)
    assert Task.model_validate_json(suite.tasks[0].model_dump_json()) == suite.tasks[0]
    assert RouterEntry.model_validate_json(suite.routers[0].model_dump_json()) == suite.routers[0]
    json.dumps(suite.model_dump(mode="json"))


def test_the_shipped_suites_are_five() -> None:
    assert list(shipped()) == ["arrow", "flan48", "llm-merging", "phatgoose", "quickstart"]
