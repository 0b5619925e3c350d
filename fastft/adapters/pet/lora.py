"""Upstream's low-rank updates, made so that they add nothing at first.

Upstream starts both factors at random, so that a tuned model begins worse than its checkpoint; it
freezes new heads, and has no function that merges.
"""

from pathlib import Path

import torch
from metatrain.pet import PET
from metatrain.pet.modules.finetuning import LoRALinear, inject_lora_layers

from fastft.adapters.pet.options import LoraOptions
from fastft.errors import ConfigError, nearest


def low_rank_names(model: PET) -> list[str]:
    """Names of the updates' parameters."""
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def add_lora(model: PET, options: LoraOptions, checkpoint: Path | None) -> list[str]:
    """Puts updates beside linear modules, or checks that they are those that the model has.

    Returns:
        Names of the parameters that were made.

    Raises:
        ConfigError: no module has the name, or the model has other updates.
    """
    config = {
        "rank": options.rank,
        "alpha": options.alpha,
        "target_modules": list(options.target_modules),
    }
    if low_rank_names(model):
        own = model.finetune_config["config"]
        if own != {name: config[name] for name in own}:
            raise ConfigError(
                f"model.options.lora: must be the checkpoint's, {own}; got {config}; correct it, or"
                " leave it out to train those"
            )
        return []
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    if problems := [
        "model.options.lora.target_modules: must be last parts of names of linear modules; got"
        f" '{name}'{nearest(name, sorted(linear))}"
        for name in options.target_modules
        if name not in linear
    ]:
        raise ConfigError(problems)
    inject_lora_layers(model, options.target_modules, options.rank, options.alpha)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.zeros_(module.lora_B.weight)
    # By which upstream makes the layers anew when it reads the checkpoint.
    model.finetune_config = {
        "method": "lora",
        "read_from": str(checkpoint or ""),
        "config": config,
        "inherit_heads": {},
    }
    return low_rank_names(model)


@torch.no_grad()
def merge_updates(model: PET) -> None:
    """Folds the updates into the weights, in place; a plain model is left."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                update = child.lora_B.weight @ child.lora_A.weight
                child.linear.get_parameter("weight").add_(child.scaling * update)
                setattr(parent, name, child.linear)
    model.finetune_config = {}
