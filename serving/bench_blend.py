"""The measurements behind `moerge bench blend`: every operator at the shapes of a large model, beside PEFT's own.

Ours go from members' folders to a blend's folder. PEFT's `add_weighted_adapter` is measured in memory, with its
members loaded and nothing saved. Nothing is scaled up: a figure is for the modules that were really merged, and
`ratios` compare the same modules. There are three selections of modules:

    whole   all layers: operators that stay in low rank, and PEFT's `cat` and `linear`
    module  one module, d x d: all operators, and PEFT's `svd`, whose dense SVD takes a minute or more
    half    one module, d/2 x d/2: PEFT's other operators with a dense SVD. It grows with d^3 and ours with d^2, so that
            at full size the ratios are smaller
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters_registry.lora import CONFIG, WEIGHTS
from router.blending import OPERATORS, blend
from router.composite import Part
from router.tensorfile import write_tensors

Tell = Callable[[str], None]
Modules = dict[str, tuple[int, int]]  # module -> (d_out, d_in)


@dataclass(frozen=True)
class Shape:
    """What is merged; the defaults are those of a 7B Llama with adapters on all linear layers."""

    layers: int = 32
    d: int = 4096
    inner: int = 11008
    members: int = 4
    rank: int = 16

    def modules(self, layers: int | None = None) -> Modules:
        found: Modules = {}
        for layer in range(self.layers if layers is None else layers):
            path = f"model.layers.{layer}"
            found |= {f"{path}.self_attn.{name}_proj": (self.d, self.d) for name in "qkvo"}
            found |= {f"{path}.mlp.{name}_proj": (self.inner, self.d) for name in ("gate", "up")}
            found[f"{path}.mlp.down_proj"] = (self.d, self.inner)
        return found


class Selection(NamedTuple):
    modules: Modules
    members: list[Part]


Selected = dict[str, Selection]


class Taken(NamedTuple):
    """Wall-clock and processor seconds."""

    seconds: float
    cpu: float


LONG = 10  # seconds

#: PEFT's name for an operator, and the settings with which both do the same.
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "cat": ("cat", {}),
    "linear": ("linear", {}),
    "svd": ("svd", {}),
    "ties": ("ties_svd", {"density": 0.2, "mean": "count"}),
    "dare_linear": ("dare_linear_svd", {"density": 0.5}),
    "dare_ties": ("dare_ties_svd", {"density": 0.5, "mean": "count"}),
    "magnitude_prune": ("magnitude_prune_svd", {"density": 0.2}),
}
#: Those of PEFT that need no dense SVD, so that they can be measured on the whole model.
LIGHT = ("cat", "linear")
#: Operators that never form a dense matrix; `layer_swap` is measured with half of the layers given away.
LOW_RANK = ("cat", "linear", "svd", "task_arithmetic", "smear", "layer_swap", "knots", "lego")


def bench_blend(shape: Shape, dense_layers: int, rounds: int, peft: bool, tell: Tell) -> dict[str, Any]:
    """Figures of all operators.

    `seconds` operator -> median of `rounds` for operators in low rank, one measurement for others; `measured` how many
    modules that was for, of `modules`: all for operators in low rank, `dense_layers` layers of them, or when that is 0
    the one d x d module for others; this too for operators with statistics, which are as large as the model.
    `module_seconds` is for the one module with all operators. `ratios` "svd/peft": our seconds over PEFT's, under 1
    when ours is quicker; `compared` both figures and the modules. `cpu_seconds`, `module_cpu_seconds` and `cpu_ratios`
    count processor time, which other work on the machine does not stretch.
    """
    with tempfile.TemporaryDirectory(prefix="moerge-bench-") as name:
        folder = Path(name)
        selected = select(folder, shape, dense_layers)
        merged, measured, one = ours(folder, selected, shape, rounds, tell)
        compared = compare(folder, selected, shape, rounds, tell) if peft else {}
    return {
        "shape": asdict(shape),
        "cores": os.cpu_count(),
        "modules": len(shape.modules()),
        "scaled": False,
        "seconds": {operator: each.seconds for operator, each in merged.items()},
        "cpu_seconds": {operator: each.cpu for operator, each in merged.items()},
        "measured": measured,
        "module_seconds": {operator: each.seconds for operator, each in one.items()},
        "module_cpu_seconds": {operator: each.cpu for operator, each in one.items()},
        "ratios": {f"{operator}/peft": each["ours"] / each["peft"] for operator, each in compared.items()},
        "cpu_ratios": {f"{operator}/peft": each["ours_cpu"] / each["peft_cpu"] for operator, each in compared.items()},
        "compared": compared,
    }


def ours(
    folder: Path, selected: Selected, shape: Shape, rounds: int, tell: Tell
) -> tuple[dict[str, Taken], dict[str, int], dict[str, Taken]]:
    """Of each operator: seconds, for how many modules that was, and seconds for the one module."""
    merged: dict[str, Taken] = {}
    measured: dict[str, int] = {}
    one: dict[str, Taken] = {}
    swapped = {"whole": f"0-{max(shape.layers // 2 - 1, 0)}", "module": "0"}  # the first member's layers

    def settings(operator: str, selection: str) -> dict[str, Any]:
        return {"layers": {"member0": swapped[selection]}} if operator == "layer_swap" else {}

    for operator, declared in OPERATORS.items():
        tell(f"{operator} ...")
        members = [with_statistics(each, declared.statistic, shape.d) for each in selected["module"].members]
        one[operator] = merge(folder / "blend", members, operator, settings(operator, "module"), shape, 1)
        low = operator in LOW_RANK
        if declared.statistic is not None or not (low or "layers" in selected):
            merged[operator], measured[operator] = one[operator], 1
            continue
        modules, members = selected["whole" if low else "layers"]
        chosen = settings(operator, "whole")
        merged[operator] = merge(folder / "blend", members, operator, chosen, shape, rounds if low else 1)
        measured[operator] = len(modules)
    return merged, measured, one


def select(folder: Path, shape: Shape, dense_layers: int) -> Selected:
    """The selections, with members that have these modules; `layers` are the dense ones that were asked for."""
    first = next(iter(shape.modules()))
    modules: dict[str, Modules] = {
        "whole": shape.modules(),
        "module": {first: (shape.d, shape.d)},
        "half": {first: (shape.d // 2, shape.d // 2)},
    }
    if dense_layers:
        modules["layers"] = shape.modules(dense_layers)
    return {name: Selection(these, write_members(folder / name, these, shape)) for name, these in modules.items()}


def with_statistics(member: Part, kind: str | None, d: int) -> Part:
    """A member of the one module with random statistics of this kind: a Gram matrix, or squares."""
    if kind is None:
        return member
    values = torch.randn(d, d, generator=torch.Generator().manual_seed(int(member.digest, 16)))
    statistic = values @ values.mT / d if kind == "gram" else values.square_()
    return replace(member, tensors={kind: {"model.layers.0.self_attn.q_proj": statistic}})


def compare(folder: Path, selected: Selected, shape: Shape, rounds: int, tell: Tell) -> dict[str, dict[str, float]]:
    """Operator -> seconds of `ours` and of `peft` for the same `modules`."""
    compared = {}
    for operator, (kind, settings) in PEFT.items():
        tell(f"{operator}, by PEFT ...")
        light = operator in LIGHT
        modules, members = selected["whole" if light else "module" if operator == "svd" else "half"]
        settings = settings if light else {**settings, "rank": shape.rank}
        ours = merge(folder / "blend", members, operator, settings, shape, rounds)
        theirs = by_peft(members, modules, kind, settings.get("density"), shape)
        compared[operator] = {
            "ours": ours.seconds,
            "ours_cpu": ours.cpu,
            "peft": theirs.seconds,
            "peft_cpu": theirs.cpu,
            "modules": len(modules),
            "d": next(iter(modules.values()))[1],
        }
    return compared


def write_members(folder: Path, modules: Mapping[str, tuple[int, int]], shape: Shape) -> list[Part]:
    """Random adapters with these modules."""
    found = []
    for k in range(shape.members):
        path = folder / f"member{k}"
        path.mkdir(parents=True)
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (d_out, d_in) in modules.items():
            shapes[f"base_model.model.{module}.lora_A.weight"] = (shape.rank, d_in)
            shapes[f"base_model.model.{module}.lora_B.weight"] = (d_out, shape.rank)
        write_tensors(path / WEIGHTS, shapes, random_tensors(shapes, k))
        config = {
            "peft_type": "LORA",
            "r": shape.rank,
            "lora_alpha": 2 * shape.rank,
            "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        }
        (path / CONFIG).write_text(json.dumps(config))
        found.append(Part(id=f"member{k}", digest=f"{k:064x}", path=path))
    return found


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for each in shapes.values():
        yield torch.randn(each, generator=generator) * 0.02


def merge(
    folder: Path, members: list[Part], operator: str, settings: dict[str, Any], shape: Shape, rounds: int
) -> Taken:
    """Median seconds from the members' folders to the blend's; what takes long is measured once."""
    taken = []
    for _ in range(rounds):
        began, cpu = time.perf_counter(), time.process_time()
        blend(folder, members, weights_of(shape), operator, settings, max_rank=shape.members * shape.rank)
        taken.append(Taken(time.perf_counter() - began, time.process_time() - cpu))
        shutil.rmtree(folder)
        if taken[0].seconds > LONG:
            break
    return Taken(statistics.median(each.seconds for each in taken), statistics.median(each.cpu for each in taken))


def weights_of(shape: Shape) -> list[float]:
    return [1 / shape.members] * shape.members


def by_peft(
    members: list[Part], modules: Mapping[str, tuple[int, int]], kind: str, density: float | None, shape: Shape
) -> Taken:
    """Seconds that `add_weighted_adapter` takes, with the members in memory. Its SVD is told to be the reduced one."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    targets = sorted({path.rpartition(".")[2] for path in modules})
    config = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=targets)
    model = PeftModel(empty_model(modules), config, adapter_name=members[0].id)
    for member in members[1:]:
        model.add_adapter(member.id, config)
    for member in members:
        set_peft_model_state_dict(model, load_file(member.path / WEIGHTS), adapter_name=member.id)
    options: dict[str, Any] = {"density": density} if density is not None else {}
    if kind.endswith("svd"):
        options["svd_full_matrices"] = False
    names = [member.id for member in members]
    began, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        model.base_model.add_weighted_adapter(names, weights_of(shape), "merged", combination_type=kind, **options)
    return Taken(time.perf_counter() - began, time.process_time() - cpu)


def empty_model(modules: Mapping[str, tuple[int, int]]) -> torch.nn.Module:
    """Linear layers in these places. Nobody reads their weights, so they are never written: no memory is touched."""
    base = torch.nn.Module()
    for path, (d_out, d_in) in modules.items():
        place = base
        *parents, last = path.split(".")
        for name in parents:
            if not hasattr(place, name):
                place.add_module(name, torch.nn.Module())
            place = place.get_submodule(name)
        with torch.device("meta"):
            linear = torch.nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16)
        place.add_module(last, linear.to_empty(device="cpu"))
    return base
