"""A whole run on the testbed's own model, without vLLM: decided, asked, scored, and told who answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_registry.expert import Sample
from adapters_registry.manifest import BaseRef
from adapters_registry.proposal import FolderSource, Proposal
from eval.arena import DATA
from eval.asking import Prompt
from eval.cache import Cache
from eval.deciding import known_experts
from eval.encodings import Remembering
from eval.engines import in_process
from eval.examples import Example
from eval.flops import Flops
from eval.records import REFERENCES, TaskInfo, read_records
from eval.runner import Setup, run
from eval.suite import RouterEntry, Suite
from eval.testbed.manifest import read_jsonl
from tests.eval.conftest import NAMES, PROMPTS
from tests.router.conftest import WordsEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {"retrieval": {}, "arrow": {"shortlist": 2}, "probe": {"shortlist": 2}}


@pytest.fixture
def suite() -> Suite:
    proposals = [
        Proposal(
            name=name,
            source=FolderSource(path=(DATA / "experts" / name).resolve()),
            samples=tuple(Sample.model_validate(row) for row in read_jsonl(DATA / "samples" / f"{name}.jsonl")[:4]),
        )
        for name in NAMES
    ]
    return Suite(
        name="three experts",
        path=Path("suite.yaml"),
        base_model=BaseRef(name="quickstart", model=str(DATA / "base"), context=512, dtype="float32"),
        experts=tuple(proposals),
        tasks=(),
        routers=tuple(
            RouterEntry(name=name, method=name, settings={"threshold": -1, **settings})
            for name, settings in METHODS.items()
        ),
        regimes=("in-distribution", "semi-ood"),
    )


def test_a_run_without_vllm_is_complete(suite: Suite, tmp_path: Path) -> None:
    examples = [
        Example(
            id=f"{prompt.owners[0]}/{n}",
            task="+".join(prompt.owners),
            owners=prompt.owners,
            prompt=Prompt(text=prompt.text),
            answers=(prompt.answer,),
            max_tokens=12,
        )
        for n, prompt in enumerate(PROMPTS)
    ]
    experts = known_experts(suite.experts)
    answering = in_process(suite, experts, tmp_path / "server")
    folders = {each.name: each.path for each in experts}
    setup = Setup(
        suite=suite,
        experts=experts,
        examples=examples,
        tasks=[TaskInfo(name=each.task, metric=each.metric, owners=each.owners) for each in examples],
        encoder=Remembering(WordsEncoder()),
        engine_id=answering.id,
        random=answering.random,
        flops=Flops(DATA / "base", {**folders, **answering.folders}).of,
        max_rank=answering.max_rank,
    )
    with Cache(None) as cache:
        done = run(setup, answering.open, cache, tmp_path / "out", lambda what, done, total: None)
    assert (done.complete, done.missing) == (True, ())
    found = {(each.router, each.regime, each.example): each for each in read_records(tmp_path / "out")}
    for regime in suite.regimes:
        assert {router for router, where, _ in found if where == regime} >= {*REFERENCES, *METHODS}
    for prompt, example in zip(PROMPTS[:3], examples, strict=False):
        oracle = found["oracle", "in-distribution", example.id]
        assert (oracle.score, oracle.answer) == (1, prompt.answer)
        assert found["best-per-query", "in-distribution", example.id].score == 1
        assert found["base", "in-distribution", example.id].score == 0
        semi = found["retrieval", "semi-ood", example.id]
        assert not {*prompt.owners} & dict(semi.experts).keys()
    for example in examples:
        probed = found["probe", "in-distribution", example.id]
        assert (probed.kind, len(probed.experts)) == ("gate", 1), "whoever the evidence spoke for"
        assert probed.adapter == probed.experts[0][0]
        alone = found[f"expert:{probed.adapter}", "in-distribution", example.id]
        assert (probed.answer, probed.flops) == (alone.answer, alone.flops)
