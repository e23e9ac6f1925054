"""`moerge bench gated` without its engines: what takes turns, what the ratios are, and the models that it makes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from router.composite import check_composite
from serving import bench_gated
from serving.bench import BenchFailed
from serving.bench_gated import GATES, Timing, Work, interleave, works
from serving.bench_runners import Child, Clock, PeftRunner, prompts
from serving.cli import app
from serving.synthetic import write_composite, write_stack, write_synthetic

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore:(Unable to fetch remote file|Could not find a config file)"),
]


@dataclass
class Steady:
    """Prefill takes 1 ms a token, decoding `speed` ms a token."""

    kinds: tuple[str, ...]
    speed: float
    asked: list[tuple[str, Work]] = field(default_factory=list)

    def measure(self, kind: str, work: Work) -> Timing:
        self.asked.append((kind, work))
        first, decode = 1e-3 * work.batch * work.prompt, self.speed * 1e-3 * work.batch * (work.tokens - 1)
        return Timing(first, 2 * first, decode, 2 * decode)


@pytest.fixture
def result():
    plan = works([1, 8], 33, 512)
    runners = [Steady(("stock",), 8), Steady(("stack", "arrow"), 2), Steady(("peft_arrow",), 4)]
    told = []
    result = interleave(runners, plan, 3, lambda *what: told.append(what))
    assert [done for _, done, _ in told] == list(range(4 * 3 * 4))  # one round to warm up, three works, four kinds
    assert {total for _, _, total in told} == {48}
    return result


def test_ratios_compare_speeds_of_the_same_round(result):
    assert result["ratios"]["arrow/stack@8"] == 1
    assert result["ratios"]["arrow/peft_arrow@8-decode"] == pytest.approx(2)
    assert result["cpu_ratios"]["stock/stack@8-decode"] == pytest.approx(1 / 4)
    assert result["ratios"]["stack/stock@1"] == pytest.approx((32 + 32 * 8) / (32 + 32 * 2))
    assert result["ratios"]["arrow/stock@prefill"] == 1
    assert result["tokens_per_s"]["prefill"]["stack"] == pytest.approx(1000)
    assert result["tokens_per_s"]["8-decode"]["arrow"] == pytest.approx(500)
    json.dumps(result)


def test_stock_decodes_fewer_tokens_at_large_batches_and_counts_for_as_many():
    stock = Steady(("stock",), 8)
    result = interleave([stock], works([1, 32], 33, 0), 1, lambda *_: None)
    assert [(work.batch, work.tokens) for _, work in stock.asked] == [(1, 9), (32, 3), (1, 33), (32, 9)]
    assert result["tokens_per_s"]["32-decode"]["stock"] == pytest.approx(125)
    assert result["tokens_per_s"]["32"]["stock"] == pytest.approx(32 * 33 / (32 * 32 * 1e-3 + 32 * 32 * 8e-3))


def test_a_clock_tells_the_first_token_from_those_that_follow(monkeypatch):
    times = iter(range(10))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(times)))
    monkeypatch.setattr("time.process_time", lambda: 0.0)
    clock = Clock()
    for _ in range(5):  # two steps until every request has its first token, then three more
        clock.stamp()
    timing = clock.timing(4)
    assert (timing.first, timing.decode) == (2, 3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder, layers=1, width=64, inner=96)
    return folder


def experts(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/adapter_config.json"))[:4]


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_has_a_composite_that_fits_the_stack_s_rank(tiny, tmp_path, gate):
    write_composite(tmp_path / gate, experts(tiny), gate, GATES[gate], 64)
    layout = check_composite(tmp_path / gate)
    assert layout.gate == gate
    assert layout.rank == 64


def test_peft_generates_with_the_stack_and_the_experts(tiny, tmp_path):
    """PEFT loads the stack as the ordinary adapter that it is, and `create_arrow_model` the experts."""
    from peft import PeftConfig

    write_stack(tmp_path / "stack", experts(tiny))
    assert PeftConfig.from_pretrained(str(tmp_path / "stack")).r == 64
    runner = PeftRunner(tiny / "base", experts(tiny), 2)
    for kind in runner.kinds:
        for work in works([2], 4, 16):
            timing = runner.measure(kind, work)
            assert timing.first > 0
            assert (timing.decode > 0) == (work.tokens > 1)


def test_prompts_differ_and_are_ordinary_tokens():
    asked = prompts(Work("8", 8, 32, 1))
    assert len({tuple(each) for each in asked}) == 8
    assert {len(each) for each in asked} == {32}
    assert min(map(min, asked)) >= 4
    assert max(map(max, asked)) < 104


def test_what_fails_in_a_runner_s_process_is_told():
    with pytest.raises(BenchFailed, match=r"Measuring one, other failed:\n(?s:.)*JSONDecodeError"):
        Child(("one", "other"), json.loads, "{")


def test_a_runner_s_process_that_dies_is_told():
    with pytest.raises(BenchFailed, match=r"The process for one ended"):
        Child(("one",), os._exit, 3)


def test_the_command_prints_a_table_or_json(monkeypatch, result):
    asked = []

    def run(*arguments):
        asked.append(arguments[:-1])
        arguments[-1]("arrow, 8", 1, 2)
        return result

    monkeypatch.setattr(bench_gated, "bench_gated", run)
    shown = CliRunner().invoke(app, ["bench", "gated", "--batch", "8", "--batch", "1", "--rounds", "2"])
    assert shown.exit_code == 0, shown.output
    assert "arrow" in shown.output
    printed = CliRunner().invoke(app, ["bench", "gated", "--gate", "arrow", "--json"])
    assert json.loads(printed.stdout)["ratios"]["arrow/stack@8"] == 1
    assert asked == [([1, 8], 32, 512, 2, list(GATES)), ([1, 8, 32], 32, 512, 4, ["arrow"])]


def test_an_unknown_gate_is_refused_with_those_that_there_are():
    refused = CliRunner().invoke(app, ["bench", "gated", "--gate", "arow"])
    assert refused.exit_code == 1
    assert "No gate to measure: arow. There are: arrow, spectr" in refused.output


def test_the_kernel_s_benchmark_says_why_it_measures_nothing(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shown = CliRunner().invoke(app, ["bench", "kernel"])
    assert shown.exit_code == 0
    assert "Nothing measured: PyTorch finds no GPU." in shown.output
