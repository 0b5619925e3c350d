"""What is trained: methods, freezing, low-rank adaptation, train and eval modes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn

from fastft.config import FinetuneConfig, LoraConfig
from fastft.errors import ConfigError, nearest
from fastft.names import matching, named_parameters, namer, unmatched
from fastft.task import Task


def apply_method(task: Task, config: FinetuneConfig) -> None:
    """Freezes, and with `lora` wraps, the model in place as `[finetune]` says.

    Raises:
        ConfigError: a name or glob that matches nothing, or nothing left to train.
    """
    model = task.model
    new_heads = tuple(config.new_heads)
    made = tuple(f"{head}.*" for head in task.new_heads)
    match config.method:
        case "full":
            trained = ("*",)
        case "heads":
            heads = config.heads or new_heads or tuple(task.heads)
            trained = _modules(model, heads, "finetune.heads")
        case "probe":
            trained = _modules(model, new_heads or tuple(task.heads), "finetune.new_heads")
        case "lora" if task.low_rank:
            _refuse_idle_lora(config.lora)
            heads = _modules(model, new_heads, "finetune.new_heads")
            trained = (*task.low_rank, *heads, *made)
        case "lora":
            _inject_lora(model, config.lora, keep=(*new_heads, *task.new_heads))
            heads = _modules(model, new_heads, "finetune.new_heads")
            trained = ("*.lora_[AB].*", *heads, *made)
    parameters = dict(named_parameters(model))
    _refuse_idle_globs(config, list(parameters))
    for name, parameter in parameters.items():
        matches = bool(matching(trained, [name]))
        trainable = parameter.is_floating_point() or parameter.is_complex()
        parameter.requires_grad_(matches and trainable)
    staged = [pattern for stage in config.unfreeze for pattern in stage.match]
    for name in matching([*config.freeze, *staged], parameters):
        parameters[name].requires_grad_(False)
    for name in _of_types(model, config.freeze_types):
        parameters[name].requires_grad_(False)
    for name, parameter in parameters.items():
        if parameter.is_complex() and (parameter.requires_grad or matching(staged, [name])):
            raise ConfigError(
                f"finetune: cannot train complex parameters; got '{name}'; freeze them, or hold"
                " them as real pairs (torch.view_as_real) in the model"
            )
    at_once = any(stage.at_step == 0 for stage in config.unfreeze)
    if not at_once and not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(
            f"finetune: must leave something to train; method '{config.method}' with these heads"
            " and freezes leaves nothing; name a head or freeze less"
        )


def staged_names(model: nn.Module, config: FinetuneConfig) -> dict[str, int]:
    """Parameters that start frozen -> the first step that trains them."""
    names = [name for name, p in named_parameters(model) if p.is_floating_point()]
    staged: dict[str, int] = {}
    for stage in config.unfreeze:
        for name in matching(stage.match, names):
            staged[name] = min(stage.at_step, staged.get(name, stage.at_step))
    return staged


def set_train_mode(model: nn.Module, method: str) -> None:
    """Train mode, except for what is frozen.

    With 'probe' and 'heads' only modules whose parameters are all trained, and those that hold a
    trained parameter themselves, are in train mode: a frozen encoder must not drop units. With
    other methods all are, but for modules whose parameters are all frozen: a frozen batch norm must
    not move its running statistics. A batch norm without parameters follows the module that holds
    it.
    """
    if method in ("probe", "heads"):
        model.eval()
        for module in model.modules():
            own = [p.requires_grad for p in module.parameters()]
            if own and all(own):
                module.train()
            elif any(p.requires_grad for p in module.parameters(recurse=False)):
                module.training = True
        return
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
    # torch's attention reads the weight of its output projection and never calls it.
    bypassed = {
        f"{name}.out_proj".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    # Its fast path in eval mode reads the weights of whole encoder layers.
    torch.backends.mha.set_fastpath_enabled(False)
    adaptable = [
        name
        for name, module in model.named_modules()
        if name
        and name not in bypassed
        and isinstance(module, kinds)
        and getattr(module, "groups", 1) == 1
        and not any(name == head or name.startswith(head + ".") for head in keep)
    ]
    if not adaptable:
        raise ConfigError("finetune.method: 'lora' needs linear or convolution modules; got none")
    problems = unmatched(
        config.targets, adaptable, where="finetune.lora.targets", what="linear or convolution"
    )
    if problems:
        raise ConfigError(problems)
    chosen = matching(config.targets, adaptable)
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


def _refuse_idle_lora(config: LoraConfig) -> None:
    usual = LoraConfig()
    if config != usual:
        names = [
            f.name for f in fields(config) if getattr(config, f.name) != getattr(usual, f.name)
        ]
        raise ConfigError(
            "finetune.lora: must be absent where the model brings low-rank updates of its own; got"
            f" {', '.join(names)}; remove it, or switch the model's off"
        )


def _refuse_idle_globs(config: FinetuneConfig, names: Sequence[str]) -> None:
    problems = unmatched(config.freeze, names, where="finetune.freeze")
    for number, stage in enumerate(config.unfreeze):
        problems += unmatched(stage.match, names, where=f"finetune.unfreeze.{number}.match")
    if problems:
        raise ConfigError(problems)


def _modules(model: nn.Module, heads: Sequence[str], where: str) -> tuple[str, ...]:
    """Globs for the parameters of the named modules; a single parameter may be named too."""
    clean = namer(model)
    names = [clean(name) for name, _ in model.named_modules() if name]
    names += [name for name, _ in named_parameters(model)]
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
    clean = namer(model)
    classes: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        inside = [clean(f"{prefix}.{name}") for name, _ in module.named_parameters()]
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
