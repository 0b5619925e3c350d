"""Changes to a model beyond its class: layer norms at weak spots, and a user's own code."""

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import aurora
import torch
from aurora.model import swin3d
from aurora.model.decoder import LinearPatchReconstruction
from aurora.model.film import AdaptiveLayerNorm
from aurora.model.patchembed import LevelPatchEmbed
from aurora.model.perceiver import MLP, PerceiverAttention
from torch import Tensor, nn

from fastft.errors import AdapterError, ConfigError, nearest
from fastft.names import state_dict
from fastft.userfile import import_file

# The name under which a module holds the norm of its output.
NORM = "output_norm"
# Modules that return one tensor `[..., width]` -> their width.
_WIDTHS: dict[type[nn.Module], Callable[[Any], int]] = {
    nn.Linear: lambda m: m.out_features,
    LinearPatchReconstruction: lambda m: m.out_features,
    nn.LayerNorm: lambda m: m.normalized_shape[-1],
    AdaptiveLayerNorm: lambda m: m.ln.normalized_shape[-1],
    MLP: lambda m: m.net[2].out_features,
    PerceiverAttention: lambda m: m.to_out.out_features,
    LevelPatchEmbed: lambda m: m.embed_dim,
    swin3d.MLP: lambda m: m.fc2.out_features,
    swin3d.WindowAttention: lambda m: m.dim,
    swin3d.Swin3DTransformerBlock: lambda m: m.dim,
    swin3d.PatchMerging3D: lambda m: m.reduction.out_features,
    swin3d.PatchSplitting3D: lambda m: m.lin2.out_features,
}


class GatedLayerNorm(nn.Module):
    """y = x + g (norm(x) - x), with a learned gate g per channel that starts at 0.

    So at first y is x to the bit; at g = 1 it is the norm, which bounds what follows.

    Shapes: x and y `[..., width]`, in one dtype.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """The gated norm of x."""
        return (x + self.gate * (self.norm(x) - x)).to(x.dtype)


def insert_layer_norms(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Puts a `GatedLayerNorm` behind modules, as their child `output_norm`.

    To be called before `load_checkpoint_local` reads a checkpoint of such a model.

    Args:
        names: of modules, `*` for any characters.

    Returns:
        The modules' names.

    Raises:
        ConfigError: a name matches no module, or one that no norm can stand behind.
    """
    modules = dict(model.named_modules())
    chosen: dict[str, int] = {}
    problems = []
    for name in names:
        found = fnmatch.filter(modules, name)
        if not found:
            problems.append(
                f"model.options.layer_norms: '{name}' must match a module; it matches"
                f" none{nearest(name, [n for n in modules if n])}"
            )
        for match in found:
            if (width := _WIDTHS.get(type(modules[match]))) is None:
                kinds = ", ".join(kind.__name__ for kind in _WIDTHS)
                problems.append(
                    f"model.options.layer_norms: '{name}' must match modules of {kinds}; got"
                    f" {match or 'the model'}, a {type(modules[match]).__name__}; name others"
                )
                break
            chosen[match] = width(modules[match])
    if problems:
        raise ConfigError(problems)
    for name, width in chosen.items():
        if not hasattr(modules[name], NORM):
            modules[name].add_module(NORM, GatedLayerNorm(width))
            modules[name].register_forward_hook(_normalise_output)
    return list(chosen)


# A function of the module alone, so that a deep copy of the model uses the copy's norm.
def _normalise_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return getattr(module, NORM)(output)


def norms_of(model: nn.Module) -> list[str]:
    """The modules with an added norm, for `insert_layer_norms`."""
    return [
        n for n, m in model.named_modules() if isinstance(getattr(m, NORM, None), GatedLayerNorm)
    ]


def apply_hook(hook: str, model: aurora.Aurora) -> nn.Module:
    """What the user's function makes of the model: itself, changed, or a module around it.

    Args:
        hook: 'file.py:function'; the function gets the model, and returns a model or None.

    Raises:
        AdapterError: there is no such function, or what it returns does not hold the model.
    """
    file, _, name = hook.rpartition(":")
    if not file or not name.isidentifier():
        raise AdapterError(
            f"model.options.hook: must be 'file.py:function'; got '{hook}'; correct it"
        )
    module = import_file(Path(file), where="model.options.hook", error=AdapterError)
    change = getattr(module, name, None)
    if not callable(change):
        functions = [n for n, value in vars(module).items() if callable(value)]
        raise AdapterError(
            f"model.options.hook: {file} must define a function {name}; got"
            f" none{nearest(name, functions)}"
        )
    changed = change(model)
    if changed is None:
        return model
    if not isinstance(changed, nn.Module) or model not in changed.modules():
        raise AdapterError(
            f"model.options.hook: {name} in {file} must return None, or a module that is or holds"
            f" the model it was given; got {type(changed).__name__}; correct it"
        )
    return changed


def place_of(model: nn.Module) -> str:
    """What stands before the names of aurora's own model: '', or as 'inner.' in a user's module."""
    for name, module in model.named_modules():
        if isinstance(module, aurora.Aurora):
            return f"{name}." if name else ""
    raise AssertionError("no model of aurora's")


def aurora_of(model: nn.Module) -> aurora.Aurora:
    """aurora's own model, in a user's module or alone."""
    return cast(aurora.Aurora, model.get_submodule(place_of(model).rstrip(".")))


def extend(
    model: aurora.Aurora, layer_norms: Sequence[str], hook: str | None
) -> tuple[nn.Module, list[str]]:
    """The model with norms and the user's changes, and the names of what they added.

    Raises:
        ConfigError, AdapterError: see `insert_layer_norms` and `apply_hook`.
    """
    before = set(state_dict(model))
    insert_layer_norms(model, layer_norms)
    changed = model if hook is None else apply_hook(hook, model)
    place = place_of(changed)
    added = [
        name
        for name in state_dict(changed)
        if not (name.startswith(place) and name.removeprefix(place) in before)
    ]
    return changed, added
