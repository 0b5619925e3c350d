"""`fastft train --profile` on a CPU, and what `[profile]` refuses."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastft.profiling import ProfileHook

Command = Callable[..., Any]

STEPS = ("run.steps=8", "profile.at_step=4", "profile.steps=2")


def in_milliseconds(event: dict[str, Any]) -> float:
    return event["dur"] / 1e3


def test_every_file_is_there_and_they_agree(project: Path, fastft: Command) -> None:
    done = fastft("train", "run.toml", "--profile", "run.steps=13", "log.tensorboard=true")
    assert done.code == 0, done.errors
    folder = Path("run/profile")
    assert "report: run/profile/report.html" in done.output
    assert {file.name for file in folder.iterdir()} == {
        "fastft.pt.trace.json.gz",
        "report.html",
        "report.json",
    }
    report = json.loads((folder / "report.json").read_text())
    events = json.loads(gzip.decompress((folder / "fastft.pt.trace.json.gz").read_bytes()))
    marks: dict[str, list[dict[str, Any]]] = {}
    for event in events["traceEvents"]:
        if event.get("cat") == "user_annotation" and event["name"].startswith("fastft/"):
            marks.setdefault(event["name"].removeprefix("fastft/"), []).append(event)
    # The defaults: steps 10 to 12, counted from 0, each with its phases once.
    assert report["run"]["first_step"] == 10
    phases = ("data", "forward", "backward", "gradients", "update")
    assert {name: len(found) for name, found in marks.items()} == dict.fromkeys(
        ("step", *phases), 3
    )
    assert report["step_ms"] == pytest.approx([in_milliseconds(e) for e in marks["step"]])
    assert report["unprofiled_ms"] > 0
    host = {phase["name"]: phase["host_ms"] for phase in report["phases"]}
    for name in phases:
        assert host[name] == pytest.approx(sum(map(in_milliseconds, marks[name])) / 3), name
    assert sum(host.values()) == pytest.approx(report["mean_step_ms"])
    # By hand: 8 samples through linear 4-8, 8-8, 8-8, 8-3; backward takes two products for each,
    # but one for the first, whose input needs no gradient.
    forward = [2 * 8 * size for size in (4 * 8, 8 * 8, 8 * 8, 8 * 3)]
    flops = 3 * sum(forward) - forward[0]
    assert report["arithmetic"]["tflop"] * 1e12 == pytest.approx(flops)


def test_the_page_needs_nothing_else_and_holds_the_numbers(project: Path, fastft: Command) -> None:
    assert fastft("train", "run.toml", *STEPS).code == 0
    page = Path("run/profile/report.html").read_text()
    report = json.loads(Path("run/profile/report.json").read_text())
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", page)
    assert f"{report['true_step_ms']:.2f} ms" in page
    assert "Steps 5 to 6" in page
    for phase in report["phases"]:
        assert f"{phase['host_ms']:,.2f}" in page
    for kernel in report["kernels"]:
        assert f"{kernel['total_ms']:,.2f}" in page


def test_tensorboard_shows_text_and_chart(project: Path, fastft: Command) -> None:
    assert fastft("train", "run.toml", *STEPS, "log.tensorboard=true").code == 0
    (events,) = Path("run/tensorboard").iterdir()
    log = EventAccumulator(str(events)).Reload()
    (text,) = log.Tensors("profile/text_summary")
    report = json.loads(Path("run/profile/report.json").read_text())
    assert f"{report['true_step_ms']:.2f} ms" in text.tensor_proto.string_val[0].decode()
    (image,) = log.Images("profile")
    assert image.step == 4
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_without_a_section_nothing_is_made_for_it(
    project: Path, fastft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(ProfileHook, "__init__", made)
    assert fastft("train", "run.toml").code == 0
    assert not Path("run/profile").exists()


def test_a_section_in_the_run_file_is_kept_by_the_flag(project: Path, fastft: Command) -> None:
    with Path("run.toml").open("a") as file:
        file.write("[profile]\nat_step = 2\nsteps = 1\n")
    assert fastft("train", "run.toml", "--profile", "run.steps=4").code == 0
    report = json.loads(Path("run/profile/report.json").read_text())
    assert (report["run"]["first_step"], len(report["step_ms"])) == (2, 1)


def test_accumulated_batches_are_one_step(project: Path, fastft: Command) -> None:
    assert fastft("train", "run.toml", *STEPS, "step.accumulate=2", "ema.decay=0.9").code == 0
    report = json.loads(Path("run/profile/report.json").read_text())
    assert len(report["step_ms"]) == 2
    assert report["run"]["samples"] == 16


def test_a_profile_changes_no_weight(project: Path, fastft: Command) -> None:
    assert fastft("train", "run.toml", "run.steps=8", "run.folder=plain").code == 0
    assert fastft("train", "run.toml", *STEPS, "run.folder=profiled").code == 0
    weights = [
        (Path(folder) / "checkpoints/step-00000008/model.safetensors").read_bytes()
        for folder in ("plain", "profiled")
    ]
    assert weights[0] == weights[1]


def test_the_profiled_steps_must_be_in_the_run(project: Path, fastft: Command) -> None:
    done = fastft("train", "run.toml", "--profile", "run.steps=12")
    assert done.code == 2
    assert done.problems == [
        "run.toml: profile.at_step: must leave profile.steps = 3 of run.steps = 12; got 10;"
        " lower it"
    ]
    done = fastft("train", "run.toml", "profile.at_step=0")
    assert done.problems == ["run.toml: profile.at_step: must be greater than or equal to 1; got 0"]


def test_a_resumed_run_may_profile_other_steps(project: Path, fastft: Command) -> None:
    run = ("train", "run.toml", "run.steps=8", "checkpoint.every_steps=4")
    assert fastft(*run, "profile.at_step=2", "profile.steps=1").code == 0
    later = ("--resume", "run.steps=16")
    # The step before the profiled ones is in the part that is done.
    done = fastft(*run, *later, "profile.at_step=8", "profile.steps=1")
    assert done.code == 0, done.errors
    assert "profile: nothing was profiled: step 7, which comes before" in done.output
    assert json.loads(Path("run/profile/report.json").read_text())["run"]["first_step"] == 2
    done = fastft(*run, "--resume", "run.steps=20", "profile.at_step=17", "profile.steps=1")
    assert done.code == 0, done.errors
    report = json.loads(Path("run/profile/report.json").read_text())
    assert report["run"]["first_step"] == 17
    # There was no whole step to time before: 16 warmed up.
    assert report["unprofiled_ms"] is None


def test_an_interrupted_window_writes_nothing(
    project: Path, fastft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = ProfileHook.around

    def interrupted(self: ProfileHook, index: int) -> Any:
        if index == 4:
            self._run.signals.received = "SIGTERM"
        return around(self, index)

    monkeypatch.setattr(ProfileHook, "around", interrupted)
    done = fastft("train", "run.toml", *STEPS)
    assert done.code == 4
    assert "profile: the run ended in the profiled steps; nothing was written" in done.output
    assert not Path("run/profile").exists()
    assert not torch.autograd.profiler._is_profiler_enabled
