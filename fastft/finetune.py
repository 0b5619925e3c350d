"""What is trained: methods, freezing, low-rank adaptation, train and eval modes.

Names are those of the unwrapped model: what torch.compile, checkpointing and peft put in between is
left out of every name that a user reads or writes.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from fastft.config import FinetuneConfig, LoraConfig
from fastft.errors import ConfigError, nearest
from fastft.task import Task

_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|base_layer)\.")


def clean_name(name: str) -> str:
    """A parameter's or module's name in the unwrapped model."""
    return _WRAPPERS.sub("", name)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under their names in the unwrapped model; tied ones once."""
    for name, parameter in model.named_parameters():
        yield clean_name(name), parameter


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's persistent tensors under their names in the unwrapped model."""
    return {clean_name(name): tensor for name, tensor in model.state_dict().items()}


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `state_dict` returned into a model of the same structure."""
    raw = {clean_name(name): name for name in model.state_dict()}
    model.load_state_dict({raw[name]: tensor for name, tensor in state.items()})


def matching(
    patterns: Iterable[str], names: Sequence[str], *, where: str, what: str = "parameter"
) -> list[str]:
    """The names that match any of the globs, in their order.

    Raises:
        ConfigError: for every glob that matches nothing.
    """
    matched: set[str] = set()
    problems = []
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            hint = nearest(pattern, names)
            problems.append(f"{where}: '{pattern}' must match a {what}; it matches none{hint}")
        matched.update(found)
    if problems:
        raise ConfigError(problems)
    return [name for name in names if name in matched]


def apply_method(task: Task, config: FinetuneConfig) -> None:
    """Freezes, and with `lora` wraps, the model in place as `[finetune]` says.

    Raises:
        ConfigError: a name or glob that matches nothing, or nothing left to train.
    """
    model = task.model
    new_heads = tuple(config.new_heads) or tuple(task.heads)
    if config.method == "lora":
        _inject_lora(model, config.lora, keep=new_heads)
    trained = {
        "full": ("*",),
        "heads": _modules(model, config.heads or new_heads, "finetune.heads"),
        "probe": _modules(model, new_heads, "finetune.new_heads"),
        "lora": ("*lora_*", *_modules(model, tuple(config.new_heads), "finetune.new_heads")),
    }[config.method]
    parameters = dict(named_parameters(model))
    names = list(parameters)
    for name, parameter in parameters.items():
        matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in trained)
        parameter.requires_grad_(matches and parameter.is_floating_point())
    frozen = matching(config.freeze, names, where="finetune.freeze")
    frozen += _of_types(model, config.freeze_types)
    for stage, unfreeze in enumerate(config.unfreeze):
        frozen += matching(unfreeze.match, names, where=f"finetune.unfreeze.{stage}.match")
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not config.unfreeze and not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(
            f"finetune: must leave something to train; method '{config.method}' with these heads"
            " and freezes leaves nothing; name a head or freeze less"
        )


def staged_names(model: nn.Module, config: FinetuneConfig) -> dict[str, int]:
    """Parameters that start frozen -> the first step that trains them."""
    names = [name for name, _ in named_parameters(model)]
    staged: dict[str, int] = {}
    for stage, unfreeze in enumerate(config.unfreeze):
        for name in matching(unfreeze.match, names, where=f"finetune.unfreeze.{stage}.match"):
            staged[name] = min(unfreeze.at_step, staged.get(name, unfreeze.at_step))
    return staged


def set_train_mode(model: nn.Module) -> None:
    """Train mode, except for modules whose parameters are all frozen.

    A frozen batch norm must not move its running statistics, nor a frozen encoder drop units. A
    batch norm without parameters follows the module that holds it.
    """
    model.train()
    for parent in model.modules():
        for child in parent.children():
            own = list(child.parameters())
            if not own and isinstance(child, nn.modules.batchnorm._BatchNorm):
                own = list(parent.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                child.eval()


def merge_lora(model: nn.Module) -> None:
    """Folds low-rank updates into the weights they adapt, in place; does nothing without any."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "get_base_layer") and hasattr(child, "merge"):
                cast(Any, child).merge(safe_merge=True)
                setattr(parent, name, cast(Any, child).get_base_layer())


def _inject_lora(model: nn.Module, config: LoraConfig, keep: Sequence[str]) -> None:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "finetune.method: 'lora' needs the package peft; install fastft[peft]"
        ) from None
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    adaptable = [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and getattr(module, "groups", 1) == 1
        and not any(name == head or name.startswith(head + ".") for head in keep)
    ]
    if not adaptable:
        raise ConfigError("finetune.method: 'lora' needs linear or convolution modules; got none")
    chosen = matching(
        config.targets, adaptable, where="finetune.lora.targets", what="linear or convolution"
    )
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=cast(int, config.alpha),
            lora_dropout=config.dropout,
            # A regular expression is matched whole; a list would match by suffix.
            target_modules="|".join(re.escape(name) for name in chosen),
        ),
        model,
    )


def _modules(model: nn.Module, heads: Sequence[str], where: str) -> tuple[str, ...]:
    """Globs for the parameters of the named modules."""
    names = [clean_name(name) for name, _ in model.named_modules() if name]
    problems = [
        f"{where}: '{head}' must be a module of the model; it is not{nearest(head, names)}"
        for head in heads
        if head not in names
    ]
    if problems:
        raise ConfigError(problems)
    return tuple(pattern for head in heads for pattern in (head, head + ".*"))


def _of_types(model: nn.Module, types: Sequence[str]) -> list[str]:
    """Names of the parameters in modules of these classes (or of their subclasses)."""
    classes: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        inside = [clean_name(f"{prefix}.{name}") for name, _ in module.named_parameters()]
        for kind in type(module).__mro__:
            if prefix and issubclass(kind, nn.Module) and kind is not nn.Module:
                classes.setdefault(kind.__name__, []).extend(inside)
    problems = [
        f"finetune.freeze_types: '{kind}' must be the class of a module; it is none"
        f"{nearest(kind, classes)}"
        for kind in types
        if kind not in classes
    ]
    if problems:
        raise ConfigError(problems)
    return [name for kind in types for name in classes[kind]]


def unfreeze(model: nn.Module, staged: Mapping[str, int], step: int) -> list[str]:
    """Makes the parameters due at `step` or before trainable; returns those that were not yet."""
    due = []
    for name, parameter in named_parameters(model):
        if name in staged and staged[name] <= step and not parameter.requires_grad:
            parameter.requires_grad_(True)
            due.append(name)
    return due
