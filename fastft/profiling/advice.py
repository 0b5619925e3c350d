"""Rules that turn numbers into advice. Each says what, the number, and the setting to change."""

from collections.abc import Iterator

from fastft.profiling.report import GRAPH, Advice, ProfileReport, RunFacts

# Shares of the step above which a rule speaks.
IDLE_LIMIT = 0.15
DATA_LIMIT = 0.05
COPIES_LIMIT = 0.10
OPTIMIZER_LIMIT = 0.20
NORM_LIMIT = 0.10
FP32_LIMIT = 0.05
COMMUNICATION_LIMIT = 0.20
# A step that takes this many times the shortest is worth a word.
UNEVEN_LIMIT = 1.5


def advise(report: ProfileReport) -> tuple[Advice, ...]:
    """All that the rules have to say, the largest savings first; empty: nothing."""
    return tuple(
        advice
        for rule in (_compiling, _waits, _data, _idle, _fp32, _kinds, _graph_breaks, _uneven)
        for advice in rule(report)
    )


def _compiling(report: ProfileReport) -> Iterator[Advice]:
    compiled = report.compiled
    if compiled.graphs_in_window:
        yield Advice(
            "profile.at_step",
            f"torch.compile compiled {compiled.graphs_in_window} graphs in the profiled steps, so"
            " their times are not those of the run: profile later steps. Where those compile too,"
            " sizes vary from batch to batch: set Block(..., dynamic=True) in the adapter.",
        )


def _waits(report: ProfileReport) -> Iterator[Advice]:
    if not report.waits:
        return
    count = sum(wait.count for wait in report.waits) / len(report.step_ms)
    ms = sum(wait.ms for wait in report.waits) / len(report.step_ms)
    named = ", ".join(
        f"{wait.operator or 'a direct call'} in {wait.phase}" for wait in report.waits[:3]
    )
    yield Advice(
        "the model's code",
        f"Waits of the host for the GPU: {count:.3g} per step, {ms:.2f} ms in all, most under"
        f" {named}: replace .item(), .cpu(), nonzero and masks as indices in the model or the loss"
        " by what stays on the GPU.",
    )


def _data(report: ProfileReport) -> Iterator[Advice]:
    data = next(phase for phase in report.phases if phase.name == "data")
    # On a GPU, reading that the GPU does not wait for costs nothing.
    idle_ms = report.idle_share * report.true_step_ms
    ms = data.host_ms if data.idle_ms is None else min(data.idle_ms, idle_ms)
    share = ms / report.true_step_ms
    if share > DATA_LIMIT:
        who = "The step waits" if data.idle_ms is None else "The GPU waits"
        yield Advice(
            "data.workers",
            f"{who} for data {share:.0%} of the time ({ms:.2f} ms per step): raise data.workers"
            f" from {report.run.workers}, or make reading and transforms cheaper.",
        )


def _idle(report: ProfileReport) -> Iterator[Advice]:
    share = report.idle_share
    if report.phases[0].idle_ms is None or share <= IDLE_LIMIT:
        return
    most = max(report.phases, key=lambda phase: phase.idle_ms or 0)
    larger = "a larger data.batch_size"
    if any(phase.name == GRAPH for phase in report.phases):
        setting, remedies = "data.batch_size", [larger]
    else:
        setting, remedies = "step.cuda_graphs", ["step.cuda_graphs = 'auto'", larger]
    if report.run.compile == "off":
        setting = "step.compile"
        remedies.insert(0, _compiling_setting(report.run))
    yield Advice(
        setting,
        f"The GPU waits for the host {share:.0%} of the time, most of it in {most.name}:"
        f" {', or '.join(remedies)} gives it more to do per launch.",
    )


def _fp32(report: ProfileReport) -> Iterator[Advice]:
    share = report.fp32_matmul_share
    if share <= FP32_LIMIT:
        return
    said = f"Matrix products in full fp32 take {share:.0%} of the time, without tensor cores: "
    if report.run.precision == "fp32":
        remedy = "use step.precision = 'bf16', or 'tf32' where bf16 is too coarse."
    else:
        remedy = (
            "the model leaves autocast there; see which operators below, and whether it must;"
            " step.tf32 = true makes them TF32."
        )
    yield Advice("step.precision", said + remedy)


def _kinds(report: ProfileReport) -> Iterator[Advice]:
    share = {kind.name: kind.share for kind in report.kinds}
    if share["copies"] > COPIES_LIMIT:
        yield Advice(
            "the model's code",
            f"Copies, casts and fills take {share['copies']:.0%} of the time: look for"
            " .contiguous(), .to() and cat in the model; step.compile fuses many of them.",
        )
    if share["optimizer"] > OPTIMIZER_LIMIT:
        yield Advice(
            "step.accumulate",
            f"Gradient norms and the update take {share['optimizer']:.0%} of the time, which does"
            " not depend on the batch: raise data.batch_size, or step.accumulate from"
            f" {report.run.accumulate}.",
        )
    if share["norm"] > NORM_LIMIT and (setting := _norm_setting(report)):
        yield Advice(
            setting.split(" ")[0],
            f"Norms outside compiled blocks take {share['norm']:.0%} of the time: set {setting}.",
        )
    if share["communication"] > COMMUNICATION_LIMIT:
        yield Advice(
            "step.accumulate",
            f"Communication takes {share['communication']:.0%} of the time beyond what computation"
            " hides: raise step.accumulate or data.batch_size.",
        )


def _norm_setting(report: ProfileReport) -> str | None:
    """What is left to try; None: nothing."""
    run = report.run
    # 'auto' is 'fused' on a GPU where nothing is compiled, and else 'torch'.
    tried = run.layer_norm == "fused" or (run.layer_norm == "auto" and run.compile == "off")
    if run.is_gpu and not tried:
        return "step.layer_norm = 'fused'"
    return _compiling_setting(run) if run.compile == "off" else None


def _compiling_setting(run: RunFacts) -> str:
    """The kind of `step.compile` that the model allows."""
    return f"step.compile = '{'blocks' if run.blocks else 'model'}'"


def _graph_breaks(report: ProfileReport) -> Iterator[Advice]:
    breaks, run = report.compiled.graph_breaks, report.run
    if breaks:
        remedy = "change that code"
        if run.compile == "model" and run.blocks:
            remedy += ", or compile the blocks alone (step.compile = 'blocks')"
        most = sorted(breaks, key=lambda broken: -broken.count)
        places = list(dict.fromkeys(broken.where for broken in most if broken.where))
        where = f", most at {', '.join(places[:3])}" if places else ""
        yield Advice(
            "step.compile",
            f"torch.compile broke its graphs {sum(broken.count for broken in breaks)} times{where};"
            " the reasons are listed below. Each break costs launches and fusions:"
            f" {remedy}.",
        )


def _uneven(report: ProfileReport) -> Iterator[Advice]:
    longest, shortest = max(report.step_ms), min(report.step_ms)
    if longest > UNEVEN_LIMIT * shortest:
        yield Advice(
            "profile.steps",
            f"The profiled steps differ: {shortest:.1f} to {longest:.1f} ms. Batches may differ in"
            " size, or the machine has other work; raise profile.steps for a better mean.",
        )
