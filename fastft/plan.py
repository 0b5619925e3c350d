"""`fastft plan`: what a run's blocks would keep inside each of several budgets."""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fastft_kernels.device import pretend_gpu
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from fastft.assemble import assemble, build_step
from fastft.blocks import KEEP, BlockForwards
from fastft.compiling import recompile_limit_explained
from fastft.config import RunConfig, parse_bytes
from fastft.data import open_loader
from fastft.errors import ConfigError, PlanError
from fastft.finetune import set_train_mode, staged_names
from fastft.memory.budget import GIB, budget_bytes, nothing_fits, planned_room
from fastft.memory.fake import (
    FakeMeter,
    Unfilled,
    a100,
    estimate_costs,
    fake_batch,
    make_fake,
    on_fake_tensors,
)
from fastft.memory.picture import Panel, draw_timeline
from fastft.memory.plan import measure_costs, picked
from fastft.memory.saved_plan import Plan
from fastft.memory.solve import Solution, StepCosts, host_bytes, smallest_peak, solve
from fastft.runtime import open_run
from fastft.step import Ema, TrainingStep
from fastft.task import Batch, Task

# What CUDA's context, its libraries and their workspaces take of a GPU; a guess for an A100.
_CONTEXT_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Measured:
    """A run's costs, and what they were measured with.

    Attributes:
        batches: those of a step, two of them at most.
        outside_bytes: what is taken of a GPU outside of torch's allocator.
        total_bytes: of the GPU; None without one.
        accumulate: micro-batches of a step.
        precision: of the run, which may be tf32 where the step has fp32.
        how: what to say about the numbers.
    """

    costs: StepCosts
    step: TrainingStep
    batches: Sequence[Batch]
    outside_bytes: int
    total_bytes: int | None
    accumulate: int
    precision: str
    how: Sequence[str]

    @property
    def title(self) -> str:
        """What was planned for."""
        size = self.batches[0].size
        batch = (
            f"batch of {size}" if self.accumulate == 1 else f"{self.accumulate} x {size} samples"
        )
        return f"{len(self.costs.blocks)} blocks, {batch}, {self.precision}"

    def step_seconds(self, solution: Solution) -> float:
        """Of the whole step: micro-batches beyond the second are taken to be like the others."""
        update = self.costs.update_seconds
        return update + (solution.seconds - update) * self.accumulate / len(self.batches)


@dataclass(frozen=True)
class Answer:
    """One row: a budget, what torch's allocator may take of it, and the plan if one fits."""

    label: str
    limit_bytes: int
    solution: Solution | None


def plan(
    config: RunConfig,
    console: Console,
    *,
    budgets: Sequence[str] = (),
    no_device: bool = False,
    out: Path | None = None,
) -> None:
    """Measures a run's step, solves for each budget, shows a table and writes plans and a picture.

    Args:
        budgets: as '80GB'; none: the run file's, else the GPU's memory.
        no_device: estimate on fake tensors, without a GPU.
        out: folder for the plans and the picture; None: `plan` in the run folder.

    Raises:
        PlanError: no budget fits, or the model has no blocks to choose for.
    """
    if config.data.batch_size == "fit":
        raise PlanError(
            "data.batch_size: must be a number for a plan; got 'fit'; set it, as"
            " data.batch_size=8 behind the run file"
        )
    wanted = _parse(budgets, config, no_device=no_device)
    if config.step.compile == "model":
        raise PlanError(
            "step.compile: must be 'blocks' or 'off' for a plan; got 'model', where no block is"
            " left to choose for; change it"
        )
    measured = _estimate(config) if no_device else _measure(config, wanted)
    if not wanted:
        assert measured.total_bytes is not None
        wanted = {f"{measured.total_bytes / GIB:.1f}GiB": measured.total_bytes}
    answers = []
    for label, size in wanted.items():
        limit = max(0, size - measured.outside_bytes)
        solution = solve(measured.costs, planned_room(limit))
        answers.append(Answer(label, limit, solution))
    missed = [answer for answer in answers if answer.solution is None]
    advice = {
        answer.label: nothing_fits(
            measured.step, measured.costs, measured.batches, answer.limit_bytes
        )
        for answer in missed
    }
    if len(missed) == len(answers):
        raise PlanError([f"{label}: {line}" for label, lines in advice.items() for line in lines])
    console.print(_table(measured, answers))
    for note in measured.how:
        console.print(note, markup=False, highlight=False)
    for label, lines in advice.items():
        console.print("\n".join([f"{label}: nothing fits", *lines]), markup=False, highlight=False)
    folder = out or config.run.folder / "plan"
    written = _write(folder, measured, answers)
    console.print(
        "\n".join(f"written: {path}" for path in written),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _parse(budgets: Sequence[str], config: RunConfig, *, no_device: bool) -> dict[str, int]:
    """Budget as typed -> bytes; empty: what the GPU has."""
    texts = [text.strip() for text in budgets]
    if not texts and config.memory.budget is not None:
        texts = [config.memory.budget]
    found, problems = {}, []
    for text in texts:
        try:
            found[text.replace(" ", "")] = parse_bytes(text)
        except ValueError as error:
            problems.append(f"--budget: {error}; correct it")
    if no_device and not texts:
        problems.append(
            "memory.budget: must be set where there is no device to ask; got nothing; set it, or"
            " add --budget 80GB,40GB"
        )
    if problems:
        raise ConfigError(problems)
    return found


def _measure(config: RunConfig, wanted: Mapping[str, int]) -> Measured:
    """On the GPU of the run, what these budgets need; none: its memory."""
    quiet = Console(quiet=True)
    with recompile_limit_explained(), open_run(config.run, write=False) as run:
        device = run.device
        if device.type != "cuda":
            raise PlanError(
                "run.device: must be a GPU for plans that are measured; got a CPU; add --no-device"
                " for an estimate"
            )
        task, adapter = assemble(config, device, quiet)
        _require_blocks(task)
        with open_loader(adapter, config.data, seed=run.seed, device=device) as loader:
            adapter.prepare(task, loader)
            # As many as a step holds.
            held = [loader.example().to(device) for _ in range(config.accumulate)]
        step, forwards, average = _build(config, task, device, quiet)
        batches = held[:2]
        total = torch.cuda.mem_get_info(device)[1]
        outside = total - budget_bytes(None, device)
        limits = [max(0, size - outside) for size in wanted.values() or [total]]
        try:
            costs = measure_costs(step, forwards, batches, limits=limits)
        except torch.OutOfMemoryError as error:
            limit = budget_bytes(None, device)
            raise PlanError(nothing_fits(step, None, batches, limit)) from error.with_traceback(
                None
            )
        del average
        # What was compiled takes memory too.
        outside = total - budget_bytes(None, device)
    name = torch.cuda.get_device_name(device)
    settings = (config.accumulate, step.precision.name)
    return Measured(costs, step, batches, outside, total, *settings, [f"measured on {name}"])


def _estimate(config: RunConfig) -> Measured:
    """On fake tensors."""
    quiet, speed = Console(quiet=True), a100(tf32=config.step.precision == "tf32")
    meter = FakeMeter(speed)
    pretended = _as_on_gpu(config)
    with open_run(pretended.run, write=False) as run:
        with Unfilled(), pretend_gpu():
            task, adapter = assemble(pretended, run.device, quiet, pretrained=False)
        _require_blocks(task)
        with open_loader(adapter, config.data, seed=run.seed, device=run.device) as loader:
            example = loader.example()
        try:
            # What was imported has no garbage; `long_lived_apart` thaws it.
            gc.freeze()
            with on_fake_tensors(meter) as mode:
                make_fake(task.model, mode, meter)
                step, forwards, average = _build(pretended, task, run.device, quiet)
                batches = [fake_batch(example, mode, meter)] * min(2, config.accumulate)
                costs = estimate_costs(pretended, step, forwards, batches, meter)
                del average
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedOperatorException,
        ) as error:
            raise PlanError(
                "--no-device: model and loss must run on tensors without values; got"
                f" {type(error).__name__}: {error}; plan on a GPU instead"
            ) from error
    how = [
        f"an estimate without a GPU: bytes are counted on fake tensors; times are those of an"
        f" ideal {speed.name} (arithmetic at peak rate, or bytes at"
        f" {speed.bytes_per_second / 1e12:.1f} TB/s), a lower bound;"
        f" {_CONTEXT_BYTES / GIB:.2f} GiB of each budget are left to CUDA; ways that use the host's"
        " memory are left out, for their cost is up to the machine"
    ]
    if config.step.compile == "blocks":
        how.append(
            "step.compile: the blocks were counted as if it were 'off'; compiled ones keep somewhat"
            " less, and replay only plans that were measured on a GPU"
        )
    tf32 = config.step.precision == "tf32"
    settings = (config.accumulate, "tf32" if tf32 else step.precision.name)
    return Measured(costs, step, batches, _CONTEXT_BYTES, None, *settings, how)


def _as_on_gpu(config: RunConfig) -> RunConfig:
    """The settings that 'auto' would stand for on a GPU, for a model on the CPU."""
    step = config.step
    precision = {"auto": "bf16", "tf32": "fp32"}.get(step.precision, step.precision)
    fused = step.layer_norm == "auto" and step.compile == "off"
    step = dataclasses.replace(
        step,
        precision=precision,  # pyright: ignore[reportArgumentType]
        layer_norm="fused" if fused else step.layer_norm,
        compile="off",
    )
    run = dataclasses.replace(config.run, device="cpu")
    # Off a GPU it reads values, and it takes no memory.
    gradients = dataclasses.replace(config.gradients, zclip=None)
    return dataclasses.replace(config, step=step, run=run, gradients=gradients)


def _require_blocks(task: Task) -> None:
    if not task.planned_blocks:
        raise PlanError(
            "model: must have repeated blocks to choose for; the adapter names none; lower"
            " data.batch_size and raise step.accumulate to save memory"
        )


def _build(
    config: RunConfig, task: Task, device: torch.device, console: Console
) -> tuple[TrainingStep, BlockForwards, Ema | None]:
    """The step as `train` has it, with what is trained later trained already."""
    step, forwards = build_step(config, task, device, console)
    average = Ema(step.optimizer.parameters, config.ema.decay) if config.ema else None
    set_train_mode(task.model, config.finetune.method)
    for name in staged_names(task.model, config.finetune):
        step.optimizer.parameters[name].requires_grad_(True)
    return step, forwards, average


def _table(measured: Measured, answers: Sequence[Answer]) -> Table:
    costs = measured.costs
    table = Table(title=f"Memory plans: {measured.title}")
    for column in ("budget", "peak GiB", "step ms", "recompute", "host GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("blocks, in forward order", overflow="fold")
    for answer in answers:
        if answer.solution is None:
            least = f"nothing fits; the least is {smallest_peak(costs)[0] / GIB:.2f} GiB"
            table.add_row(answer.label, "-", "-", "-", "-", least)
            continue
        table.add_row(
            answer.label,
            f"{answer.solution.peak_bytes / GIB:.2f}",
            f"{measured.step_seconds(answer.solution) * 1e3:.1f}",
            f"{recompute_share(costs, answer.solution.picks):.1%}",
            f"{host_bytes(costs, answer.solution.picks) / GIB:.2f}",
            Text(describe_blocks(costs, answer.solution.picks)),
        )
    return table


def recompute_share(costs: StepCosts, picks: Sequence[int]) -> float:
    """Time that the blocks take beyond that of keeping everything, as a share of the latter."""
    kept = sum(block.choices[0].seconds for block in costs.blocks)
    chosen = sum(b.choices[pick].seconds for b, pick in zip(costs.blocks, picks, strict=True))
    return chosen / kept - 1 if kept else 0.0


def describe_blocks(costs: StepCosts, picks: Sequence[int]) -> str:
    """Runs of neighbours that do the same: '0-11: recompute all; 12-23: keep all'."""
    names = [b.choices[pick].name for b, pick in zip(costs.blocks, picks, strict=True)]
    runs: list[tuple[int, int, str]] = []
    for index, name in enumerate(names):
        if runs and runs[-1][2] == name:
            runs[-1] = (runs[-1][0], index, name)
        else:
            runs.append((index, index, name))
    return "; ".join(
        f"{first}: {name}" if first == last else f"{first}-{last}: {name}"
        for first, last, name in runs
    )


def _write(folder: Path, measured: Measured, answers: Sequence[Answer]) -> list[Path]:
    """A plan for each budget that fits, and the picture; returns what was written."""
    costs = measured.costs
    written, panels = [], []
    for answer in answers:
        label, limit, solution = answer.label, answer.limit_bytes, answer.solution
        if solution is None:
            title = f"{label}: nothing fits; the least peak"
            panels.append(Panel(title, smallest_peak(costs)[1], limit))
            continue
        seconds = measured.step_seconds(solution)
        path = folder / f"plan-{label}.json"
        # A block that is never called is not in the costs.
        ways = {block.name: KEEP.name for block in measured.step.task.blocks}
        ways.update(picked(costs, solution))
        host = host_bytes(costs, solution.picks)
        Plan(limit, ways, solution.peak_bytes, seconds, host_bytes=host).save(path)
        written.append(path)
        share = recompute_share(costs, solution.picks)
        spent = f"{share:.1%} recomputed" if share else "nothing recomputed"
        panels.append(Panel(f"{label}: {seconds * 1e3:.1f} ms, {spent}", solution.picks, limit))
    path = folder / "memory.png"
    kind = "measured" if measured.total_bytes else "estimated without a GPU"
    draw_timeline(costs, panels, path, f"Memory over one step: {measured.title}; {kind}")
    return [*written, path]
