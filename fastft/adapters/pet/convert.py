"""`fastft convert`: the options file of `mtt train` as a run file."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols
from metatrain.utils.architectures import get_default_hypers
from metatrain.utils.omegaconf import expand_loss_config
from omegaconf import OmegaConf

from fastft.adapters.pet.build import unsupported
from fastft.adapters.pet.convert_data import DataReader, Part, labels
from fastft.adapters.pet.options_file import BASE, read_options
from fastft.adapters.pet.scores import score_name
from fastft.errors import ConfigError
from fastft.task import Conversion

# Of upstream's training options: those that are at their place here, or change no result.
_KNOWN = {
    *("batch_size", "num_epochs", "warmup_fraction", "learning_rate", "weight_decay"),
    *("log_interval", "checkpoint_interval", "num_workers", "best_model_metric", "grad_clip_norm"),
    *("loss", "finetune", "log_mae", "log_separate_blocks", "distributed_port"),
    "max_atoms_per_batch",
}
_KINDS = ("mse", "mae", "huber")


def convert(path: Path) -> Conversion:
    """The run file of an options file; its data are read, since epochs become steps.

    Raises:
        ConfigError: it cannot be read, or has no energies.
        DataError: a file of structures cannot be read.
        AdapterError: it is of another architecture.
    """
    options = read_options(path)
    try:
        return _converted(options, f"runs/{path.stem}")
    except ConfigError as error:
        raise ConfigError(f"{path}: {problem}" for problem in error.problems) from error


def _converted(options: Mapping[str, Any], folder: str) -> Conversion:
    hypers = get_default_hypers("pet")["training"] | options["architecture"].get("training", {})
    reader = DataReader(options)
    parts = reader.splits()
    training = parts["training"]
    if not training:
        raise ConfigError(
            "training_set.targets: must have an energy, 'energy' or a variant of it; got none;"
            " write a run file by hand"
        )
    default = next(iter(training[0].names))
    notes = reader.notes
    notes += _unknown(options, hypers)
    wanted = {
        label for part in training for names in part.names.values() for label in labels(names)
    }
    per_epoch = _steps_per_epoch(training, hypers["batch_size"])
    tree = {
        "run": {
            **{"folder": folder, "steps": per_epoch * hypers["num_epochs"]},
            **_device(options, notes),
        },
        "model": _model(options, hypers["finetune"], reader, parts, wanted, notes),
        "data": _data(hypers, reader, parts, default, wanted, notes),
        **_training(hypers, per_epoch),
    }
    # As in the examples: on a CPU it takes minutes, for little.
    if tree["run"].get("device") != "cpu":
        tree["step"] |= {"compile": "blocks", "cuda_graphs": "auto"}
        tree["model"]["options"]["fill_batches"] = True
        notes.append(
            "step.compile, step.cuda_graphs, model.options.fill_batches: are 'blocks', 'auto' and"
            " true here, for a GPU; for short runs or a CPU set 'off', 'off' and false"
        )
    if loss := _loss(hypers["loss"], training, notes):
        tree["model"]["options"]["loss"] = loss
    if tree["model"].get("checkpoint"):
        tree["finetune"] = {"method": hypers["finetune"].get("method", "full")}
    if "validation" in tree["data"]:
        # Of a new target that says none; a checkpoint's own is not known here.
        unit = training[0].targets[default]["unit"] or "eV"
        monitor = _monitor(hypers, default, unit, "forces" in wanted, notes)
        tree["checkpoint"]["monitor"] = monitor
        tree["evaluate"] = {"every_steps": per_epoch}
    return Conversion(tree, notes)


def _unknown(options: Mapping[str, Any], hypers: Mapping[str, Any]) -> Iterator[str]:
    """What is set and has no counterpart."""
    yield from (f"{name}: has no counterpart" for name in options if name not in BASE)
    given = options["architecture"].get("training", {})
    usual = get_default_hypers("pet")["training"]
    for name, value in given.items():
        if name not in _KNOWN and value != usual.get(name):
            yield f"architecture.training.{name}: has no counterpart; got {value}"
    if hypers["max_atoms_per_batch"] is not None:
        yield (
            "architecture.training.max_atoms_per_batch: has no counterpart; steps and batches are"
            f" of {hypers['batch_size']} structures instead"
        )
    if (
        hypers["finetune"].get("read_from") is not None
        and "atomic_types" in options["architecture"]
    ):
        yield "architecture.atomic_types: has no counterpart; they are the checkpoint's"


def _targets(
    training: Sequence[Part], finetune: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """`target` and its settings, and `targets` of the others."""
    inherited = finetune.get("inherit_heads") or {}
    made: dict[str, dict[str, Any]] = {}
    trained = {target for part in training for target in part.names}
    notes += [
        f"architecture.training.finetune.inherit_heads.{target}: is no target that is trained here"
        for target in inherited
        if target not in trained
    ]
    for part in training:
        for target in part.names:
            given = part.targets[target]
            if not given["unit"]:
                notes.append(
                    f"{part.where}.targets.{target}.unit: is not said; a new target's is eV here"
                )
            settings = {
                "unit": given["unit"],
                "description": given["description"],
                "inherit_heads": inherited.get(target),
            }
            if settings["inherit_heads"]:
                notes.append(
                    "architecture.training.finetune.inherit_heads: heads are rescaled here, so that"
                    f" '{target}' begins at the old potential; model.options.rescale_heads = false"
                    " begins as upstream"
                )
            made[target] = {name: value for name, value in settings.items() if value}
    first, *others = made
    tree: dict[str, Any] = {"target": first, **made[first]}
    if more := {target: made[target] for target in others if made[target]}:
        tree["targets"] = more
    return tree


def _method(finetune: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Settings of upstream's method of fine-tuning."""
    if finetune.get("read_from") is None:
        return {}
    config = finetune.get("config") or {}
    match finetune.get("method", "full"):
        case "heads":
            # Upstream keeps what is not trained, with this method alone.
            return {"keep_targets": True, **config}
        case "lora":
            notes.append(
                "architecture.training.finetune: low-rank updates start at zero here, and heads of"
                " new targets are trained with them; exports have them folded in"
            )
            if "alpha" in config:
                config = {**config, "alpha": float(config["alpha"])}
            return {"lora": config}
    return {}


def _steps_per_epoch(training: Sequence[Part], batch_size: int) -> int:
    """Upstream's: whole batches of each data set."""
    for part in training:
        if len(part.indices) < batch_size:
            raise ConfigError(
                "architecture.training.batch_size: must not exceed a data set's structures,"
                f" {len(part.indices)} of {part.where}; got {batch_size}; lower it"
            )
    return sum(len(part.indices) // batch_size for part in training)


def _device(options: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """`run.seed` and `run.device`."""
    run = {"seed": options["seed"]} if "seed" in options else {}
    device = options.get("device", "auto")
    if device in ("cpu", "cuda", "gpu"):
        return {**run, "device": "cuda" if device == "gpu" else device}
    if device != "auto":
        notes.append(f"device: must be cpu or one GPU here; got {device}")
    return run


def _model(
    options: Mapping[str, Any],
    finetune: Mapping[str, Any],
    reader: DataReader,
    parts: Mapping[str, Sequence[Part]],
    wanted: set[str],
    notes: list[str],
) -> dict[str, Any]:
    """`[model]`."""
    architecture, training = options["architecture"], parts["training"]
    model = _targets(training, finetune, notes)
    model |= {"forces": "forces" in wanted, "stress": "stress" in wanted}
    match options.get("base_precision", 32):
        case 64:
            model["dtype"] = "float64"
        case precision if precision != 32:
            notes.append(f"base_precision: must be 32 or 64; got {precision}")
    usual = get_default_hypers("pet")["model"]
    # Merged, since some are nested.
    merged: Any = OmegaConf.merge(usual, architecture.get("model", {}))
    hypers: Any = OmegaConf.to_container(merged)
    if given := {name: value for name, value in hypers.items() if value != usual[name]}:
        model["hypers"] = given
    notes += [f"architecture.model: {part} has no counterpart" for part in unsupported(hypers)]
    checkpoint = finetune.get("read_from")
    if checkpoint is not None:
        return {
            "adapter": "pet",
            "checkpoint": str(checkpoint),
            "options": {**model, **_method(finetune, notes)},
        }
    numbers = architecture.get("atomic_types") or reader.elements([*training, *parts["validation"]])
    model["elements"] = [chemical_symbols[number] for number in sorted(numbers)]
    return {"adapter": "pet", "options": model}


def _data(
    hypers: Mapping[str, Any],
    reader: DataReader,
    parts: Mapping[str, Sequence[Part]],
    default: str,
    wanted: set[str],
    notes: list[str],
) -> dict[str, Any]:
    """`[data]`."""
    names = {"training": "train", "validation": "validation", "test": "test"}
    data: dict[str, Any] = {
        names[split]: reader.sources(each, default, wanted) for split, each in parts.items() if each
    }
    data["batch_size"] = hypers["batch_size"]
    if hypers["num_workers"] is not None:
        data["workers"] = hypers["num_workers"]
    training = parts["training"]
    most = max(len(part.names) for part in training)
    if most > 1:
        data["batch_size"] *= most
        notes.append(
            f"training_set: structures with labels of {most} targets are listed once for each, so"
            f" that batches hold {most} times as many"
        )
    elif len(training) > 1:
        # Upstream's batches hold structures of one data set.
        data["mixing"] = "batch"
    if len(training) > 1:
        sizes = [len(part.indices) // hypers["batch_size"] for part in training for _ in part.names]
        for source, size in zip(data["train"], sizes, strict=True):
            source["weight"] = float(size)
    return data


def _training(hypers: Mapping[str, Any], per_epoch: int) -> dict[str, Any]:
    """Sections on how it is trained."""
    decay = hypers["weight_decay"]
    optim: dict[str, Any] = {"name": "adam", "lr": float(hypers["learning_rate"])}
    if decay is not None:
        optim |= {
            **{"name": "adamw", "weight_decay": float(decay)},
            **{"decay_norms_and_biases": True},
        }
    warmup = int(hypers["warmup_fraction"] * per_epoch * hypers["num_epochs"])
    return {
        "optim": optim | {"schedule": {"name": "cosine", "warmup_steps": warmup}},
        "gradients": {"clip_norm": float(hypers["grad_clip_norm"])},
        "step": {"precision": "fp32"},
        "checkpoint": {"every_steps": per_epoch * hypers["checkpoint_interval"]},
        "log": {"every_steps": per_epoch * hypers["log_interval"]},
    }


def _loss(given: Any, training: Sequence[Part], notes: list[str]) -> dict[str, Any]:
    """`[model.options.loss]`: kinds and weights of the first target."""
    config = OmegaConf.create(
        {
            "architecture": {"training": {"loss": given}},
            "training_set": [{"targets": dict(part.targets)} for part in training],
        }
    )
    try:
        expanded: Any = OmegaConf.to_container(expand_loss_config(config))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"architecture.training.loss: must be a loss of metatrain's; got {error}; correct it"
        ) from error
    losses = expanded["architecture"]["training"]["loss"]
    target = next(iter(training[0].names))
    if any(losses[name] != losses[target] for part in training for name in part.names):
        notes.append(f"architecture.training.loss: targets have one loss here, that of {target}")
    parts = {"energy": losses[target]}
    for label, gradient in (("forces", "positions"), ("stress", "strain")):
        if gradient in losses[target]["gradients"]:
            parts[label] = losses[target]["gradients"][gradient]
    kinds = {part["type"] for part in parts.values()}
    kind = parts["energy"]["type"]
    if (
        len(kinds) > 1
        or kind not in _KINDS
        or any(p["reduction"] != "mean" for p in parts.values())
    ):
        notes.append(
            "architecture.training.loss: all parts have one kind of mean here,"
            f" {', '.join(_KINDS)}; got {', '.join(sorted(kinds))}"
        )
    loss: dict[str, Any] = {"kind": kind} if kind in _KINDS[1:] else {}
    if kind == "huber":
        loss["delta"] = float(parts["energy"]["delta"])
    return loss | {
        label: float(part["weight"]) for label, part in parts.items() if part["weight"] != 1
    }


def _monitor(
    hypers: Mapping[str, Any], target: str, unit: str, forces: bool, notes: list[str]
) -> str:
    """The value of an evaluation that names the best checkpoint."""
    metric = hypers["best_model_metric"]
    if metric == "loss":
        return metric
    error = metric.removesuffix("_prod")
    monitor = score_name("forces" if forces else "energy", target, unit, error)
    notes.append(
        f"architecture.training.best_model_metric: a product of errors has no counterpart; here"
        f" {monitor} names the best checkpoint"
    )
    return monitor
