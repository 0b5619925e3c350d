"""`fastft plan --no-device`, as it is typed: its table, its files, and what it refuses."""

import dataclasses
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastft.assemble import assemble, build_step
from fastft.memory import load_plan
from fastft.memory.solve import BlockCosts, Choice, Solution, StepCosts
from fastft.plan import Measured, describe_blocks, recompute_share
from fastft.runfile import read_run_file
from fastft.task import Batch

pytestmark = pytest.mark.usefixtures("project")

DEPTH = 6
VIT = {"patch_size": 8, "embed_dim": 192, "depth": DEPTH, "num_heads": 3}
TIMM = (
    "model.adapter=timm",
    "model.options={name='vit_tiny_patch16_224',num_classes=3,img_size=64,in_chans=1}",
    *(f"model.options.arguments.{name}={value}" for name, value in VIT.items()),
    "data.train.0.path=images.npz",
    "data.validation=[]",
    "data.batch_size=16",
)
# Of each, 600 MiB are left to CUDA.
AMPLE, TIGHT, TINY = "1GB", "700MB", "650MB"


@pytest.fixture
def plan(project: Path, fastft: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the command without a device on a small vision transformer."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(16, 1, 64, 64)).astype(np.float32)
    np.savez("images.npz", inputs=inputs, targets=np.arange(16) % 3)

    def run(*arguments: str) -> Any:
        return fastft("plan", "run.toml", *TIMM, "--no-device", *arguments)

    return run


def rows(output: str) -> list[list[str]]:
    """The table's cells, with folded lines joined."""
    found: list[list[str]] = []
    for line in output.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[0]:
                found.append(cells)
            else:
                found[-1] = [f"{a} {b}".strip() for a, b in zip(found[-1], cells, strict=True)]
    return found


def test_table_plans_and_picture(plan: Callable[..., Any]) -> None:
    outcome = plan("--budget", f"{AMPLE},{TIGHT},{TINY}")
    assert (outcome.code, outcome.errors) == (0, "")
    assert gc.isenabled()
    ample, tight, tiny = rows(outcome.output)
    assert (ample[0], ample[3:]) == (AMPLE, ["0.0%", "0.00", f"0-{DEPTH - 1}: keep all"])
    assert tight[0] == TIGHT
    assert float(tight[1]) < float(ample[1]) < 0.3
    assert float(tight[2]) >= float(ample[2]) > 0
    assert float(tight[3].rstrip("%")) > 1
    assert "recompute" in tight[5] or "keep matmuls" in tight[5]
    assert tiny[:5] == [TINY, "-", "-", "-", "-"]
    assert re.fullmatch(r"nothing fits; the least is 0\.\d\d GiB", tiny[5])
    text = outcome.output
    assert f"Memory plans: {DEPTH} blocks, batch of 16, bf16" in text
    assert "an estimate without a GPU" in text
    assert "ways that use the host's memory are left out" in text
    assert f"{TINY}: nothing fits\nmemory.budget: no plan fits 0.02 GiB" in text
    assert "finetune: method = 'lora'" in text

    written = [line.removeprefix("written: ") for line in text.splitlines() if "written:" in line]
    assert written == [
        f"run/plan/plan-{AMPLE}.json",
        f"run/plan/plan-{TIGHT}.json",
        "run/plan/memory.png",
    ]
    assert sorted(str(path) for path in Path("run").rglob("*.*")) == sorted(written)
    with Image.open(written[-1]) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 10

    config = read_run_file(Path("run.toml"), TIMM)
    task, _ = assemble(config, torch.device("cpu"), Console(quiet=True), pretrained=False)
    _, forwards = build_step(config, task, torch.device("cpu"), Console(quiet=True))
    loaded = [load_plan(Path(path), forwards) for path in written[:2]]
    for found, row in zip(loaded, (ample, tight), strict=True):
        assert f"{(found.predicted_bytes or 0) / 2**30:.2f}" == row[1]
        assert (found.predicted_bytes or 0) <= found.budget_bytes
        forwards.use(found.ways)
    assert set(loaded[1].ways.values()) != {"keep all"}


def test_a_run_replays_a_plan(plan: Callable[..., Any], fastft: Callable[..., Any]) -> None:
    outcome = plan(f"memory.budget={TIGHT}", "--out", "plans")
    assert (outcome.code, outcome.errors) == (0, "")
    assert {path.name for path in Path("plans").iterdir()} == {f"plan-{TIGHT}.json", "memory.png"}
    assert not Path("run").exists()
    trained = fastft("train", "run.toml", *TIMM, f"memory.plan=plans/plan-{TIGHT}.json")
    assert (trained.code, trained.errors) == (0, "")


@pytest.mark.parametrize(
    "settings",
    [
        ("step.compile=blocks",),
        ("step.accumulate=3", "ema.decay=0.9", "optim.moments=8bit"),
        ("gradients.zclip={}", "gradients.clip_norm=1.0", "step.precision=fp16"),
        ("step.precision=tf32", "optim.name=rmsprop"),
        ("finetune.method=probe",),
        ("finetune.method=lora", "step.layer_norm=torch"),
        ("finetune.unfreeze=[{match=['blocks.*'],at_step=1}]",),
        ("loss.penalties=[{kind='l2',match=['head.*'],weight=0.1}]",),
    ],
    ids=lambda settings: settings[0],
)
def test_every_way_to_train_has_a_plan(settings: tuple[str, ...], plan: Callable[..., Any]) -> None:
    outcome = plan("--budget", "2 GB", *settings)
    assert (outcome.code, outcome.errors) == (0, "")
    ((label, peak, milliseconds, _, _, blocks),) = rows(outcome.output)
    assert (label, blocks) == ("2GB", f"0-{DEPTH - 1}: keep all")
    assert float(peak) > 0.01
    assert float(milliseconds) > 0
    compiled = "step.compile=blocks" in settings
    assert (
        "step.compile: the blocks were counted as if it were 'off'" in outcome.output
    ) == compiled
    assert ("3 x 16 samples" in outcome.output) == ("step.accumulate=3" in settings)
    assert (", tf32" in outcome.output) == ("step.precision=tf32" in settings)
    saved = json.loads(Path("run/plan/plan-2GB.json").read_text())
    assert set(saved["ways"].values()) == {"keep all"}
    assert saved["predicted_seconds"] * 1e3 == pytest.approx(float(milliseconds), abs=0.05)


def test_nothing_fits(plan: Callable[..., Any]) -> None:
    outcome = plan("--budget", f"{TINY},100MB")
    assert outcome.code == 2
    assert outcome.output == ""
    first = (
        r"650MB: memory\.budget: no plan fits 0\.02 GiB, even with every block recomputed; weights"
        r" and gradients take 0\.\d\d GiB, the optimizer's state 0\.\d\d GiB; the least peak"
        r" is 0\.\d\d GiB"
    )
    assert re.fullmatch(first, outcome.problems[0])
    assert outcome.problems[-2].startswith("100MB: optim.moments: 'bf16' saves 0.0")
    assert not Path("run").exists()


@pytest.mark.gpu
def test_the_estimate_is_near_what_is_measured(
    plan: Callable[..., Any], fastft: Callable[..., Any]
) -> None:
    wide = ("model.options.arguments.embed_dim=768", "model.options.arguments.num_heads=12")
    estimated = plan("--budget", "20GB", *wide)
    measured = fastft("plan", "run.toml", *TIMM, *wide, "run.device=cuda", "--budget", "20GB")
    assert (measured.code, measured.errors) == (0, "")
    assert "measured on" in measured.output
    (expected,), (found,) = rows(measured.output), rows(estimated.output)
    assert float(found[1]) == pytest.approx(float(expected[1]), rel=0.15)


COSTS = StepCosts(
    blocks=tuple(
        BlockCosts(str(i), (Choice("keep", 2, 2, 2, 1.0), Choice("drop", 1, 2, 2, 1.25)), 0)
        for i in range(4)
    ),
    fixed_bytes=0,
    before_bytes=0,
    before_backward_bytes=0,
    tail_bytes=0,
    tail_gradient_bytes=0,
    update_bytes=0,
    other_seconds=1.0,
)


@pytest.mark.parametrize(
    ("picks", "text", "share"),
    [
        ((0, 0, 0, 0), "0-3: keep", 0.0),
        ((1, 0, 0, 1), "0: drop; 1-2: keep; 3: drop", 0.125),
        ((1, 1, 1, 1), "0-3: drop", 0.25),
    ],
)
def test_blocks_in_words(picks: tuple[int, ...], text: str, share: float) -> None:
    assert describe_blocks(COSTS, picks) == text
    assert recompute_share(COSTS, picks) == share
    assert recompute_share(dataclasses.replace(COSTS, blocks=()), ()) == 0


@pytest.mark.parametrize(
    ("accumulate", "seconds"), [(1, 5.0), (2, 5.0), (6, 0.5 + 3 * 4.5)], ids=["1", "2", "6"]
)
def test_a_step_updates_once(accumulate: int, seconds: float) -> None:
    """Two micro-batches stand for all of them, but one update for one."""
    costs = dataclasses.replace(COSTS, update_seconds=0.5)
    batches = [Batch({}, 8)] * min(2, accumulate)
    step: Any = None
    measured = Measured(costs, step, batches, 0, None, accumulate, "bf16", [])
    assert measured.step_seconds(Solution((0,) * 4, 8, 5.0)) == seconds
