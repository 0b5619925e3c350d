"""New heads: modules, or single parameters, that the checkpoint must not fill, and their start."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastft.config import NewHead
from fastft.errors import CheckpointError, ConfigError, nearest
from fastft.names import first_few, is_under, state_dict, unwrapped

# weight_norm divides by the norm, which zero weights lack; other parametrizations of zero may be
# anything but zero.
_DERIVED = ("weight_g", "weight_v", "original", "original0", "original1")


@dataclass(frozen=True)
class HeadStart:
    """What new heads start from.

    Attributes:
        names: the model's tensors in new heads.
        values: those that do not keep the model's initialisation, and their values.
        used: the checkpoint's tensors that were inherited.
    """

    names: tuple[str, ...]
    values: dict[str, Tensor] = field(default_factory=dict)
    used: frozenset[str] = frozenset()


def start_heads(
    model: nn.Module,
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    new_heads: Mapping[str, NewHead],
) -> HeadStart:
    """Plans how new heads start; changes nothing.

    Args:
        target: the model's tensors; tied names hold the same object.
        source: the checkpoint's tensors, under the model's names and the file's own.

    Raises:
        ConfigError: a head that the model lacks, or that cannot start this way.
        CheckpointError: an inherited head is not in the checkpoint or has other shapes.
    """
    modules = {unwrapped(name): module for name, module in model.named_modules() if name}
    _check_names(modules, target, new_heads)
    names = tuple(name for name in target if is_under(name, new_heads))
    values: dict[str, Tensor] = {}
    used: set[str] = set()
    # A head inside another one has the last word.
    for head, settings in sorted(new_heads.items(), key=lambda item: item[0].count(".")):
        if settings.init == "zero":
            last = _last_layer(head, modules[head]) if head in modules else [head]
            values |= {name: torch.zeros(()).expand(target[name].shape) for name in last}
        elif settings.init == "inherit":
            parts = [name for name in target if is_under(name, [head])]
            found = _inherited(head, settings.source or "", parts, target, source)
            values |= {name: source[origin] for name, origin in found.items()}
            used |= set(found.values())
    return HeadStart(names, values, frozenset(used))


@torch.no_grad()
def start_as(model: nn.Module, fresh: nn.Module, heads: Collection[str]) -> None:
    """Gives these modules or parameters of the model the values of a fresh one's."""
    values = state_dict(fresh)
    for name, tensor in state_dict(model).items():
        if is_under(name, heads):
            tensor.copy_(values[name])


def _check_names(
    modules: Mapping[str, nn.Module],
    target: Mapping[str, Tensor],
    new_heads: Mapping[str, NewHead],
) -> None:
    problems = []
    outside = {id(tensor): name for name, tensor in target.items() if not is_under(name, new_heads)}
    for head, settings in new_heads.items():
        where = f"finetune.new_heads.{head}"
        inside = [name for name in target if is_under(name, [head])]
        tied = [f"{n} is {outside[id(target[n])]}" for n in inside if id(target[n]) in outside]
        if head not in modules and head not in target:
            guess = nearest(head, [*modules, *target])
            problems.append(f"{where}: must name a module of the model; got none{guess}")
        elif not inside:
            problems.append(f"{where}: must have parameters; got none; name a module around it")
        elif tied:
            problems.append(
                f"{where}: must share no tensor with the rest of the model; got {first_few(tied)};"
                " untie them or leave this head out"
            )
        elif settings.init == "inherit" and not settings.source:
            problems.append(f"{where}.source: must name a module of the checkpoint; got nothing")
    if problems:
        raise ConfigError(problems)


def _last_layer(head: str, module: nn.Module) -> list[str]:
    """Parameter names of the last module with parameters of its own; zero, it outputs zero, and
    still has gradients."""
    layers = [
        [f"{head}.{unwrapped(f'{prefix}.{name}')}".replace("..", ".") for name in own]
        for prefix, layer in module.named_modules()
        if (own := [name for name, _ in layer.named_parameters(recurse=False)])
    ]
    where = f"finetune.new_heads.{head}.init: 'zero' needs a last layer that may be zero; got"
    if not layers:
        raise ConfigError(f"{where} no parameters; use 'random'")
    if any(name.endswith(_DERIVED) for name in layers[-1]):
        raise ConfigError(f"{where} {first_few(layers[-1])}, reparametrised weights; use 'random'")
    return layers[-1]


def _inherited(
    head: str,
    module: str,
    names: Iterable[str],
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
) -> dict[str, str]:
    """The head's tensor names and those of the checkpoint's module that fill them."""
    # By what follows the head's name: '.weight', or nothing for a single parameter.
    shapes = {name.removeprefix(head): tuple(target[name].shape) for name in names}

    def misfits(candidate: str) -> list[str]:
        wrong = []
        for name, shape in shapes.items():
            found = source.get(f"{candidate}{name}")
            if found is None or tuple(found.shape) != shape:
                there = "nothing" if found is None else list(found.shape)
                wrong.append(f"{there} for {head}{name} {list(shape)}")
        return wrong

    wrong = misfits(module)
    if not wrong:
        return {f"{head}{name}": f"{module}{name}" for name in shapes}
    some = next(iter(shapes))
    alike = [name.removesuffix(some) for name in source if name.endswith(some)]
    fitting = [candidate for candidate in alike if not misfits(candidate)]
    there = any(is_under(name, [module]) for name in source)
    got = f"'{module}' with {first_few(wrong)}" if there else f"no module '{module}'"
    advice = f"name one that fits: {first_few(fitting)}" if fitting else "use init = 'random'"
    others = f" (modules that do not fit: {first_few(alike)})" if alike and not fitting else ""
    raise CheckpointError(
        f"finetune.new_heads.{head}.source: must be a module of the checkpoint with the head's"
        f" shapes; got {got}; {advice}{others}"
    )
