"""Which rule speaks when, and that it names the number and the setting."""

import dataclasses
from typing import Any

import pytest

from fastft.profiling import (
    CompileEvent,
    CompileFacts,
    ProfileReport,
    RunFacts,
    advise,
    measure,
    parse_trace,
)


@pytest.fixture
def quiet(trace: Any, gpu_run: RunFacts) -> ProfileReport:
    """A step that no rule has anything to say of: 90 % tensor-core products, 2 % idle."""
    trace.mark("step", 0, 1000)
    trace.mark("data", 0, 20)
    trace.mark("forward", 20, 1000)
    trace.kernel("nvjet_sm90_tst_256x128", 20, 20, 920)
    trace.kernel(
        "_forward_kernel", 30, 920, 1000, trace.operator("fastft::layer_norm_forward", 25, 40)
    )
    return measure(parse_trace(trace.events), gpu_run, CompileFacts())


def with_kinds(report: ProfileReport, **shares: float) -> ProfileReport:
    kinds = tuple(
        dataclasses.replace(kind, share=shares.get(kind.name, 0.0)) for kind in report.kinds
    )
    return dataclasses.replace(report, kinds=kinds)


def only(report: ProfileReport) -> tuple[str, str]:
    """The setting and text of the one piece of advice."""
    (advice,) = advise(report)
    return advice.setting, advice.text


def test_nothing_to_say(quiet: ProfileReport) -> None:
    assert advise(quiet) == ()


def test_idle(quiet: ProfileReport) -> None:
    setting, text = only(with_kinds(quiet, idle=0.4))
    assert setting == "step.compile"
    assert "40% of the time" in text
    assert "step.compile = 'blocks'" in text
    run = dataclasses.replace(quiet.run, blocks=0)
    _, text = only(dataclasses.replace(with_kinds(quiet, idle=0.4), run=run))
    assert "step.compile = 'model'" in text
    run = dataclasses.replace(quiet.run, compile="blocks")
    setting, text = only(dataclasses.replace(with_kinds(quiet, idle=0.4), run=run))
    assert setting == "step.cuda_graphs"
    assert "'blocks'" not in text
    assert "step.cuda_graphs = 'auto', or a larger data.batch_size" in text
    graph = dataclasses.replace(quiet.phases[0], name="graph")
    replayed = dataclasses.replace(quiet, run=run, phases=(*quiet.phases, graph))
    setting, text = only(with_kinds(replayed, idle=0.4))
    assert setting == "data.batch_size"
    assert "cuda_graphs" not in text
    assert advise(with_kinds(quiet, idle=0.14)) == ()


def test_data_on_a_gpu_counts_what_the_gpu_waits_for(quiet: ProfileReport) -> None:
    data, *rest = quiet.phases
    hidden = dataclasses.replace(data, host_ms=0.5, idle_ms=0.0)
    assert advise(dataclasses.replace(quiet, phases=(hidden, *rest))) == ()
    waited = dataclasses.replace(data, host_ms=0.5, idle_ms=0.1)
    report = with_kinds(dataclasses.replace(quiet, phases=(waited, *rest)), idle=0.1)
    setting, text = only(report)
    assert setting == "data.workers"
    assert "10% of the time (0.10 ms per step)" in text
    assert "from 2" in text


def test_data_on_a_cpu_counts_the_host(quiet: ProfileReport) -> None:
    phases = tuple(dataclasses.replace(p, gpu_ms=None, idle_ms=None) for p in quiet.phases)
    slow = dataclasses.replace(phases[0], host_ms=0.25)
    # Time outside of operators is no waiting.
    report = with_kinds(dataclasses.replace(quiet, phases=(slow, *phases[1:])), idle=0.5)
    setting, text = only(report)
    assert setting == "data.workers"
    assert "25% of the time" in text


def test_waits_are_named(two_steps: Any, gpu_run: RunFacts) -> None:
    report = measure(parse_trace(two_steps.events), gpu_run, CompileFacts())
    text = next(advice.text for advice in advise(report) if "Waits" in advice.text)
    # One in two steps, of 0.1 ms.
    assert "0.5 per step, 0.05 ms in all, most under" in text
    assert "aten::item in backward" in text


def test_fp32(quiet: ProfileReport) -> None:
    report = dataclasses.replace(quiet, fp32_matmul_share=0.3)
    setting, text = only(report)
    assert setting == "step.precision"
    assert "30% of the time" in text
    assert "the model leaves autocast" in text
    assert "step.tf32 = true" in text
    report = dataclasses.replace(report, run=dataclasses.replace(quiet.run, precision="fp32"))
    assert "step.precision = 'bf16'" in only(report)[1]


@pytest.mark.parametrize(
    ("kind", "share", "setting", "said"),
    [
        ("copies", 0.12, "the model's code", "12% of the time"),
        ("optimizer", 0.25, "step.accumulate", "from 1"),
        ("norm", 0.11, "step.compile", "set step.compile = 'blocks'"),
        ("communication", 0.3, "step.accumulate", "30% of the time"),
    ],
)
def test_kinds(quiet: ProfileReport, kind: str, share: float, setting: str, said: str) -> None:
    found, text = only(with_kinds(quiet, **{kind: share}))
    assert found == setting
    assert said in text


FUSED = ["set step.layer_norm = 'fused'."]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"layer_norm": "torch"}, FUSED),
        ({"compile": "blocks", "layer_norm": "torch"}, FUSED),
        ({"compile": "model"}, FUSED),
        ({}, ["set step.compile = 'blocks'."]),
        ({"blocks": 0}, ["set step.compile = 'model'."]),
        ({"layer_norm": "fused"}, ["set step.compile = 'blocks'."]),
        ({"is_gpu": False, "layer_norm": "torch"}, ["set step.compile = 'blocks'."]),
        ({"compile": "blocks", "layer_norm": "fused"}, []),
    ],
    ids=str,
)
def test_norms_name_what_is_left_to_try(
    quiet: ProfileReport, facts: dict[str, Any], said: list[str]
) -> None:
    run = dataclasses.replace(quiet.run, **facts)
    found = advise(dataclasses.replace(with_kinds(quiet, norm=0.2), run=run))
    assert [advice.text.partition(": ")[2] for advice in found] == said


def test_compilation(quiet: ProfileReport) -> None:
    once, twice = CompileEvent("a.py:3", "item", 1), CompileEvent("b.py:7", "print", 2)
    breaks = CompileFacts(graphs=3, graph_breaks=(once, twice))
    for facts, others in ({}, False), ({"compile": "model"}, True):
        run = dataclasses.replace(quiet.run, **facts)
        _, text = only(dataclasses.replace(quiet, compiled=breaks, run=run))
        assert "3 times, most at b.py:7, a.py:3;" in text
        assert ("step.compile = 'blocks'" in text) == others
    late = CompileFacts(graphs=3, graphs_in_window=1)
    assert only(dataclasses.replace(quiet, compiled=late))[0] == "profile.at_step"


def test_uneven_steps(quiet: ProfileReport) -> None:
    setting, text = only(dataclasses.replace(quiet, step_ms=(10.0, 12.0, 16.0)))
    assert setting == "profile.steps"
    assert "10.0 to 16.0 ms" in text
