"""`moerge eval run`: what it refuses, how it leaves, and what it says."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from eval.cli import app
from eval.records import read_records, read_run
from tests.eval.strangers import Stranger

TESTBED = Path(__file__).parents[2] / "eval" / "testbed" / "data"
NAMES = ("roman", "vowels")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    experts = [
        {"name": name, "source": str(TESTBED / "experts" / name), "samples": str(TESTBED / "samples" / f"{name}.jsonl")}
        for name in NAMES
    ]
    base = {"name": "base", "path": str(TESTBED / "base"), "context": 512, "dtype": "float32"}
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"base_model": base, "experts": experts}))
    told = {
        "name": "small",
        "manifest": str(manifest),
        "defaults": {"prompt": "{{ prompt }}", "answer": "{{ answer }}", "limit": 2},
        "tasks": [{"name": name, "expert": name, "data": str(TESTBED / "test" / f"{name}.jsonl")} for name in NAMES],
        "routers": [
            {"name": "retrieval", "method": "retrieval"},
            {"name": "both", "blend": {"operator": "ties"}},
        ],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


@pytest.fixture
def there(stranger: Stranger) -> Stranger:
    """A server that has the experts of the suite."""
    stranger.models = ["base", *NAMES, "random-weights-0"]
    return stranger


def eval_run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_complete_run_prints_its_table_and_leaves_with_0(suite, there, tmp_path):
    done = eval_run(suite, "--out", tmp_path / "out", "--endpoint", there.url)
    assert done.exit_code == 0, done.output
    for row in ("base", "oracle", "random-weights", "retrieval", "both"):
        assert f"| {row} |" in done.stdout
    assert str(tmp_path / "out" / "report.html") in words(done.stderr).replace(" ", "")
    assert (tmp_path / "out" / "report.html").is_file()
    run = read_run(tmp_path / "out")
    assert run.complete
    assert run.settings["versions"]["moerge"]
    assert {each.name: each.parameters > 0 for each in run.experts} == dict.fromkeys(NAMES, True)
    assert all(each.flops for each in read_records(tmp_path / "out") if each.router != "random-weights")
    again = eval_run(suite, "--out", tmp_path / "out", "--endpoint", there.url, "--json")
    assert json.loads(again.stdout)["complete"] is True


def test_options_choose_a_part(suite, there, tmp_path):
    only = (
        "--task",
        "roman",
        "--router",
        "retrieval",
        "--router",
        "retrieval:scoring=best",
        "--regime",
        "ood",
        "--limit",
        1,
    )
    done = eval_run(
        suite, "--out", tmp_path / "out", "--endpoint", there.url, "--baseline", "retrieval:scoring=best", *only
    )
    assert done.exit_code == 0, done.output
    run = read_run(tmp_path / "out")
    assert (run.regimes, run.baseline) == (("ood",), "retrieval:scoring=best")
    assert [each.name for each in run.tasks] == ["roman"]
    assert [each.name for each in run.routers if each.kind == "router"] == ["retrieval", "retrieval:scoring=best"]
    assert {each.example.partition("/")[0] for each in read_records(tmp_path / "out")} == {"roman"}


def test_a_run_that_lacks_something_leaves_with_3_and_says_what(suite, there, tmp_path):
    there.refuse = lambda body: (422, "blend_refused", "no such operator here") if "moerge" in body else None
    done = eval_run(suite, "--out", tmp_path / "out", "--endpoint", there.url)
    assert done.exit_code == 3
    assert (
        "both, ood: 4 without a score: no such operator here" in words(done.stderr) or "no such operator" in done.stderr
    )
    assert "incomplete" in done.stderr
    assert read_run(tmp_path / "out").complete is False


def test_an_endpoint_that_dies_half_way_leaves_with_3_and_the_same_command_goes_on(suite, there, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.endpoint.RETRIES", 0)
    there.dies = 6
    arguments = (suite, "--out", tmp_path / "out", "--endpoint", there.url)
    done = eval_run(*arguments)
    assert done.exit_code == 3, done.output
    assert any("were not asked" in each for each in read_run(tmp_path / "out").missing)
    there.dies = None
    before = len(there.bodies)
    done = eval_run(*arguments)
    assert done.exit_code == 0, done.output
    assert len(there.bodies) > before


def test_ctrl_c_leaves_with_130_and_says_how_to_go_on(suite, there, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.runner.run", interrupted)
    done = eval_run(suite, "--out", tmp_path / "out", "--endpoint", there.url)
    assert done.exit_code == 130
    assert "the same command goes on from there" in words(done.stderr)


def test_a_dry_run_says_what_would_be_run_and_touches_nothing(suite, tmp_path):
    done = eval_run(suite, "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "2 experts of base, 2 tasks, 4 examples, 2 routers" in words(done.stdout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--router", "nobody"), "the suite has no such router"),
        (("--router", "knn:k=many"), "knn:k=many"),
        (("--router", "retrieval:what"), "has no '='"),
        (("--regime", "elsewhere"), "no such regime"),
        (("--baseline", "nobody"), "there is no such row"),
        (("--baseline", "expert:nobody"), "there is no such row"),
        (("--task", "nobody"), "there is no task 'nobody'"),
        (("--data", "here"), "give NAME=PATH"),
        (("--engine", "peft", "--endpoint", "http://x"), "give only one"),
    ],
)
def test_options_that_make_no_sense_leave_with_2(suite, tmp_path, options, said):
    done = eval_run(suite, "--out", tmp_path / "out", *options)
    assert done.exit_code == 2, done.output
    assert said in words(done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_suite_that_cannot_be_read_leaves_with_2(tmp_path):
    done = eval_run("no-such-suite", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "quickstart" in done.stderr


def test_an_endpoint_without_the_experts_is_refused(suite, there, tmp_path):
    there.models = ["base", "roman"]
    done = eval_run(suite, "--out", tmp_path / "out", "--endpoint", there.url)
    assert done.exit_code == 2
    assert "does not serve vowels" in words(done.stderr)


def test_other_weights_under_an_expert_s_name_are_refused(suite, there, tmp_path):
    there.digests = {"roman": "0" * 64}
    done = eval_run(suite, "--out", tmp_path / "out", "--endpoint", there.url)
    assert done.exit_code == 2
    assert "other weights" in words(done.stderr)
    assert "roman" in done.stderr


def test_the_folder_of_another_suite_is_left_alone(suite, there, tmp_path):
    out = tmp_path / "out"
    assert eval_run(suite, "--out", out, "--endpoint", there.url, "--limit", 1, "--regime", "ood").exit_code == 0
    suite.write_text(suite.read_text().replace("name: small", "name: other"))
    done = eval_run(suite, "--out", out, "--endpoint", there.url)
    assert done.exit_code == 2
    assert "a run of the suite 'small'" in words(done.stderr)


def test_two_runs_do_not_write_to_one_folder(suite, there, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = eval_run(suite, "--out", out, "--endpoint", there.url)
    assert done.exit_code == 2
    assert "Another run writes" in words(done.stderr)
