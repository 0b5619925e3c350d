"""Parameters and tensors by name, as the user knows them: those of the unwrapped model.

What torch.compile, activation checkpointing, FSDP and peft put in between is left out of every name
that a user reads or writes.
"""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from fastft.errors import CheckpointError, nearest

_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def unwrapped(name: str) -> str:
    """A name without what torch's wrappers add to it, at any depth."""
    return _WRAPPERS.sub("", name)


def namer(model: nn.Module) -> Callable[[str], str]:
    """A function from the model's raw names to those of the unwrapped model."""
    # peft keeps an adapted layer in `base_layer`, a name that a model may use for itself.
    adapted = {name for name, module in model.named_modules() if hasattr(module, "get_base_layer")}

    def clean(name: str) -> str:
        parts = name.split(".")
        kept = [
            part
            for i, part in enumerate(parts)
            if part != "base_layer" or ".".join(parts[:i]) not in adapted
        ]
        return unwrapped(".".join(kept))

    return clean


def named_parameters(model: nn.Module, *, tied: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under their names in the unwrapped model; tied ones once, or under each name."""
    clean = namer(model)
    for name, parameter in model.named_parameters(remove_duplicate=not tied):
        yield clean(name), parameter


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's persistent tensors under their names in the unwrapped model.

    A module's extra state is no tensor and left out: models rebuild it.
    """
    clean = namer(model)
    return {clean(k): v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, where: object) -> None:
    """Loads what `state_dict` returned into a model of the same structure.

    Args:
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: the model has other tensors.
    """
    clean = namer(model)
    own = model.state_dict()
    raw = {clean(name): name for name in own}
    extra = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    try:
        model.load_state_dict({raw.get(k, k): tensor for k, tensor in state.items()} | extra)
    except RuntimeError as error:
        # torch lists the differences below a headline.
        first = str(error).splitlines()[:2][-1].strip(" \t.")
        raise CheckpointError(
            f"{where}: must hold the run file's model; got {first}; give the run file that it was"
            " trained with"
        ) from error


def unmatched(
    patterns: Iterable[str], names: Sequence[str], *, where: str, what: str = "parameter"
) -> list[str]:
    """A message for every glob that matches none of the names."""
    return [
        f"{where}: '{pattern}' must match a {what}; it matches none{nearest(pattern, names)}"
        for pattern in patterns
        if not fnmatch.filter(names, pattern)
    ]


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that match any of the globs, in their order."""
    patterns = tuple(patterns)
    return [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]


def is_under(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor belongs to one of the named modules, or is itself named."""
    modules = tuple(modules)
    return name in modules or name.startswith(tuple(f"{module}." for module in modules))


def first_few(items: Collection[str], count: int = 5) -> str:
    """`a, b, c and 12 more`."""
    shown = ", ".join(list(items)[:count])
    return f"{shown} and {len(items) - count} more" if len(items) > count else shown
