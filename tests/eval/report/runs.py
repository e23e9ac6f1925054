"""Runs made by hand: what experts can do is drawn, and routers find the right one more or less often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from eval.asking import Prompt
from eval.examples import Example
from eval.records import REFERENCES, REGIMES, ExpertInfo, Record, Regime, RouterInfo, Run, TaskInfo, write_run

GATED = "evidence gate"


@dataclass
class Made:
    """A run of `experts` with a task each, a composition of the first two, and small talk that is nobody's."""

    experts: int = 5
    routers: int = 4
    per_task: int = 6
    names: tuple[str, ...] = ()  # of the first routers
    expert_names: tuple[str, ...] = ()
    answer: str = ""  # what wrong answers say
    tag: str = "short"
    lost: int = 0  # records that are not there
    regimes: tuple[Regime, ...] = REGIMES
    traced: bool = True
    rng: Random = field(default_factory=lambda: Random(0))

    def __post_init__(self) -> None:
        E, own = self.experts, self.expert_names
        self.known = (*own, *(f"expert-{k:02d}" for k in range(len(own), E)))[:E]
        self.skill = {
            (expert, task): self.rng.choice((0.0, 0.1, 0.1, 0.5)) for expert in self.known for task in range(E)
        }
        self.tasks = [
            *(TaskInfo(name=f"task {k:02d}", metric="exact_match", owners=(own,), tags=(self.tag,),
                       examples=self.per_task) for k, own in enumerate(self.known)),
            TaskInfo(name="first, then second", metric="token_f1", owners=self.known[:2], examples=self.per_task),
            TaskInfo(name="small talk", metric="none", examples=self.per_task),
        ]  # fmt: skip
        self.examples = [
            Example(
                id=f"{task.name}/{k}",
                task=task.name,
                owners=task.owners,
                prompt=Prompt(text=f"Prompt {k} of {task.name}, which asks for something."),
                answers=("right",) if task.owners else (),
                metric=task.metric,
                tags=task.tags,
            )
            for task in self.tasks
            for k in range(task.examples)
        ]

    def infos(self) -> Iterator[RouterInfo]:
        for name, about in REFERENCES.items():
            yield RouterInfo(name=name, kind="reference", family="reference", about=about)
        families = ("selection", "mixture", "operator", "gate")
        for k in range(self.routers):
            name = self.names[k] if k < len(self.names) else f"router-{k:02d}"
            yield RouterInfo(name=name, family=families[k * 4 // self.routers], about=f"finds {self.finds(k):.0%}")
        if self.traced:
            yield RouterInfo(name=GATED, family="gate", settings={"temperature": 0.5})
        for name in self.known:
            yield RouterInfo(name=f"expert:{name}", kind="expert", family="expert")

    def finds(self, router: int) -> float:
        return 0.4 + 0.55 * (router + 1) / (self.routers + 1)

    def chosen(self, info: RouterInfo, regime: Regime, example: Example) -> tuple[str, ...]:
        """Who answers; nobody: the base model."""
        others = [each for each in self.known if regime == "in-distribution" or each not in example.owners]
        match info.name:
            case "base":
                return ()
            case "oracle":
                return example.owners[:1]
            case "best-per-query":
                return (max(others, key=lambda each: self.can(each, example)),)
            case "best-single":
                return (others[0],)
            case "uniform":
                return tuple(others)
            case "random" | "random-weights":
                return (self.rng.choice(others),)
        if info.kind == "expert":
            return (info.name.removeprefix("expert:"),)
        find = 0.8 if info.name == GATED else float(info.about.split()[-1].rstrip("%")) / 100
        if not example.owners:
            return () if self.rng.random() < find else (self.rng.choice(others),)
        right = [each for each in example.owners if each in others]
        return (right[0],) if right and self.rng.random() < find else (self.rng.choice(others),)

    def can(self, expert: str, example: Example) -> float:
        task = next(k for k, each in enumerate(self.tasks) if each.name == example.task)
        return 0.95 if expert in example.owners else self.skill.get((expert, task), 0.1)

    def records(self) -> Iterator[Record]:
        for info in self.infos():
            for regime in self.regimes if info.kind != "expert" else self.regimes[:1]:
                for example in self.examples:
                    if example.owners or (regime == "in-distribution" and info.kind != "expert"):
                        yield self.record(info, regime, example)

    def record(self, info: RouterInfo, regime: Regime, example: Example) -> Record:
        who = self.chosen(info, regime, example)
        able = 0.2 if not who else max(self.can(each, example) for each in who) / len(who) ** 0.5
        right = self.rng.random() < able * (0.05 if info.name == "random-weights" else 1)
        routed = info.kind == "router"
        found = bool(set(who) & set(example.owners))
        ranked = tuple(dict.fromkeys([*who, *self.known]))[:5] if routed else ()
        return Record(
            router=info.name,
            regime=regime,
            example=example.id,
            task=example.task,
            owners=example.owners,
            tags=example.tags,
            length=len(example.prompt.text),
            metric=example.metric,
            kind="base" if not who else "select" if len(who) == 1 else "blend",
            experts=tuple((each, 1 / len(who)) for each in sorted(who)),
            ranked=ranked,
            rank=0 if not (ranked and example.owners) else 1 if found else self.rng.randint(2, self.experts),
            confidence=self.rng.betavariate(*((5, 2) if found else (2, 3))) if routed else None,
            score=float(right) if example.owners else None,
            answer="right" if right else self.answer or f"wrong, says {who[0] if who else 'the base model'}",
            adapter=who[0] if len(who) == 1 else "+".join(who),
            flops=2e6 * (1 + 0.02 * len(who)),
            route_ms=self.rng.uniform(1, 9) if routed else 0.0,
            answer_ms=self.rng.lognormvariate(4, 0.4) * (1 + 0.1 * len(who)),
            prompt_tokens=20,
            tokens=self.rng.randint(2, 12),
        )

    def traces(self) -> Iterator[dict[str, Any]]:
        groups = [f"model.layers.{k}.{part}" for k in range(4) for part in ("self_attn.q_proj+k_proj", "mlp.up_proj")]
        for example in self.examples[:: self.per_task]:
            members = [f"{name}@abcdef123456" for name in self.known[:4]]
            tokens = self.rng.randint(8, 30)
            weights = [[self.rng.random() for _ in members] for _ in groups]
            yield {
                "router": GATED,
                "regime": "in-distribution",
                "example": example.id,
                "prompt": example.prompt.text,
                "trace": {
                    "gate": "evidence",
                    "experts": members,
                    "tokens": tokens,
                    "groups": groups,
                    "weights": [[w / sum(row) for w in row] for row in weights],
                    "top": [self.rng.choice((0, 0, 1, 2, 3)) for _ in range(tokens)],
                    "evidence": [0.0] * len(members),
                },
            }

    def write(self, folder: Path) -> Path:
        records = list(self.records())
        last = [k for k, record in enumerate(records) if record.router == f"router-{self.routers - 1:02d}"]
        gone = set(last[len(last) - self.lost :])
        kept = [record for k, record in enumerate(records) if k not in gone]
        run = Run(
            suite="made by hand",
            digest="0" * 64,
            base="a small model",
            experts=tuple(ExpertInfo(name=name, digest=f"{k:064d}", rank=8, parameters=10**5)
                          for k, name in enumerate(self.known)),
            tasks=tuple(self.tasks),
            routers=tuple(self.infos()),
            regimes=self.regimes,
            expected=len(records),
            complete=not self.lost,
            missing=(f"{self.lost} records of router-{self.routers - 1:02d}",) if self.lost else (),
            resident=4,
            traces=tuple(self.traces()) if self.traced else (),
            settings={"limit": None, "seeds": [0], "versions": {"moerge": "0.1.0", "python": "3.11"}},
        )  # fmt: skip
        write_run(folder, run, kept, self.examples)
        return folder
