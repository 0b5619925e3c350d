"""PET's training step beside that of `mtt train`, in one process.

Usage: python -m benchmarks.pet OUT.jsonl [--precision fp32] [--cases water-4 water-16 g2-64]
    [--size default] [--warm] [--kernels auto]

Energies and forces of water boxes (192 atoms) and of ASE's g2 molecules, at random labels; the same
weights, batches and TF32 setting for all. Upstream's step is the body of its trainer's loop:
evaluate_model, averages, loss, backward, clip_grad_norm_, Adam, and the loss read on the host;
without the metrics that it logs in some epochs. `step_ms` begins with the batch on the device,
`from_host_ms` with the batch as a loader's worker leaves it. `floor_ms` is what the step's matrix
products take at the peak rate. fastft compiles from an empty cache, unless --warm, and fills its
batches up; `filled` counts these atoms. `graphs` are compiled, `forms` have a CUDA graph each.
"""

import argparse
import copy
import functools
import gc
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import ase
import ase.collections
import ase.io
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from metatrain.pet import PET
from metatrain.utils.additive import get_remove_additive_transform
from metatrain.utils.data import CollateFn, get_dataset, unpack_batch
from metatrain.utils.evaluate_model import evaluate_model
from metatrain.utils.loss import LossAggregator
from metatrain.utils.neighbor_lists import (
    get_requested_neighbor_lists,
    get_system_with_neighbor_lists_transform,
)
from metatrain.utils.omegaconf import expand_dataset_config
from metatrain.utils.per_atom import average_by_num_atoms
from metatrain.utils.scaler import get_remove_scale_transform
from metatrain.utils.transfer import batch_to
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.breakdown import break_down
from benchmarks.models import trainer_step
from benchmarks.timing import time_steps
from benchmarks.training import CLIP, DEVICE, STEPS, Records, measure, measure_trainer
from fastft.adapters.pet import PetAdapter, PetOptions
from fastft.adapters.pet.baseline import fit_baseline
from fastft.adapters.pet.fused import use_kernels
from fastft.config import DataSource, OptimConfig, ScheduleConfig
from fastft.graphs.choose import choose_graph, first_alike
from fastft.graphs.forms import StepGraphs
from fastft.graphs.record import make_record_on_gpu
from fastft.memory.meter import DeviceMeter
from fastft.precision import make_precision
from fastft.profiling.compiled import graph_count
from fastft.profiling.flops import peak_flops
from fastft.runfile import parse
from fastft.step import TrainingStep
from fastft.task import Batch, Task

# At this rate an update does all its work and moves no weight, so that all see the same.
OPTIM = OptimConfig(name="adam", lr=1e-30, schedule=ScheduleConfig(name="constant"))
# Structures, and how many of them a batch takes.
CASES = {"water-4": ("water", 4), "water-16": ("water", 16), "g2-64": ("g2", 64)}
SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": {"d_pet": 8, "d_head": 8, "d_node": 8, "d_feedforward": 8, "num_heads": 2},
}
POOL = 4
# Relative, of losses and of gradient norms.
TOLERANCES = {"fp32": (1e-4, 1e-3), "tf32": (2e-3, 2e-2)}


def make_frames(kind: str, count: int) -> list[ase.Atoms]:
    """Structures with random labels; those of molecules repeat, each time rattled anew."""
    random = np.random.default_rng(0)
    molecules = [ase.collections.g2[name] for name in ase.collections.g2.names]
    frames = []
    for index in range(count):
        if kind == "water":
            frame = make_water(random)
        else:
            frame = cast(ase.Atoms, molecules[index % len(molecules)]).copy()
            frame.info.clear()
            frame.arrays = {name: frame.arrays[name] for name in ("numbers", "positions")}
        frame.positions += random.normal(scale=0.02, size=(len(frame), 3))
        energy = float(-10.0 * frame.numbers.sum() + random.normal() * len(frame))
        forces = random.normal(size=(len(frame), 3))
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
        frames.append(frame)
    return frames


def make_water(random: np.random.Generator) -> ase.Atoms:
    """64 molecules at 1 g/cm3, turned at random on a lattice and moved by 0.3 angstrom."""
    length = 12.42
    corners = np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3) * length / 4
    angle = np.deg2rad(104.52)
    molecule = 0.9572 * np.array([[0, 0, 0], [1, 0, 0], [np.cos(angle), np.sin(angle), 0]])
    turned = [molecule @ np.linalg.qr(random.normal(size=(3, 3)))[0] for _ in corners]
    moved = corners + random.normal(scale=0.3, size=corners.shape)
    positions = (np.stack(turned) + moved[:, None]).reshape(-1, 3)
    return ase.Atoms("OHH" * 64, positions, cell=[length] * 3, pbc=True)


def draw(size: int, count: int) -> list[list[int]]:
    """Which structures each batch of an epoch takes."""
    return np.random.default_rng(1).permutation(size * count).reshape(count, size).tolist()


class Upstream:
    """The body of the loop of metatrain's trainer, over a copy of a task's model."""

    def __init__(self, model: PET, device: torch.device) -> None:
        self._device = device
        self.model = copy.deepcopy(model).to(device)
        for module in self.model.modules():
            # Those that fastft has set.
            vars(module).pop("forward", None)
        cast(Any, self.model.additive_models[0]).sync_tensor_maps()
        cast(Any, self.model.scaler).sync_tensor_maps()
        self.model.train()
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=OPTIM.lr)
        self._infos: dict[str, Any] = {}

    def batches(self, file: Path, chosen: Sequence[Sequence[int]]) -> list[Any]:
        """As its loader's workers make them, without turning structures."""
        entry = {
            "quantity": "energy",
            "read_from": str(file),
            "reader": "ase",
            "key": "energy",
            "unit": "eV",
            "forces": {"read_from": str(file), "reader": "ase", "key": "forces"},
            "stress": False,
        }
        systems = {"read_from": str(file), "reader": "ase", "length_unit": "angstrom"}
        config = OmegaConf.create({"systems": systems, "targets": {"energy": entry}})
        dataset, self._infos, _ = get_dataset(expand_dataset_config(config)[0])
        here = copy.deepcopy(self.model).to("cpu")
        cast(Any, here.additive_models[0]).weights_to(device="cpu", dtype=torch.float64)
        cast(Any, here.scaler).scales_to(device="cpu", dtype=torch.float64)
        collate = CollateFn(
            target_keys=["energy"],
            callables=[
                get_system_with_neighbor_lists_transform(get_requested_neighbor_lists(here)),
                get_remove_additive_transform(list(here.additive_models), self._infos),
                get_remove_scale_transform(here.scaler),
            ],
        )
        return [collate([dataset[i] for i in each]) for each in chosen]

    def load(self, batch: Any) -> tuple[Any, Any, Any]:
        """A batch on the device."""
        dtype = next(self.model.parameters()).dtype
        return batch_to(*unpack_batch(batch), dtype=dtype, device=self._device)

    def gradients(self, batch: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
        """Loss and the norm of its gradients, which it leaves clipped."""
        systems, targets, extra = batch
        infos = {name: self._infos[name] for name in targets}
        made = evaluate_model(self.model, systems, infos, is_training=True)
        made = average_by_num_atoms(made, systems, [])
        targets = average_by_num_atoms(targets, systems, [])
        made = cast(Any, self.model.scaler).apply_scales(
            systems, made, remove=False, use_per_target_scales=False, use_per_property_scales=True
        )
        loss = LossAggregator(targets=infos, config=cast(Any, {}))(made, targets, extra)
        loss.backward()
        return loss.detach(), nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self._optimizer.zero_grad()

    def __call__(self, batch: tuple[Any, Any, Any]) -> float:
        """One step."""
        self.zero_grad()
        loss, _ = self.gradients(batch)
        self._optimizer.step()
        return loss.item()


def median_ms(run: Callable[[int], object]) -> float:
    """Of a step, called with its number; the first finds a host that is not yet ahead."""
    return round(statistics.median(time_steps(run, STEPS + 1)[1:]), 2)


def measure_upstream(step: Upstream, packed: list[Any]) -> dict[str, Any]:
    """Upstream's row."""
    batches = [step.load(batch) for batch in packed]

    def gradients(batch: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
        step.zero_grad()
        return step.gradients(batch)

    row = measure(gradients, step, batches)
    host = median_ms(lambda i: step(step.load(packed[i % len(packed)])))
    return {**row, "from_host_ms": host}


def measure_fastft(step: TrainingStep, hosted: list[Batch]) -> dict[str, Any]:
    """fastft's row, with what compiling took, and where a step's time goes."""
    before, began = graph_count(), time.perf_counter()
    batches = [batch.to(DEVICE) for batch in hosted]
    for batch in batches:
        with step.rehearsal():
            step(0, [batch])
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    row = measure_trainer(step, batches)
    host = median_ms(lambda i: step(0, [hosted[i % len(hosted)].to(DEVICE)]))
    graphs = graph_count() - before
    compile_s = round(seconds - len(batches) * row["step_ms"] / 1e3, 1) if graphs else 0.0
    widths = sorted({batch["grid"].shape[1] for batch in batches})
    return {
        **row,
        "from_host_ms": host,
        "compile_s": compile_s,
        "graphs": graphs,
        "neighbours": widths,
        "atoms": [len(batch["positions"]) for batch in batches],
        "filled": [int((b["system"] == len(b["atoms"]) - 1).sum()) for b in batches],
        **break_down(lambda: step(0, batches[:1]), step.precision.name),
    }


def measure_captured(step: TrainingStep, hosted: list[Batch], forms: int) -> dict[str, Any]:
    """The row of a step that replays CUDA graphs."""
    before = graph_count()
    # As the trainer does: of what uncaptured steps took.
    gc.collect()
    torch.cuda.empty_cache()
    row = measure_trainer(step, [batch.to(DEVICE) for batch in hosted])
    host = median_ms(lambda i: step(0, [hosted[i % len(hosted)].to(DEVICE)]))
    return {**row, "from_host_ms": host, "graphs": graph_count() - before, "forms": forms}


def capture(step: TrainingStep, batches: list[Batch]) -> tuple[StepGraphs | None, str]:
    """CUDA graphs of all batches' forms where `step.cuda_graphs` would, and what was decided."""
    steps = [[batch] for batch in batches]
    # Where no two are alike, one with itself.
    alike = first_alike([*steps, *steps])
    assert alike is not None
    graphs, decision = choose_graph(
        step,
        alike,
        10_000,
        record=make_record_on_gpu(DEVICE),
        fits=lambda: True,
        meter=DeviceMeter(DEVICE),
        say=print,
    )
    if graphs is not None:
        for each in (*steps, *steps):
            graphs.takes(each)
    return graphs, decision


class MatmulFlops(TorchDispatchMode):
    """Counts what matrix products compute. torch's own FlopCounterMode cannot see a loss that takes
    derivatives of a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def matmul_flops(task: Task, batch: Batch) -> int:
    """Of one step, eager."""
    with MatmulFlops() as counter:
        task.loss(task.model, batch).total.backward()
    task.model.zero_grad()
    return counter.total


def make_task(adapter: PetAdapter, samples: Sequence[Any], device: torch.device) -> Task:
    """Always the same weights."""
    torch.manual_seed(0)
    task = adapter.build(None, device=device, checkpoint=None, pretrained=False)
    fit_baseline(cast(PET, task.model), "energy", samples)
    return task


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[PetAdapter, dict[str, Any]]:
    """An adapter of all elements, and the structures' files by kind."""
    files, elements = {}, set()
    for kind in dict.fromkeys(CASES[case][0] for case in arguments.cases):
        sizes = [CASES[case][1] for case in arguments.cases if CASES[case][0] == kind]
        frames = make_frames(kind, POOL * max(sizes))
        files[kind] = folder / f"{kind}.xyz"
        ase.io.write(files[kind], frames, format="extxyz")
        elements |= {symbol for frame in frames for symbol in frame.symbols}
    # Upstream's are not turned.
    options = {"hypers": SIZES[arguments.size], "elements": sorted(elements)}
    options |= {"augment": False, "fill_batches": True}
    return PetAdapter(parse(PetOptions, options, key="model.options")), files


def main() -> None:
    """Upstream on every case, then fastft, uncaptured and captured."""
    parser = argparse.ArgumentParser(description="PET beside metatrain's own step.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", choices=TOLERANCES, default="fp32")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--kernels", choices=["off", "auto"], default="auto", help="of fastft's")
    arguments = parser.parse_args()
    precision = arguments.precision
    inductor = cast(Any, importlib.import_module("torch._inductor.config"))
    inductor.force_disable_caches = not arguments.warm
    make_precision(precision, DEVICE)
    adapter, files = prepare(arguments, Path(tempfile.mkdtemp()))
    data = {
        kind: adapter.dataset(DataSource(path=file, name=kind), "validation")
        for kind, file in files.items()
    }
    task = make_task(adapter, [sample for each in data.values() for sample in each.samples], DEVICE)
    upstream = Upstream(cast(PET, task.model), DEVICE)
    peak = peak_flops(torch.cuda.get_device_name(DEVICE), precision)
    records: dict[str, Records] = {}
    hosted: dict[str, list[Batch]] = {}
    for case in arguments.cases:
        kind, size = CASES[case]
        chosen = draw(size, POOL)
        made = [[adapter.transform(data[kind][i], "train") for i in each] for each in chosen]
        hosted[case] = [Batch(adapter.collate(each), size).pin_memory() for each in made]
        # Of what is asked for, without the atoms that fill up.
        unfilled = [adapter.transform(data[kind][i], "validation") for i in chosen[0]]
        flops = matmul_flops(task, Batch(adapter.collate(unfilled), size).to(DEVICE))
        title = f"pet, {arguments.size}, {case}, {precision}"
        tolerances = TOLERANCES[precision]
        records[case] = Records(title, size, flops, arguments.out, precision, tolerances)
        packed = upstream.batches(files[kind], chosen)
        floor = None if peak is None else round(1e3 * flops / peak, 3)
        records[case].add(
            "metatrain", functools.partial(measure_upstream, upstream, packed), floor_ms=floor
        )
    del upstream
    gc.collect()
    torch.cuda.empty_cache()
    if arguments.kernels == "auto":
        use_kernels(task.model)
    step, _ = trainer_step(task, DEVICE, OPTIM, CLIP, precision=precision, compile="blocks")
    before = graph_count()
    for case, batches in hosted.items():
        records[case].add("fastft", functools.partial(measure_fastft, step, batches))
    print(f"graphs for all batches of {', '.join(hosted)}: {graph_count() - before}")
    for case, batches in hosted.items():
        here = [batch.to(DEVICE) for batch in batches]
        step.graph, decision = capture(step, here)
        print(case, decision, flush=True)
        if step.graph is not None:
            run = functools.partial(measure_captured, step, batches, step.graph.count)
            records[case].add("fastft, CUDA graph", run)
            step.graph = None
    for each in records.values():
        Console(width=150).print(each.table())
    if wrong := [line for each in records.values() for line in each.wrong]:
        sys.exit("\n".join(["losses differ:", *wrong]))


if __name__ == "__main__":
    main()
