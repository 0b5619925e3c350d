"""The tensors that `FusedAdam` updates, their tables on the device, and one step over them."""

from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastft_kernels import adam
from fastft_kernels.adam import AdamTables, hyper_row, launch_adam
from fastft_kernels.adam_state import (
    MOMENTS,
    new_moments,
    read_moment,
    step_seed,
    write_moments,
)
from fastft_kernels.device import runs_triton
from fastft_kernels.tensor_table import (
    TRITON_DTYPES,
    ChunkTable,
    HostNumbers,
    Kinds,
    addresses,
    are_at,
    flat,
    get_dtype,
    get_grad,
    is_dense,
    memory_of,
    upload,
)

StateLayout = Literal["fp32", "bf16", "8bit"]
get_lr = itemgetter("lr")
get_hyper = itemgetter("betas", "eps", "weight_decay")


class StepStatistics(NamedTuple):
    """L2 norms of the last update that was not skipped, one per updated parameter.

    Of one without a gradient in the last step they are those of its own last update.
    """

    gradient: Tensor
    update: Tensor
    weight: Tensor


@dataclass(frozen=True)
class AdamOptions:
    """What holds for the whole optimizer; `FusedAdam` explains each."""

    decoupled: bool
    layout: StateLayout
    monitor: bool
    seed: int


class AdamPlan:
    """Everything that can be worked out before a step; rebuilt when the set of tensors changes."""

    def __init__(self, optimizer: Optimizer, options: AdamOptions) -> None:
        self.optimizer, self.options = optimizer, options
        pairs = [(p, i) for i, g in enumerate(optimizer.param_groups) for p in g["params"]]
        active = [(p, i) for p, i in pairs if p.grad is not None or p in optimizer.state]
        self.params: list[Tensor] = [p for p, _ in active]
        self.groups = [i for _, i in active]
        self.waiting = [p for p, _ in pairs if p.grad is None and p not in optimizer.state]
        self.group_count = len(optimizer.param_groups)
        self._check()
        self.param_addresses = addresses(self.params)
        self.shadows = {i: memory_of(p) for i, p in enumerate(self.params) if not is_dense(p)}
        self.memory: list[Tensor] = [self.shadows.get(i, p) for i, p in enumerate(self.params)]
        self.contiguous = all(memory.is_contiguous() for memory in self.memory)
        self.empty = [i for i, p in enumerate(self.params) if p.numel() == 0]
        self._adopt_state()
        self.lr: list[float] = []
        self.hyper: list[tuple] = []
        self.grad_addresses: list[int] = []
        self.signature: tuple = ()
        self.staged: dict[int, Tensor] = {}
        self.sums = torch.zeros(len(self.params), 3)
        self.tables = None
        if self.params and runs_triton(self.params[0]):
            self.tables = self._build_tables()

    def is_stale(self) -> bool:
        """True when a tensor was added, moved, or has its first gradient."""
        return (
            any(p.grad is not None for p in self.waiting)
            or self.group_count != len(self.optimizer.param_groups)
            or addresses(self.params) != self.param_addresses
        )

    def run(self, divisor: Tensor | None, skip: Tensor | None) -> None:
        """One step; see `FusedAdam.step`."""
        if self.tables is None:
            self._run_on_cpu(divisor, skip)
            return
        self._refresh_hyper(self.tables)
        self._refresh_gradients(self.tables)
        for i, shadow in self.shadows.items():
            shadow.copy_(self.params[i])
        divisor = self.one if divisor is None else divisor
        skip = self.zero if skip is None else skip
        launch_adam(self.tables, divisor, skip, self.options.layout, self.options.seed)
        for i, shadow in self.shadows.items():
            self.params[i].copy_(shadow)

    def statistics(self) -> StepStatistics:
        """The last step's norms per tensor."""
        sums = self.sums
        if self.tables is not None and self.tables.statistic is not None:
            # Checking the lengths would wait for the device.
            sums = torch.segment_reduce(
                self.tables.statistic, "sum", lengths=self.counts, axis=0, unsafe=True
            )
        return StepStatistics(*sums.sqrt().unbind(1))

    def _check(self) -> None:
        for p in self.params:
            if p.grad is not None and (p.grad.is_sparse or p.grad.is_complex()):
                raise ValueError("FusedAdam: gradients must be dense and real; got a sparse one")
        if len({p.device for p in self.params}) > 1:
            raise ValueError(
                "FusedAdam: all parameters must be on one device; use one optimizer per device"
            )

    def _adopt_state(self) -> None:
        """Gives every tensor its moments, and all step counts one common array."""
        state = self.optimizer.state
        for p, memory in zip(self.params, self.memory, strict=True):
            if not state[p]:
                # All at once: half a state would stay where memory runs out.
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                state[p].update({"step": step, **new_moments(memory, self.options.layout)})
        if self.params:
            self.step = torch.stack([state[p]["step"] for p in self.params])
            for p, step in zip(self.params, self.step.unbind(), strict=True):
                state[p]["step"] = step

    def _build_tables(self) -> AdamTables:
        device = self.params[0].device
        schedule = adam.SCHEDULES[self.options.layout]
        chunks = ChunkTable([p.numel() for p in self.params], schedule.chunk, device)
        states = [self.optimizer.state[p] for p in self.params]
        names = (*MOMENTS, *(f"{name}_exponent" for name in MOMENTS))
        rows = [[s[n].data_ptr() if n in s else 0 for s in states] for n in names]
        count = len(self.params)
        self.one, self.zero = torch.ones((), device=device), torch.zeros((), device=device)
        self.counts = upload(chunks.counts, torch.int64, device)
        self.rates = HostNumbers(self.group_count, device)
        statistic = torch.zeros(chunks.chunks, 3, device=device) if self.options.monitor else None
        return AdamTables(
            schedule=schedule,
            chunks=chunks,
            kinds=Kinds([(torch.float32, torch.float32, False)] * count, device),
            step=self.step,
            group=upload(self.groups, torch.int32, device),
            lr=self.rates.write([0.0] * self.group_count),
            hyper=torch.zeros(self.group_count, adam.HYPER_COLUMNS, device=device),
            params=upload(addresses(self.memory), torch.int64, device),
            grads=torch.zeros(count, dtype=torch.int64, device=device),
            moments=torch.tensor(rows, dtype=torch.int64).to(device),
            scalars=torch.zeros(count, adam.SCALAR_COLUMNS, device=device),
            statistic=statistic,
        )

    def _refresh_hyper(self, tables: AdamTables) -> None:
        groups = self.optimizer.param_groups
        lr = list(map(get_lr, groups))
        if lr != self.lr:
            self.lr, tables.lr = lr, self.rates.write(lr)
        hyper = list(map(get_hyper, groups))
        if hyper != self.hyper:
            self.hyper = hyper
            rows = chain.from_iterable(map(self._hyper_row, groups))
            upload(list(rows), torch.float32, tables.hyper.device, into=tables.hyper.view(-1))

    def _hyper_row(self, group: dict) -> list[float]:
        betas, eps, weight_decay = get_hyper(group)
        return hyper_row(betas, eps, weight_decay, self.options.decoupled)

    def _refresh_gradients(self, tables: AdamTables) -> None:
        """Sends the gradients' addresses, if any has moved.

        Autograd gives a gradient the dtype and the strides of its parameter, so a gradient that
        stays where it was is not looked at again.
        """
        gradients = list(map(get_grad, self.params))
        if not are_at(gradients, self.grad_addresses):
            found = self.grad_addresses = addresses(gradients)
            present = [g for g in gradients if g is not None]
            signature = (list(map(get_dtype, present)), [address & 15 for address in found])
            self.staged = self._odd_gradients(gradients, present)
            if self.staged or signature != self.signature:
                self.signature = signature
                tables.kinds, tables.launches = self._kinds(gradients), None
                tables.moved_bytes = self._moved_bytes(gradients)
            actual = found.copy()
            # An empty tensor has no address, and yet a step to count; nothing reads it.
            for i in self.empty:
                actual[i] = int(gradients[i] is not None)
            for i, buffer in self.staged.items():
                actual[i] = buffer.data_ptr()
            upload(actual, torch.int64, tables.grads.device, into=tables.grads)
        for i, buffer in self.staged.items():
            if (gradient := gradients[i]) is not None:
                buffer.copy_(gradient)

    def _odd_gradients(
        self, gradients: list[Tensor | None], present: list[Tensor]
    ) -> dict[int, Tensor]:
        """Buffers in the parameter's layout for the gradients that have another."""
        plain = all(map(Tensor.is_contiguous, present)) and self.contiguous
        if plain and TRITON_DTYPES.keys() >= set(map(get_dtype, present)):
            return {}
        odd = {}
        for i, (memory, g) in enumerate(zip(self.memory, gradients, strict=True)):
            if g is not None and (g.stride() != memory.stride() or g.dtype not in TRITON_DTYPES):
                odd[i] = torch.empty_like(memory)
        return odd

    def _kinds(self, gradients: list[Tensor | None]) -> Kinds:
        kinds = []
        for i, (p, g) in enumerate(zip(self.memory, gradients, strict=True)):
            found = self.staged.get(i, p if g is None else g)
            aligned = (p.data_ptr() | found.data_ptr()) % 16 == 0
            kinds.append((p.dtype, found.dtype, aligned))
        return Kinds(kinds, self.step.device)

    def _moved_bytes(self, gradients: list[Tensor | None]) -> int:
        total = 0
        for p, g in zip(self.params, gradients, strict=True):
            if g is not None:
                moments = (t for name, t in self.optimizer.state[p].items() if name != "step")
                total += g.nbytes + 2 * (p.nbytes + sum(t.nbytes for t in moments))
        return total

    def _run_on_cpu(self, divisor: Tensor | None, skip: Tensor | None) -> None:
        if skip is not None and skip.item() != 0:
            return
        inverse = 1.0 if divisor is None else 1.0 / divisor.item()
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            group, state = self.optimizer.param_groups[self.groups[i]], self.optimizer.state[p]
            row = self._hyper_row(group)
            memory = self.memory[i].copy_(p) if i in self.shadows else p
            gradient = flat(torch.empty_like(memory, dtype=torch.float32).copy_(p.grad)) * inverse
            old, step = flat(memory).float(), state["step"].add_(1)
            m, v = (read_moment(state, name, self.options.layout) for name in MOMENTS)
            new, m, v = adam.reference(old, gradient, m, v, step, group["lr"], row)
            self.sums[i] = torch.stack([x.square().sum() for x in (gradient, new - old, new)])
            flat(memory).copy_(new)
            write_moments(
                state, m, v, self.options.layout, step_seed(self.options.seed, int(step), i)
            )
            if memory is not p:
                p.copy_(memory)
