"""lm-evaluation-harness against a served Moerge, by its own command: its figures are those of direct scoring.

What docs/lm-eval.md shows. One chat and one completions run, over the quickstart's test prompts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from eval.asking import Ask, Prompt, Reply
from eval.endpoint import Endpoint
from eval.examples import Example
from eval.recipe import Recipe
from eval.scoring import METRICS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

EXPERTS = ("add", "iso-date", "opposite", "plural", "reverse", "roman", "uppercase", "vowels")
EACH = 3  # prompts of every expert
END = "<eos>"  # ends every choice, where one begins another: XV, XVIII
AUTO = Recipe(kind="model", model="auto")


@pytest.fixture(scope="module")
def rows(testbed: Any) -> list[dict[str, Any]]:
    """Prompts with an answer to write, and with choices: the answers to others of the same expert's.

    One in five is told something wrong to be right, so that figures are not all 1.
    """
    found: list[dict[str, Any]] = []
    for name in EXPERTS:
        tests = testbed.tests[name][: EACH + 1]
        choices = [f"{answer}{END}" for answer in dict.fromkeys(each["answer"] for each in tests)]
        for test in tests[:EACH]:
            wrong = len(found) % 5 == 4
            answer = "nobody says this" if wrong else test["answer"]
            gold = (choices.index(f"{test['answer']}{END}") + wrong) % len(choices)
            found.append({"prompt": test["prompt"], "answer": answer, "choices": choices, "gold": gold})
    return found


@pytest.fixture(scope="module")
def tasks(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks `quickstart` (exact match) and `quickstart_choice`, as the harness reads them."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    written = {
        "task": "quickstart",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 40, "temperature": 0},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    chosen = {
        "task": "quickstart_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    for task in (written, chosen):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@dataclass
class Harness:
    """`lm_eval run`: the figures of each task, and its samples in the order of the rows."""

    tasks: Path
    out: Path

    def run(self, model: str, arguments: str, *names: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments]
        command += ["--tasks", ",".join(names), "--include_path", str(self.tasks), "--apply_chat_template"]
        command += ["--output_path", str(self.out), "--log_samples"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self.out / "cache")}
        ran = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=500)
        assert ran.returncode == 0, ran.stderr[-3000:]
        (results,) = self.out.glob("*/results_*.json")
        samples = {}
        for name in names:
            (path,) = self.out.glob(f"*/samples_{name}_2*.jsonl")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            samples[name] = sorted(lines, key=lambda line: line["doc_id"])
        return json.loads(results.read_text())["results"], samples


@pytest.fixture
def harness(tasks: Path, tmp_path: Path) -> Harness:
    return Harness(tasks, tmp_path)


async def asked(server: Any, asks: list[Ask]) -> list[Reply]:
    """Moerge's own way to ask an endpoint, in the order of `asks`."""
    async with Endpoint(f"{server.url}/v1", base="quickstart", concurrency=8) as endpoint:
        replies = {ask.model_dump_json(): reply async for ask, reply in endpoint.answers(asks)}
    assert not [reply.error for reply in replies.values() if reply.error]
    return [replies[ask.model_dump_json()] for ask in asks]


def scored(metric: str, rows: list[dict[str, Any]], replies: list[Reply]) -> list[float]:
    return [
        METRICS[metric].score(
            Example(
                id=f"q/{i}",
                task="q",
                prompt=Prompt(text=row["prompt"]),
                answers=(row["answer"],),
                choices=tuple(row["choices"]),
                gold=row["gold"],
            ),
            reply,
        )
        for i, (row, reply) in enumerate(zip(rows, replies, strict=True))
    ]


async def test_chat_completions_score_as_direct_scoring_does(server, rows, harness):
    arguments = f"model=auto,base_url={server.url}/v1/chat/completions,num_concurrent=8"
    results, samples = harness.run("local-chat-completions", arguments, "quickstart")
    direct = scored("exact_match", rows, await asked(server, written(rows)))
    assert [sample["exact_match"] for sample in samples["quickstart"]] == direct
    assert results["quickstart"]["exact_match,none"] == pytest.approx(fmean(direct))
    assert 0.7 < fmean(direct) < 1  # each by its own expert; the base model has next to none right


async def test_completions_and_log_likelihoods_score_as_direct_scoring_does(server, testbed, rows, harness):
    arguments = f"model=auto,base_url={server.url}/v1/completions,tokenizer={testbed.folder / 'base'}"
    arguments += ",tokenizer_backend=huggingface,num_concurrent=8"
    results, samples = harness.run("local-completions", arguments, "quickstart", "quickstart_choice")

    direct = scored("exact_match", rows, await asked(server, written(rows)))
    assert [sample["exact_match"] for sample in samples["quickstart"]] == direct
    assert results["quickstart"]["exact_match,none"] == pytest.approx(fmean(direct))

    replies = await asked(
        server, [Ask(recipe=AUTO, prompt=Prompt(text=row["prompt"]), choices=tuple(row["choices"])) for row in rows]
    )
    for sample, reply in zip(samples["quickstart_choice"], replies, strict=True):
        theirs = [float(logprob) for ((logprob, _),) in sample["resps"]]
        assert theirs == pytest.approx([each.logprob for each in reply.likelihoods], rel=1e-3, abs=1e-2)
    for name, metric in (("acc", "accuracy"), ("acc_norm", "accuracy_norm")):
        figure = fmean(scored(metric, rows, replies))
        assert results["quickstart_choice"][f"{name},none"] == pytest.approx(figure)
        assert 0.7 < figure < 1


def written(rows: list[dict[str, Any]]) -> list[Ask]:
    return [Ask(recipe=AUTO, prompt=Prompt(text=row["prompt"]), max_tokens=40, stop=("\n\n",)) for row in rows]


def test_choices_of_one_question_are_answered_by_one_expert(server, rows):
    """The choice is what the assistant is made to say, so the router does not read it."""
    for row in rows[:: EACH * 2]:
        experts = set()
        for choice in row["choices"]:
            prompt = f"<|user|>{row['prompt']}<|assistant|>{choice}"
            ids = server.http.post("/tokenize", json={"model": "quickstart", "prompt": prompt}).json()["tokens"]
            for each in (prompt, ids):
                response = server.http.post("/v1/route", json={"model": "auto", "prompt": each}).json()
                assert response["text"] == row["prompt"]
                experts.update(expert["expert"] for expert in response["decision"]["experts"])
        assert len(experts) == 1
