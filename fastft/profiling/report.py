"""What a profile says: plain data, which `report.json` holds as it is."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Forward and backward, where they are replayed from a CUDA graph.
GRAPH = "graph"
PHASES = ("data", "forward", "backward", GRAPH, "gradients", "update", "other")

# The rest of a step beside the kinds of work.
IDLE = "idle"


@dataclass(frozen=True)
class RunFacts:
    """What the report must know of the run, which no trace says.

    Attributes:
        title: the run folder's name.
        device: the GPU's name as the driver gives it, or 'CPU'.
        is_gpu: whether the device is a GPU.
        precision: 'fp32', 'tf32', 'bf16' or 'fp16'.
        compile: `step.compile`.
        layer_norm: `step.layer_norm`.
        blocks: how many the adapter names.
        workers: `data.workers`.
        samples: per optimizer step.
        accumulate: micro-batches per optimizer step.
        first_step: number of the first profiled step, counted from 0.
    """

    title: str
    device: str
    is_gpu: bool
    precision: str
    compile: str
    layer_norm: str
    blocks: int
    workers: int
    samples: int
    accumulate: int
    first_step: int


@dataclass(frozen=True)
class PhaseTime:
    """One phase of a step, in ms per step.

    Attributes:
        host_ms: how long the host was in it.
        gpu_ms: GPU time of the work launched in it; None without a GPU.
        idle_ms: how long the GPU had nothing to do while the host was in it; None without a GPU.
            More than without the profiler, which slows the host down.
    """

    name: str
    host_ms: float
    gpu_ms: float | None
    idle_ms: float | None


@dataclass(frozen=True)
class KindTime:
    """One kind of work, in ms per step and as a share of the step (`true_step_ms`).

    Kinds and 'idle' together are the step: where kernels overlap, the time counts once. The
    profiler does not slow kernels down, so they are as long without it.
    """

    name: str
    ms: float
    share: float


@dataclass(frozen=True)
class KernelTime:
    """All runs of one kernel in the profiled steps; without a GPU, of one operator.

    Attributes:
        calls: in all profiled steps.
        total_ms: in all profiled steps. Of an operator: without the operators that it calls.
        share: of as many steps.
        mean_us: per call.
        tflops: achieved, in 1e12 FLOP/s; None: not known.
        gb_per_s: achieved, in 1e9 bytes/s; None: not known.
        gb_per_s_is_estimate: it counts the kernel's arguments, as `fastft.profiling.traffic` says;
            of copies it counts what the driver did.
    """

    name: str
    kind: str
    calls: int
    total_ms: float
    share: float
    mean_us: float
    tflops: float | None = None
    gb_per_s: float | None = None
    gb_per_s_is_estimate: bool = False


@dataclass(frozen=True)
class HostWait:
    """The host stood still until the GPU had caught up, inside the profiled steps.

    Attributes:
        call: of the CUDA runtime.
        operator: the outermost torch operator that made it; '': none.
        phase: in which it was made.
        count: in all profiled steps.
        ms: in all profiled steps.
    """

    call: str
    operator: str
    phase: str
    count: int
    ms: float


@dataclass(frozen=True)
class Arithmetic:
    """Matrix products, convolutions and attention of a step.

    Attributes:
        tflop: per step, in 1e12 operations; 0: not known.
        tflops: over the step's time, in 1e12 per second.
        peak_tflops: of the device in this precision; None: not in the table.
        mfu: `tflops / peak_tflops`.
    """

    tflop: float
    tflops: float
    peak_tflops: float | None
    mfu: float | None


@dataclass(frozen=True)
class CompileEvent:
    """torch.compile left a graph, or compiled a function again.

    Attributes:
        where: file:line of the code that broke the graph, or of the function; '': torch does not
            say.
        reason: torch's words, on one line.
        count: how often, for this reason at this place.
    """

    where: str
    reason: str
    count: int


@dataclass(frozen=True)
class CompileFacts:
    """What torch.compile did, since the process began unless said otherwise.

    Attributes:
        graphs: compiled.
        graphs_in_window: compiled in the profiled steps.
        graph_breaks: in the order of their first times.
        recompiles: among the last 64 compilations.
        cache_hits: graphs that came from Inductor's cache.
        cache_misses: graphs that did not.
    """

    graphs: int = 0
    graphs_in_window: int = 0
    graph_breaks: tuple[CompileEvent, ...] = ()
    recompiles: tuple[CompileEvent, ...] = ()
    cache_hits: int = 0
    cache_misses: int = 0


@dataclass(frozen=True)
class MemoryReport:
    """Memory that torch's allocator had handed out during one step, in bytes.

    Attributes:
        curve: (ms since the step began, bytes); each point is the most within its stretch of time.
        peak: the most.
        start: before the step.
        kept: what is there in every step -> its size, which the curve holds.
        gradients: of all trained parameters; they live from the backward pass to the update.
    """

    curve: tuple[tuple[float, int], ...]
    peak: int
    start: int
    kept: Mapping[str, int]
    gradients: int


@dataclass(frozen=True)
class Advice:
    """What to change, why, and the measured number."""

    setting: str
    text: str


@dataclass(frozen=True)
class ProfileReport:
    """Everything that `report.html` shows.

    Attributes:
        step_ms: of each profiled step, which the profiler slows down on the host.
        unprofiled_ms: mean of as many steps before them, without the profiler; None: not measured.
        true_step_ms: what shares, rates and idle time refer to: `unprofiled_ms`, or, where that is
            None, `mean_step_ms`.
        notes: what could not be measured, and why.
    """

    run: RunFacts
    step_ms: tuple[float, ...]
    mean_step_ms: float
    unprofiled_ms: float | None
    true_step_ms: float
    phases: tuple[PhaseTime, ...]
    kinds: tuple[KindTime, ...]
    kernels: tuple[KernelTime, ...]
    waits: tuple[HostWait, ...]
    arithmetic: Arithmetic
    fp32_matmul_share: float
    compiled: CompileFacts
    memory: MemoryReport | None
    notes: tuple[str, ...]
    advice: tuple[Advice, ...] = ()

    @property
    def idle_share(self) -> float:
        """Of the steps: the GPU had nothing to do; without a GPU: no operator ran."""
        return next(kind.share for kind in self.kinds if kind.name == IDLE)

    def with_advice(self, advice: tuple[Advice, ...]) -> "ProfileReport":
        """The same numbers with what the rules say of them."""
        return dataclasses.replace(self, advice=advice)

    def to_json(self) -> str:
        """The report as one JSON object."""
        tree: dict[str, Any] = dataclasses.asdict(self)
        return json.dumps(tree, indent=2, allow_nan=False) + "\n"
