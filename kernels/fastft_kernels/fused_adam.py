"""`FusedAdam`: a `torch.optim.Optimizer` over the kernels of `adam`, with torch AdamW's state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastft_kernels import adam
from fastft_kernels.adam_plan import AdamOptions, AdamPlan, StateLayout, StepStatistics
from fastft_kernels.adam_state import MOMENTS, new_moments
from fastft_kernels.device import FLOAT_DTYPES
from fastft_kernels.rounding import decode_moment, encode_moment
from fastft_kernels.tensor_table import flat, memory_of


def _is_watched(optimizer: Optimizer) -> bool:
    """Whether a profiler, or a hook of this or of all optimizers, looks at its steps."""
    return bool(
        profiler._is_profiler_enabled
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _check_settings(group: Mapping[str, Any]) -> None:
    """Of a group that a user made, or that another optimizer saved."""
    if isinstance(group["lr"], Tensor):
        raise ValueError("FusedAdam: lr must be a float; got a tensor; pass lr.item()")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"FusedAdam: betas must be in [0, 1); got {group['betas']}")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"FusedAdam: {name} must be 0 or more; got {group[name]}")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"FusedAdam: {name} is not supported; turn it off")


def _check_state(p: Tensor, saved: Mapping[str, Any]) -> None:
    if not {"step", *MOMENTS} <= set(saved):
        raise ValueError(
            "FusedAdam: a saved state must hold step, exp_avg and exp_avg_sq, as Adam's does;"
            f" got {', '.join(sorted(saved)) or 'nothing'}"
        )
    if "max_exp_avg_sq" in saved:
        raise ValueError("FusedAdam: amsgrad is not supported; turn it off")
    for name in MOMENTS:
        if saved[name].shape != p.shape:
            raise ValueError(
                f"FusedAdam: {name} must have its parameter's shape, {tuple(p.shape)}; got"
                f" {tuple(saved[name].shape)}; load the state of the same model"
            )


class FusedAdam(Optimizer):
    """Adam or AdamW: every tensor of every group in one pass over memory.

    On the CPU the same update runs in plain torch. Learning rates are Python floats that a schedule
    may change at every step; kernels read them from the host, and nothing waits.

    Args:
        params: parameters, or groups of them with their own lr, betas, eps, weight_decay.
        decoupled: weight decay shrinks the parameter (AdamW), else it joins the gradient (Adam).
        state_layout: moments in float32 (8 bytes per parameter), in bf16 with stochastic rounding
            (4 bytes) or in 8-bit blocks (2.02 bytes).
        monitor: keep per-tensor sums of squares, read by `statistics()`.
        seed: of the stochastic rounding; the same seed and step give the same bits.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        decoupled: bool = True,
        state_layout: StateLayout = "fp32",
        monitor: bool = False,
        seed: int = 0,
    ) -> None:
        if state_layout not in adam.SCHEDULES:
            raise ValueError(
                f"FusedAdam: state_layout must be one of {sorted(adam.SCHEDULES)}; got "
                f"{state_layout!r}"
            )
        self._options = AdamOptions(decoupled, state_layout, monitor, seed)
        self._plan: AdamPlan | None = None
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group at any time; its parameters start at step 0."""
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self._check_params(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        self._plan = None

    @staticmethod
    def _check_params(params: Iterable[Tensor]) -> None:
        for p in params:
            if hasattr(p, "to_local"):
                raise ValueError(
                    "FusedAdam: parameters must be plain tensors; got a DTensor; use torch AdamW "
                    "for sharded parameters"
                )
            if p.dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"FusedAdam: parameters must be float32, bfloat16 or float16; got {p.dtype}"
                )

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_divisor: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Any:
        """One update of every parameter that has a gradient; nothing waits for the GPU.

        Args:
            closure: recomputes the loss, as in torch.
            grad_divisor: 0-dim float32 on the parameters' device; gradients are divided by it:
                the loss scale over the clip coefficient.
            skip: 0-dim float32 on the device; other than 0, parameters, moments and step counts
                stay as they are.
        """
        # What torch puts around every optimizer's step takes the host a quarter of this one's time.
        step = self._hooked_step if _is_watched(self) else self._step
        return step(closure, grad_divisor=grad_divisor, skip=skip)

    # Tells torch to put nothing around it.
    step.hooked = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_divisor: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plan is None or self._plan.is_stale():
            self._plan = AdamPlan(self, self._options)
        self._plan.run(grad_divisor, skip)
        return loss

    _hooked_step = Optimizer.profile_hook_step(_step)

    def statistics(self) -> StepStatistics:
        """Norms of gradient, update and weight per parameter, on the device (monitor=True)."""
        if self._plan is None or not self._options.monitor:
            raise RuntimeError("FusedAdam.statistics: pass monitor=True and take a step first")
        return self._plan.statistics()

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that have been updated so far, in the order of `statistics`."""
        return [] if self._plan is None else list(self._plan.params)

    def state_dict(self) -> dict[str, Any]:
        """As torch AdamW's: per parameter step, exp_avg, exp_avg_sq; 8-bit moments in float32."""
        state_dict = super().state_dict()
        state_dict["state"] = {
            key: self._portable(state) for key, state in state_dict["state"].items()
        }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state dict of a `FusedAdam` of any layout, or of torch's Adam or AdamW."""
        states = state_dict["state"]
        for group in state_dict["param_groups"]:
            _check_settings({**self.defaults, **group})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        # torch refuses another number of parameters.
        found = [(p, states[i]) for i, p in zip(ids, params, strict=False) if i in states]
        for p, state in found:
            _check_state(p, state)
        super().load_state_dict(state_dict)
        for p, state in found:
            # From the original: the base class casts moments to the parameter's dtype.
            self.state[p] = self._adopted(p, state)
        self._plan = None

    def load_parameter_state(self, p: nn.Parameter, saved: Mapping[str, Any]) -> None:
        """Sets one parameter's state from an entry of `state` or of `state_dict()["state"]`.

        Args:
            p: one of the optimizer's parameters.
            saved: step and moments, as `self.state[p]` of any layout or torch's AdamW holds them.
        """
        _check_state(p, saved)
        self.state[p] = self._adopted(p, saved)
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_plan": None}

    def _portable(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        portable = {"step": state["step"].float().clone()}
        for name in MOMENTS:
            value = state[name]
            if f"{name}_exponent" in state:
                codes, exponents = flat(value), state[f"{name}_exponent"]
                decoded = decode_moment(codes, exponents, name == "exp_avg")
                value = decoded.as_strided(value.shape, value.stride())
            portable[name] = value
        return portable

    def _adopted(self, p: nn.Parameter, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        here = {key: torch.as_tensor(value).to(p.device) for key, value in saved.items()}
        found = self._portable(here)
        state = {"step": found["step"], **new_moments(memory_of(p), self._options.layout)}
        for name in MOMENTS:
            value = found[name]
            if self._options.layout != "8bit":
                state[name].copy_(value)
                continue
            like = torch.empty_like(state[name], dtype=torch.float32).copy_(value)
            # Half up: exact for decoded values, nearest for others.
            half = torch.full((p.numel(),), 1 << 15, device=p.device)
            codes, exponents = encode_moment(flat(like), half, name == "exp_avg")
            flat(state[name]).copy_(codes)
            state[f"{name}_exponent"].copy_(exponents)
        return state
