"""From a trace to the numbers of a report. All of it is pure.

A step begins where the host begins it, or where the GPU is done with the step before, whichever is
later. It ends where the last work that it launched ends, on the host or the GPU. What happens
between steps (logging, evaluation, saving) counts for neither.
"""

import bisect
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fastft.profiling.flops import operator_flops, owners, peak_flops
from fastft.profiling.intervals import (
    Interval,
    difference,
    exclusive,
    intersection,
    length,
    union,
)
from fastft.profiling.kinds import ENGINE, KINDS, is_fp32_matmul, kernel_kind, operators_kind
from fastft.profiling.report import (
    GRAPH,
    IDLE,
    PHASES,
    Arithmetic,
    CompileFacts,
    HostWait,
    KernelTime,
    KindTime,
    MemoryReport,
    PhaseTime,
    ProfileReport,
    RunFacts,
)
from fastft.profiling.trace import STEP, Call, GpuWork, Trace
from fastft.profiling.traffic import kernel_bytes, peak_bandwidth

TOP_KERNELS = 20

_SYNCHRONIZE = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# The driver's own names, which Triton and NCCL use.
_SYNCHRONIZE += ("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")


@dataclass(frozen=True)
class Work:
    """What a step's time is spent on: work on the GPU or, without one, an operator's own time.

    Attributes:
        calls: 0 for what is a later part of the same call.
        flops: that it computed; 0: not known.
        bytes: that it moved; None: not known.
        is_estimate: the bytes are those of its arguments.
    """

    name: str
    kind: str
    phase: str
    start: float
    end: float
    calls: int = 1
    flops: int = 0
    bytes: float | None = None
    is_estimate: bool = False


def measure(
    trace: Trace,
    run: RunFacts,
    compiled: CompileFacts,
    memory: MemoryReport | None = None,
    unprofiled_ms: float | None = None,
) -> ProfileReport:
    """The report, without advice, of a trace that holds at least one step.

    Args:
        unprofiled_ms: mean time of a step without the profiler, if it was measured.
    """
    window = _Window(trace)
    on_gpu = run.is_gpu and bool(trace.gpu)
    works = window.gpu_work() if on_gpu else window.operator_work()
    steps = len(window.steps)
    step_ms = tuple((end - start) / 1e3 for start, end in window.steps)
    mean_ms = sum(step_ms) / steps
    true_ms = mean_ms if unprofiled_ms is None else unprofiled_ms
    clipped = window.clip(works)
    replayed = bool(window.host_ranges(GRAPH))
    # A replay has no operators.
    flops = 0.0 if replayed else window.flops() / steps
    # Operators are slowed down by the profiler as the whole step is, kernels are not.
    of_ms = true_ms if on_gpu else mean_ms
    return ProfileReport(
        run=run,
        step_ms=step_ms,
        mean_step_ms=mean_ms,
        unprofiled_ms=unprofiled_ms,
        true_step_ms=true_ms,
        phases=_phases(window, clipped if on_gpu else None),
        kinds=_kinds(clipped, steps, of_ms),
        kernels=_kernels(works, of_ms * steps, peak_bandwidth(run.device))[:TOP_KERNELS],
        waits=window.waits(),
        arithmetic=_arithmetic(flops, true_ms, run),
        fp32_matmul_share=sum(w.end - w.start for w in clipped if is_fp32_matmul(w.name))
        / (of_ms * steps * 1e3),
        compiled=compiled,
        memory=memory,
        notes=_notes(run, on_gpu, memory, replayed),
    )


class _Window:
    """The steps of a trace, and what lies in them.

    Attributes:
        steps: from begin to end, as the module's docstring defines them.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._host = [(mark.start, mark.end) for mark in trace.marks if mark.name == STEP]
        assert self._host, "a trace of fastft marks its steps"
        self._starts = [start for start, _ in self._host]
        self._phase_marks = [mark for mark in trace.marks if mark.name in PHASES]
        self._phase_starts = [mark.start for mark in self._phase_marks]
        self._owners = owners(trace.operators)
        self._by_id = {
            operator.external_id: index
            for index, operator in enumerate(trace.operators)
            if operator.external_id >= 0
        }
        self.steps = self._step_intervals()

    def _step_intervals(self) -> list[Interval]:
        ends = [end for _, end in self._host]
        for work in self._trace.gpu:
            step = self._step_at(self._launched(work))
            if step is not None:
                ends[step] = max(ends[step], work.end)
        steps: list[Interval] = []
        for (start, _), end in zip(self._host, ends, strict=True):
            begin = max(start, steps[-1][1]) if steps else start
            steps.append((begin, max(begin, end)))
        return steps

    @staticmethod
    def _launched(work: GpuWork) -> float:
        return work.start if work.launched is None else work.launched

    def _step_at(self, time: float) -> int | None:
        """The step that the host was in."""
        index = bisect.bisect_right(self._starts, time) - 1
        return index if index >= 0 and time <= self._host[index][1] else None

    def phase_at(self, time: float) -> str:
        """The phase that the host was in; every thread counts, as backward has its own."""
        index = bisect.bisect_right(self._phase_starts, time) - 1
        if index >= 0 and time <= self._phase_marks[index].end:
            return self._phase_marks[index].name
        return "other"

    def host_ranges(self, phase: str) -> list[Interval]:
        """When the host was in a phase of a step; 'other': in none."""
        steps = union(self._host)
        if phase == "other":
            return difference(steps, union((m.start, m.end) for m in self._phase_marks))
        marked = union((m.start, m.end) for m in self._phase_marks if m.name == phase)
        return intersection(steps, marked)

    def clip(self, works: Sequence[Work]) -> list[Work]:
        """The parts of the work that lie in steps, each moment counted once."""
        ordered = sorted(works, key=lambda work: work.start)
        alone = exclusive([(work.start, work.end) for work in ordered])
        steps = union(self.steps)
        return [
            dataclasses.replace(work, start=start, end=end)
            for work, interval in zip(ordered, alone, strict=True)
            for start, end in intersection([interval], steps)
        ]

    def _callers(self, index: int) -> list[int]:
        """An operator and those around it, the innermost first."""
        found = []
        while index >= 0:
            found.append(index)
            index = self._trace.operators[index].parent
        return found

    def gpu_work(self) -> list[Work]:
        """Work on the GPU that a step launched, or that runs while a step goes on."""
        steps = union(self.steps)
        launches = Counter(work.external_id for work in self._trace.gpu)
        found, counted = [], []
        for work in self._trace.gpu:
            launched = self._launched(work)
            if self._step_at(launched) is None and not intersection(
                [(work.start, work.end)], steps
            ):
                continue
            phase = self.phase_at(launched)
            chain = self._callers(self._by_id.get(work.external_id, -1))
            names = [self._trace.operators[index].name for index in chain]
            kind = kernel_kind(work.name, phase, names)
            moved = work.bytes
            if moved is None and chain and launches[work.external_id] == 1:
                moved = kernel_bytes(work.name, self._trace.operators[chain[0]])
            is_estimate = work.bytes is None and moved is not None
            found.append(
                Work(
                    *(work.name, kind, phase, work.start, work.end),
                    bytes=moved,
                    is_estimate=is_estimate,
                )
            )
            counted.append(self._owners[chain[0]] if chain and kind != "copies" else -1)
        return self._with_flops(found, counted)

    def operator_work(self) -> list[Work]:
        """Operators' own time in steps, without the operators that they call."""
        operators = self._trace.operators
        children: dict[int, list[Interval]] = defaultdict(list)
        for operator in operators:
            children[operator.parent].append((operator.start, operator.end))
        found, counted = [], []
        for index, operator in enumerate(operators):
            if self._step_at(operator.start) is None:
                continue
            phase = self.phase_at(operator.start)
            names = [operators[i].name for i in self._callers(index)]
            # Nodes of autograd do nothing themselves.
            kind = operators_kind(names) or ("elementwise" if "aten::" in names[0] else "other")
            # Of an operator that is counted, copies compute nothing.
            owner = -1 if kind == "copies" else self._owners[index]
            kind = "optimizer" if phase in ("gradients", "update") else kind
            own = difference([(operator.start, operator.end)], union(children[index]))
            for number, (start, end) in enumerate(own):
                calls = 1 if number == 0 else 0
                found.append(Work(operator.name, kind, phase, start, end, calls))
                counted.append(owner)
        return self._with_flops(found, counted)

    def _with_flops(self, works: list[Work], counted: Sequence[int]) -> list[Work]:
        """Gives the arithmetic of a counted operator to the longest work that it caused.

        Args:
            counted: the counted operator behind each work, -1: none.
        """
        longest: dict[int, int] = {}
        for index, (work, owner) in enumerate(zip(works, counted, strict=True)):
            best = works[longest.setdefault(owner, index)]
            if work.end - work.start > best.end - best.start:
                longest[owner] = index
        for owner, index in longest.items():
            if owner >= 0:
                flops = operator_flops(self._trace.operators[owner])
                works[index] = dataclasses.replace(works[index], flops=flops)
        return works

    def flops(self) -> int:
        """Operations of all steps."""
        return sum(
            operator_flops(operator)
            for index, operator in enumerate(self._trace.operators)
            if self._owners[index] == index and self._step_at(operator.start) is not None
        )

    def waits(self) -> tuple[HostWait, ...]:
        """Waits of the host inside steps, the longest first."""
        pageable = {
            work.correlation
            for work in self._trace.gpu
            if work.kind == "memcpy" and "DtoH" in work.name and "Pageable" in work.name
        }
        found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for call in self._trace.calls:
            name = call.name if call.name in _SYNCHRONIZE else ""
            # A copy into memory that is not pinned returns when it is done.
            if call.correlation in pageable or call.name == "cudaMemcpy":
                name = f"{call.name}, to the host"
            if name and self._step_at(call.start) is not None:
                key = (name, self._outermost(call), self.phase_at(call.start))
                found[key].append((call.end - call.start) / 1e3)
        waits = [HostWait(*key, count=len(ms), ms=sum(ms)) for key, ms in found.items()]
        return tuple(sorted(waits, key=lambda wait: -wait.ms))

    def _outermost(self, call: Call) -> str:
        chain = self._callers(self._by_id.get(call.external_id, -1))
        names = [self._trace.operators[index].name for index in chain]
        return next((name for name in reversed(names) if not name.startswith(ENGINE)), "")


def _phases(window: _Window, gpu: Sequence[Work] | None) -> tuple[PhaseTime, ...]:
    to_ms = 1e3 * len(window.steps)
    busy = union((work.start, work.end) for work in gpu or ())
    idle = difference(union(window.steps), busy)
    found = []
    for phase in PHASES:
        ranges = window.host_ranges(phase)
        if phase == GRAPH and not ranges:
            continue
        host = length(ranges) / to_ms
        if gpu is None:
            found.append(PhaseTime(phase, host, None, None))
            continue
        own = sum(work.end - work.start for work in gpu if work.phase == phase) / to_ms
        found.append(PhaseTime(phase, host, own, length(intersection(idle, ranges)) / to_ms))
    return tuple(found)


def _kinds(works: Sequence[Work], steps: int, step_ms: float) -> tuple[KindTime, ...]:
    ms = dict.fromkeys(KINDS, 0.0)
    for work in works:
        ms[work.kind] += (work.end - work.start) / 1e3 / steps
    # The step without the profiler may be a little shorter than the kernels of the profiled ones.
    whole = max(step_ms, sum(ms.values()))
    ms[IDLE] = whole - sum(ms.values())
    return tuple(KindTime(name, time, time / whole) for name, time in ms.items())


def _kernels(
    works: Sequence[Work], total_ms: float, bandwidth: float | None
) -> tuple[KernelTime, ...]:
    grouped: dict[tuple[str, str], list[Work]] = defaultdict(list)
    for work in works:
        grouped[work.name, work.kind].append(work)
    found = []
    for (name, kind), runs in grouped.items():
        us = sum(run.end - run.start for run in runs)
        calls = sum(run.calls for run in runs)
        # Runs without known arithmetic, as those of other operators, do not count for the rate.
        known = [run for run in runs if run.flops]
        known_us = sum(run.end - run.start for run in known)
        moved = [run for run in runs if run.bytes is not None]
        moved_us = sum(run.end - run.start for run in moved)
        rate = sum(run.bytes or 0 for run in moved) / moved_us * 1e6 if moved_us else None
        is_estimate = any(run.is_estimate for run in moved)
        # Beyond what memory can do, the arguments were in a cache, or were not read in full.
        if is_estimate and rate and bandwidth and rate > bandwidth:
            rate = None
        found.append(
            KernelTime(
                name=name,
                kind=kind,
                calls=calls,
                total_ms=us / 1e3,
                share=us / 1e3 / total_ms,
                mean_us=us / calls,
                tflops=sum(run.flops for run in known) / known_us / 1e6 if known_us else None,
                gb_per_s=None if rate is None else rate / 1e9,
                gb_per_s_is_estimate=is_estimate and rate is not None,
            )
        )
    return tuple(sorted(found, key=lambda kernel: -kernel.total_ms))


def _arithmetic(flops: float, step_ms: float, run: RunFacts) -> Arithmetic:
    rate = flops / (step_ms / 1e3)
    peak = peak_flops(run.device, run.precision) if run.is_gpu else None
    return Arithmetic(
        tflop=flops / 1e12,
        tflops=rate / 1e12,
        peak_tflops=None if peak is None else peak / 1e12,
        mfu=rate / peak if peak is not None and flops else None,
    )


def _notes(
    run: RunFacts, on_gpu: bool, memory: MemoryReport | None, replayed: bool
) -> tuple[str, ...]:
    notes = []
    if replayed:
        notes.append(
            "'graph' is forward and backward, replayed from a CUDA graph (step.cuda_graphs). A"
            " replay shows kernels only: there are no operators, hence no MFU and rates, and the"
            " memory curve leaves out what the graph holds."
        )
    if not run.is_gpu:
        notes.append("The run was on a CPU: times are the host's, and kernels are operators.")
        notes.append("No memory curve: torch records allocations on a GPU only.")
    elif not on_gpu:
        notes.append(
            "The trace holds no GPU work, so times are the host's: another profiler may hold the"
            " GPU's counters (CUPTI), or the driver refuses them."
        )
    if run.is_gpu and memory is None:
        notes.append("No memory curve: profile.memory is off.")
    if run.is_gpu and peak_flops(run.device, run.precision) is None:
        notes.append(
            f"No MFU: the peak of '{run.device}' is not in fastft's table (fastft.profiling.flops)."
        )
    if not run.is_gpu:
        notes.append("No MFU: a CPU's peak is not in fastft's table.")
    return tuple(notes)
