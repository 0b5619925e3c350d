"""Parameter groups, schedules and the optimizer.

Adam is fastft's own on a GPU, every other optimizer torch's, fused where torch has it. An update
takes two device scalars, a divisor for the gradients and a skip flag, so that unscaling, clipping
and skipping need neither another pass over the gradients nor the host.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from fastft_kernels import FusedAdam
from rich.table import Table
from torch import Tensor, nn

from fastft.config import OptimConfig, ScheduleConfig
from fastft.errors import CheckpointError, ConfigError, nearest
from fastft.fused import TORCH_ONLY, Kernels
from fastft.names import matching, named_parameters
from fastft.task import Task

# What peft adds to a layer's name for the low-rank update of its weight.
_ADAPTER = re.compile(r"\.lora_\w+\..*$")


@dataclass(frozen=True)
class Group:
    """Parameters that share their settings.

    Attributes:
        name: what put them together, such as 'head.*' or 'layer 3, no decay'.
        parameters: name in the unwrapped model -> parameter.
        lr: peak learning rate.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    lr: float
    weight_decay: float
    betas: tuple[float, float]


def make_groups(task: Task, config: OptimConfig, staged: Mapping[str, int]) -> list[Group]:
    """Sorts the trainable parameters into groups; the first rule that matches one wins.

    Args:
        task: whose model is frozen as the run asks.
        config: rules, layer-wise decay, defaults.
        staged: parameters that are frozen now and trained later.

    Raises:
        ConfigError: a rule that matches no parameter, or only ones that are never trained; a
            trained embedding whose gradients are sparse.
    """
    parameters = dict(named_parameters(task.model))
    trained = {n: p for n, p in parameters.items() if p.requires_grad or n in staged}
    _refuse_sparse(task.model, trained.values())
    layers = _layer_factors(task, config)
    groups: dict[tuple[Any, ...], dict[str, nn.Parameter]] = {}
    used: set[int] = set()
    for name, parameter in trained.items():
        index = _first_match(name, config)
        used.add(index)
        rule = config.groups[index] if index >= 0 else None
        label = ", ".join(rule.match) if rule else "default"
        layer, factor = layers.get(_ADAPTER.sub(".weight", name), (None, 1.0))
        lr = rule.lr if rule and rule.lr is not None else config.lr * factor
        if layer is not None and (rule is None or rule.lr is None):
            label = f"{label}, layer {layer}" if rule else f"layer {layer}"
        decay = config.weight_decay
        if rule and rule.weight_decay is not None:
            decay = rule.weight_decay
        if decay and parameter.ndim <= 1 and not config.decay_norms_and_biases:
            decay, label = 0.0, f"{label}, no decay"
        if name in staged:
            label = f"{label}, from step {staged[name]}"
        betas = rule.betas if rule and rule.betas is not None else config.betas
        groups.setdefault((label, lr, decay, betas), {})[name] = parameter
    _refuse_idle_rules(config, used, list(parameters), list(trained))
    return [Group(label, found, *settings) for (label, *settings), found in groups.items()]


def group_table(groups: Sequence[Group], task: Task) -> Table:
    """Group, tensors, parameters, learning rate, decay, where they differ betas; what is frozen."""
    columns = ["group", "tensors", "parameters", "lr", "weight decay"]
    several_betas = len({group.betas for group in groups}) > 1
    table = Table(title="Parameter groups")
    for column in [*columns, *(["betas"] if several_betas else [])]:
        table.add_column(column, justify="left" if column == "group" else "right")
    for group in groups:
        count = sum(p.numel() for p in group.parameters.values())
        row = (str(len(group.parameters)), f"{count:,}", f"{group.lr:.3g}")
        betas = [f"{group.betas[0]:g}, {group.betas[1]:g}"] if several_betas else []
        table.add_row(group.name, *row, f"{group.weight_decay:.3g}", *betas)
    trained = {name for group in groups for name in group.parameters}
    frozen = [p for name, p in named_parameters(task.model) if name not in trained]
    if frozen:
        count = sum(p.numel() for p in frozen)
        table.add_row("frozen", str(len(frozen)), f"{count:,}", "-", "-")
    return table


def schedule_factor(config: ScheduleConfig, step: int, total: int) -> float:
    """The learning rate at a step (0-based) over its peak; pure, so nothing to restore."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    after = step - config.warmup_steps
    # Over the total, not the last step's number: a last step at rate 0 would be wasted.
    progress = min(1.0, after / max(1, total - config.warmup_steps))
    match config.name:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - config.end_factor) * progress
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
            return config.end_factor + (1 - config.end_factor) * share
        case "step":
            return config.gamma ** (after // config.step_size)


# Of both moments, per parameter. 8 bits: two codes, and an exponent for every 128 of either.
MOMENT_BYTES = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 2 / 128}


def state_bytes(config: OptimConfig) -> float:
    """What the optimizer keeps per trained fp32 parameter, in bytes."""
    if config.name == "sgd":
        return 4.0
    if config.name == "rmsprop":
        return 8.0 if config.momentum else 4.0
    return MOMENT_BYTES[config.moments]


class Optimizer:
    """A torch optimizer over the groups, with its schedule.

    Args:
        groups: from `make_groups`.
        config: the run file's `[optim]`.
        total_steps: length of the schedule.
        kernels: whether Adam is fastft's.
        seed: of the rounding of moments in fewer bits.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        config: OptimConfig,
        total_steps: int,
        kernels: Kernels = TORCH_ONLY,
        seed: int = 0,
    ) -> None:
        self.groups, self.config = groups, config
        self._schedule = config.schedule
        self._total_steps = total_steps
        self._inner = _make_inner(groups, config, kernels, seed)
        self._fused = config.name != "rmsprop"
        self._has_momentum = config.name == "sgd"
        self.forget()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of every group, by name."""
        return {name: p for group in self.groups for name, p in group.parameters.items()}

    def lr_factor(self, step: int) -> float:
        """Learning rates at a step over their peaks."""
        return schedule_factor(self._schedule, step, self._total_steps)

    def learning_rates(self, step: int) -> dict[str, float]:
        """Group name -> learning rate at a step."""
        factor = self.lr_factor(step)
        return {group.name: group.lr * factor for group in self.groups}

    def update(self, step: int, divisor: Tensor, skip: Tensor, *, rate: float = 1.0) -> None:
        """One update; nothing changes where `skip` is not 0.

        Args:
            step: number of the step, for the schedule.
            divisor: fp32 device scalar; gradients are divided by it first.
            skip: fp32 device scalar, 0 or 1.
            rate: multiplies the learning rates; at 0 parameters stay, and all the work is done.
        """
        factor = rate * self.lr_factor(step)
        for group, settings in zip(self.groups, self._inner.param_groups, strict=True):
            settings["lr"] = group.lr * factor
        if isinstance(self._inner, FusedAdam):
            self._inner.step(grad_divisor=divisor, skip=skip)
        elif self._fused:
            # The contract by which torch's GradScaler hands both to a fused optimizer.
            inner = cast(Any, self._inner)
            inner.grad_scale, inner.found_inf = divisor, skip
            inner.step()
        else:
            self._guarded_step(divisor, skip)

    def update_norms(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Parameter name -> L2 norms of its last update and of the parameter; on the device.

        Only fastft's Adam measures them, while it updates; empty for others.
        """
        if not isinstance(self._inner, FusedAdam):
            return {}
        found = self._inner.statistics()
        names = {parameter: name for name, parameter in self.parameters.items()}
        updated = [names[cast(nn.Parameter, p)] for p in self._inner.parameters]
        return dict(zip(updated, zip(found.update, found.weight, strict=True), strict=True))

    def forget(self) -> None:
        """Drops moments and step counts; the next update begins anew."""
        self._inner.state.clear()
        if isinstance(self._inner, FusedAdam):
            self._inner.load_state_dict({**self._inner.state_dict(), "state": {}})
        if self._has_momentum:
            # torch makes momentum buffers in the first update, uninitialised where that is skipped.
            for parameter in self.parameters.values():
                self._inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self._inner.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> its optimizer state."""
        return {name: dict(self._inner.state.get(p, {})) for name, p in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            CheckpointError: the trained parameters are not those of the checkpoint.
        """
        parameters = self.parameters
        if set(state) != set(parameters):
            odd = sorted(set(state) ^ set(parameters))
            raise CheckpointError(
                f"optimizer: must train the same parameters as the checkpoint; {len(odd)} differ,"
                f" the first is '{odd[0]}'; resume with the settings that the run began with"
            )
        for name, values in state.items():
            parameter = parameters[name]
            if values and isinstance(self._inner, FusedAdam):
                self._inner.load_parameter_state(parameter, values)
            elif values:
                # Step counters stay where torch keeps them: beside the parameter when fused.
                self._inner.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) else value
                    for key, value in values.items()
                }

    def _guarded_step(self, divisor: Tensor, skip: Tensor) -> None:
        """For optimizers without a fused form: keep a copy, undo the step on the device."""
        trained = [p for p in self.parameters.values() if p.grad is not None]
        torch._foreach_div_(  # pyright: ignore[reportPrivateImportUsage]
            [cast(Tensor, p.grad) for p in trained], divisor
        )
        before = [p.detach().clone() for p in trained]
        states = [
            {key: value.clone() for key, value in self._inner.state.get(p, {}).items()}
            for p in trained
        ]
        self._inner.step()
        undo = skip != 0
        with torch.no_grad():
            for parameter, old, state in zip(trained, before, states, strict=True):
                torch.where(undo, old, parameter, out=parameter.data)
                for key, value in self._inner.state[parameter].items():
                    torch.where(undo, state.get(key, torch.zeros_like(value)), value, out=value)


def _make_inner(
    groups: Sequence[Group], config: OptimConfig, kernels: Kernels, seed: int
) -> torch.optim.Optimizer:
    adam = config.name in ("adam", "adamw")
    settings = [
        {
            "params": list(group.parameters.values()),
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            **({"betas": group.betas} if adam else {}),
        }
        for group in groups
    ]
    if kernels.adam:
        return FusedAdam(
            settings,
            eps=config.eps,
            decoupled=config.name == "adamw",
            state_layout=config.moments,
            monitor=True,
            seed=seed,
        )
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(settings, lr=config.lr, eps=config.eps, fused=True),
        "adam": lambda: torch.optim.Adam(settings, lr=config.lr, eps=config.eps, fused=True),
        "sgd": lambda: torch.optim.SGD(
            settings,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=True,
        ),
        "rmsprop": lambda: torch.optim.RMSprop(
            settings,
            lr=config.lr,
            alpha=config.alpha,
            eps=config.eps,
            momentum=config.momentum,
            # Keeps the step counter on the device, where the guarded step can undo it.
            capturable=next(iter(groups[0].parameters.values())).is_cuda,
        ),
    }
    return kinds[config.name]()


def _first_match(name: str, config: OptimConfig) -> int:
    """The first rule that matches a parameter, -1 for none."""
    for index, rule in enumerate(config.groups):
        if matching(rule.match, [name]):
            return index
    return -1


def _refuse_sparse(model: nn.Module, trained: Collection[nn.Parameter]) -> None:
    ids = {id(parameter) for parameter in trained}
    names = [
        name or "the model"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.sparse
        and id(module.weight) in ids
    ]
    if names:
        raise ConfigError(
            f"model: gradients must be dense; got sparse ones from {', '.join(names)}; build"
            " embeddings with sparse = False, or freeze them"
        )


def _refuse_idle_rules(
    config: OptimConfig, used: set[int], names: list[str], trained: list[str]
) -> None:
    problems = []
    for index, rule in enumerate(config.groups):
        if index in used:
            continue
        where = f"optim.groups.{index}.match"
        patterns = ", ".join(f"'{pattern}'" for pattern in rule.match)
        if matching(rule.match, trained):
            problems.append(f"{where}: {patterns} match only what earlier rules took; move it up")
        elif matching(rule.match, names):
            problems.append(
                f"{where}: {patterns} match only frozen parameters; unfreeze or drop it"
            )
        else:
            hint = nearest(rule.match[0], names)
            problems.append(f"{where}: {patterns} must match a parameter; none does{hint}")
    if problems:
        raise ConfigError(problems)


def _layer_factors(task: Task, config: OptimConfig) -> dict[str, tuple[int, float]]:
    """Parameter name -> layer number and `layer_decay ** (last layer - layer)`."""
    if config.layer_decay is None:
        return {}
    layers = dict(task.layers) if task.layers is not None else layers_from_blocks(task)
    if not layers:
        raise ConfigError(
            "optim.layer_decay: needs a model with layers; the adapter names no blocks; drop it"
        )
    last = max(layers.values())
    return {name: (n, config.layer_decay ** (last - n)) for name, n in layers.items()}


def layers_from_blocks(task: Task) -> dict[str, int]:
    """Layer numbers in definition order: 0 before the first layer's block, then one per block with
    what follows it, and one more for what follows the last."""
    blocks = task.layer_blocks
    if not blocks:
        return {}
    layers: dict[str, int] = {}
    reached = 0
    for name, _ in named_parameters(task.model):
        for number, block in enumerate(blocks, start=1):
            if name.startswith(block.name + "."):
                reached = max(reached, number)
                layers[name] = number
                break
        else:
            layers[name] = reached if reached < len(blocks) else len(blocks) + 1
    return layers
