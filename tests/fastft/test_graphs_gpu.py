"""Captured steps on a GPU: the same bits as uncaptured ones, and nothing left of a refusal."""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from no_bytes import NoBytes
from torch import Tensor, nn
from torch.nn import functional

from fastft.blocks import compile_task
from fastft.checkpoint import latest_checkpoint, load_checkpoint
from fastft.config import GradientsConfig, OptimConfig
from fastft.fused import Kernels
from fastft.graphs.choose import choose_graph
from fastft.graphs.forms import StepGraphs
from fastft.graphs.record import make_record_on_gpu
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import Batch, Block, Loss, Task

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


class Layer(nn.Module):
    """No attention, whose backward pass adds in no fixed order."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.2)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Blocks with dropout, running statistics, and a parameter without a gradient.

    Args:
        odd: called in each forward pass with the model's output.
    """

    def __init__(self, odd: Callable[["Net", Tensor], Any] | None = None) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, 64), nn.BatchNorm1d(64)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))
        self.head, self.spare = nn.Linear(64, 4), nn.Parameter(torch.ones(3))
        self.odd, self.calls = odd, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.head(x)
        if self.odd is not None:
            self.odd(self, x)
        return x


def loss(model: nn.Module, batch: Batch) -> Loss:
    logits = model(batch["inputs"]).float()
    total = functional.cross_entropy(logits, batch["targets"])
    return Loss(total, {"largest": logits.detach().amax()})


def make_step(
    precision: str = "fp32",
    mode: str = "off",
    optim: str = "adamw",
    odd: Callable[[Net, Tensor], Any] | None = None,
) -> TrainingStep:
    torch.manual_seed(0)
    model = Net(odd).to(CUDA)
    blocks = [Block(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    task, config = Task(model, loss, blocks), OptimConfig(lr=0.01, name=optim)  # pyright: ignore
    chosen = make_precision(precision, CUDA)
    compile_task(task, mode, chosen)
    kernels = Kernels(adam=optim == "adamw", norm=True)
    optimizer = Optimizer(make_groups(task, config, {}), config, 100, kernels)
    return TrainingStep(task, optimizer, None, GradientsConfig(clip_norm=1.0), chosen, kernels)


def micro_batches(seed: int, count: int = 2, size: int = 32) -> list[Batch]:
    generator = torch.Generator(CUDA).manual_seed(seed)
    found = []
    for _ in range(count):
        inputs = torch.randn(size, 8, generator=generator, device=CUDA)
        found.append(Batch({"inputs": inputs, "targets": inputs[:, :4].argmax(1)}, size))
    return found


class CapturedIsFaster(NoBytes):
    """A clock that lets the graph be used; it makes each call."""

    def __init__(self) -> None:
        self._turn = 0

    def seconds(
        self, call: Callable[[], object], repeats: int, *, host_ahead: bool = False
    ) -> float:
        call()
        self._turn += 1
        return 2.0 if self._turn % 2 else 1.0


def choose(
    step: TrainingStep, fits: Callable[[], bool] = lambda: True, size: int = 32
) -> tuple[StepGraphs | None, str]:
    found = choose_graph(
        step,
        [micro_batches(100, size=size), micro_batches(101, size=size)],
        100,
        record=make_record_on_gpu(CUDA),
        fits=fits,
        meter=CapturedIsFaster(),
        say=lambda text: None,
    )
    step.optimizer.forget()
    return found


# Of ten steps; batches of 16 are met once.
SIZES = (32, 24, 32, 24, 16, 32, 24, 24, 32, 32)


def train_ten_steps(step: TrainingStep) -> dict[str, Any]:
    """Losses, norms, weights, optimizer and generator, with batches of three shapes."""
    torch.manual_seed(1)
    results = [step(index, micro_batches(index, size=size)) for index, size in enumerate(SIZES)]
    return {
        "losses": torch.stack([result.loss for result in results]),
        "parts": torch.stack([result.parts["largest"] for result in results]),
        "norms": torch.stack([result.verdict.norm for result in results]),
        "scale": step.guard.scale.clone(),
        "skipped": step.guard.counters()["skipped"],
        **step.task.model.state_dict(),
        **{
            f"{name} {key}": value
            for name, state in step.optimizer.state_dict().items()
            for key, value in state.items()
        },
        "random": torch.cuda.get_rng_state(CUDA),
        "untouched": step.untouched_names(),
    }


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True)
        else:
            assert value == theirs[name], name


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("mode", ["off", "blocks"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_captured_steps_are_uncaptured_steps(precision: str, mode: str, optim: str) -> None:
    """With dropout and two micro-batches; fp16 overflows at first, and its scale falls.

    One of two graphs is captured on the way, and they take turns in one memory.
    """
    plain, captured = (make_step(precision, mode, optim) for _ in range(2))
    captured.graph, decision = choose(captured)
    assert captured.graph is not None, decision
    expected = train_ten_steps(plain)
    assert_same_bits(train_ten_steps(captured), expected)
    assert isinstance(captured.graph, StepGraphs)
    assert captured.graph.count == 2
    assert expected["untouched"] == ["spare"]


def count(model: Net, x: Tensor) -> None:
    model.calls += 1


def read(model: Net, x: Tensor) -> None:
    x.sum().item()


def wait(model: Net, x: Tensor) -> None:
    # Not forbidden by torch's debug mode: CUDA refuses it in the middle of the capture.
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (count, "each step changes 'calls'"),
        (read, "it cannot be captured: called a synchronizing CUDA operation"),
        (read, ", x.sum().item())"),
        (wait, "it cannot be captured: "),
    ],
)
def test_a_refused_step_goes_on_as_if_it_had_never_been_tried(odd: Any, reason: str) -> None:
    plain, refused = make_step(odd=odd), make_step(odd=odd)
    expected = train_ten_steps(plain)
    graph, decision = choose(refused)
    assert graph is None
    assert decision.startswith("not used, because ")
    assert reason in decision
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert_same_bits(train_ten_steps(refused), expected)
    # The allocator can still give memory back.
    free = torch.empty(2**26, device=CUDA)
    before = torch.cuda.memory_reserved(CUDA)
    del free
    assert reserved() < before


def reserved() -> int:
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(CUDA)


def test_a_graph_that_is_not_used_leaves_no_memory() -> None:
    step, held = make_step(), []

    def fits() -> bool:
        held.append(reserved())
        return False

    with step.rehearsal():
        step(0, micro_batches(0))
    step.optimizer.forget()
    before = reserved()
    graph, decision = choose(step, fits, size=2**16)
    assert graph is None
    assert "too little memory" in decision
    assert held[0] > before + 2**27
    assert reserved() < before + 2**24


def test_replayed_steps_do_not_wait_for_the_device() -> None:
    step = make_step("bf16")
    step.graph, _ = choose(step)
    batches = micro_batches(0)
    step(0, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(1, 4):
            step(index, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_of_two_forms_share_memory() -> None:
    step = make_step()
    step.graph, decision = choose(step, size=2**16)
    assert step.graph is not None, decision
    before = reserved()
    for index in range(2):
        step(index, micro_batches(index, size=2**16 - 2**12))
    assert step.graph.count == 2
    # Gradients are its own, and what it reads; activations take more than twice this.
    assert reserved() < before + 2**26


@pytest.mark.parametrize("sooner", [True, False])
def test_too_little_memory_for_another_form_gives_all_of_it_back(
    monkeypatch: pytest.MonkeyPatch, sooner: bool
) -> None:
    """In the capture, or when the step is run uncaptured beside it."""
    plain, step, said = make_step(), make_step(), []
    step.graph, _ = choose(step)
    assert step.graph is not None
    monkeypatch.setattr(step.graph, "_say", said.append)
    count = 0

    def loss_of(model: nn.Module, batch: Batch) -> Loss:
        nonlocal count
        count += batch.size == 24
        # Of two micro-batches: the uncaptured step, two trials, three warm-ups, the capture.
        if count == (13 if sooner else 15):
            torch.empty(2**50, device=CUDA)
        return loss(model, batch)

    step.task = dataclasses.replace(step.task, loss=loss_of)
    expected = train_ten_steps(plain)
    assert_same_bits(train_ten_steps(step), expected)
    assert step.graph.count == 0
    assert len(said) == 1
    assert "too little memory" in said[0]
    free = torch.empty(2**26, device=CUDA)
    before = torch.cuda.memory_reserved(CUDA)
    del free
    assert reserved() < before


MODEL = """\
from torch import nn


def build():
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2)) for _ in range(8)]
    return nn.Sequential(nn.Linear(4, 32), *blocks, nn.Linear(32, 3))
"""
AUTO = "step.cuda_graphs=auto"
SETTINGS = ("run.device=cuda", "optim.schedule.name=constant", "step.accumulate=2")
USED = "step.cuda_graphs: used; a step takes"


def weights(folder: str) -> dict[str, Tensor]:
    latest = latest_checkpoint(Path(folder))
    assert latest is not None
    return dict(load_checkpoint(latest).model)


def test_a_resumed_run_is_an_uncaptured_one(project: Path, fastft: Any) -> None:
    Path("model.py").write_text(MODEL)
    command = ("train", "run.toml", *SETTINGS)
    first = fastft(*command, AUTO, "run.steps=4")
    assert first.code == 0, first.errors
    assert USED in first.output
    again = fastft(*command, AUTO, "run.steps=8", "checkpoint.resume=auto")
    assert again.code == 0, again.errors
    assert USED in again.output
    assert fastft(*command, "run.steps=8", "run.folder=plain").code == 0
    assert_same_bits(weights("run"), weights("plain"))


def test_a_profile_shows_the_replay(project: Path, fastft: Any) -> None:
    Path("model.py").write_text(MODEL)
    outcome = fastft("train", "run.toml", "--profile", *SETTINGS, AUTO, "run.steps=16")
    assert outcome.code == 0, outcome.errors
    assert USED in outcome.output
    report = json.loads(Path("run/profile/report.json").read_text())
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert phases["graph"]["gpu_ms"] > 0
    assert phases["forward"]["host_ms"] == 0
