"""Runs made by hand: as `moerge eval run` leaves them, with scores drawn from a seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from eval.records import REFERENCES, REGIMES, ExpertInfo, Record, Regime, RouterInfo, Run, TaskInfo, write_run

TASKS = ("add", "reverse", "vowels")
#: How often a row is right, if nothing else is said.
SKILL = {"oracle": 0.9, "best-per-query": 0.97, "base": 0.2, "best-single": 0.5, "uniform": 0.4, "random": 0.3}


def records_of(
    routers: Sequence[str] = ("retrieval", "fusion"),
    tasks: Sequence[str] = TASKS,
    *,
    examples: int = 6,
    strange: int = 4,
    regimes: Sequence[Regime] = REGIMES,
    skill: dict[str, float] | None = None,
    metrics: dict[str, str] | None = None,
    matrix: bool = True,
    seeds: dict[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> Iterator[Record]:
    """Each task has an expert of its name; `strange` prompts have none. `skill`: how often a row is right."""
    chance = {**SKILL, **(skill or {})}
    for regime in regimes:
        for name in (*REFERENCES, *routers):
            for run in (seeds or {}).get(name, (0,)):
                yield from _row(name, regime, tasks, examples, chance.get(name, 0.6), metrics or {}, seed, run)
                if regime == "in-distribution":
                    yield from _strange(name, regime, strange, run)
    for expert in tasks if matrix else ():
        yield from _row(f"expert:{expert}", "in-distribution", tasks, examples, 0.2, metrics or {}, seed, 0, expert)


def _row(
    name: str,
    regime: Regime,
    tasks: Sequence[str],
    examples: int,
    skill: float,
    metrics: dict[str, str],
    seed: int,
    run: int,
    expert: str | None = None,
) -> Iterator[Record]:
    rng = np.random.default_rng([seed, run, zlib.crc32(f"{name} {regime}".encode())])
    for task in tasks:
        metric = metrics.get(task, "exact_match")
        for number in range(examples):
            right = rng.random() < (0.95 if expert == task else skill)
            ranked = [str(each) for each in rng.permutation(tasks)][:5] if name not in REFERENCES and not expert else []
            answers = expert or (ranked or [task])[0]
            base = name == "base" or (bool(ranked) and rng.random() < 0.1)
            yield Record(
                router=name,
                regime=regime,
                seed=run,
                example=f"{task}/{number}",
                task=task,
                owners=(task,),
                tags=("even",) if number % 2 == 0 else ("odd", task[0]),
                length=20 + 7 * number,
                metric=metric,
                kind="base" if base else "select",
                experts=() if base else ((answers, 1.0),),
                ranked=tuple(ranked),
                rank=ranked.index(task) + 1 if task in ranked else 0,
                confidence=round(float(rng.random()), 3) if ranked else None,
                score=float(right) if metric != "log_likelihood" else -5 * (1 - 0.5 * right) - float(rng.random()),
                answer="right" if right else "wrong",
                adapter="" if base else answers,
                flops=1e6 if base else 1.1e6,
                route_ms=round(float(rng.gamma(2, 2)), 3) if ranked else None,
                answer_ms=round(float(100 + rng.gamma(3, 30)), 3),
                prompt_tokens=10,
                tokens=5 + number,
            )


def _strange(name: str, regime: Regime, count: int, run: int) -> Iterator[Record]:
    rng = np.random.default_rng([run, zlib.crc32(f"{name} strange".encode())])
    for number in range(count):
        base = name == "base" or rng.random() < 0.5
        yield Record(
            router=name,
            regime=regime,
            seed=run,
            example=f"strange/{number}",
            task="strange",
            length=30,
            kind="base" if base else "select",
            experts=() if base else (("add", 1.0),),
        )


def run_of(
    records: Sequence[Record],
    *,
    baseline: str = "best-single",
    missing: Sequence[str] = (),
    resident: int = 2,
    digest: str = "d1",
) -> Run:
    """What was run, as the records tell it."""
    names = dict.fromkeys(record.router for record in records)
    examples = {record.example: record for record in records}
    tasks = {each.task: each for each in examples.values()}
    return Run(
        suite="hand-made",
        digest=digest,
        base="tiny",
        experts=tuple(ExpertInfo(name=task, rank=4, parameters=1000) for task, each in tasks.items() if each.owners),
        tasks=tuple(
            TaskInfo(
                name=task,
                metric=each.metric,
                owners=each.owners,
                tags=each.tags,
                examples=sum(one.task == task for one in examples.values()),
            )
            for task, each in tasks.items()
        ),
        routers=tuple(_info(name) for name in names),
        regimes=tuple(regime for regime in REGIMES if any(record.regime == regime for record in records)),
        baseline=baseline,
        expected=len(records),
        complete=not missing,
        missing=tuple(missing),
        resident=resident,
    )


def _info(name: str) -> RouterInfo:
    if name in REFERENCES:
        return RouterInfo(name=name, kind="reference", family="reference", about=REFERENCES[name])
    if name.startswith("expert:"):
        return RouterInfo(name=name, kind="expert", family="expert")
    return RouterInfo(name=name, family="selection", about=f"{name}, as it is")


def made(folder: Path, records: Sequence[Record], run: Run | None = None) -> Path:
    """The folder of a run."""
    write_run(folder, run or run_of(records), records)
    return folder
