"""`[model.options]` of the pet adapter, and `options` of its data sets."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True)
TARGET = r"^energy(/[\w-]+)?$"
_WEIGHT = Field(ge=0, description="Weight of this part, an average over its values.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PetLossOptions:
    """Errors of the energy per atom, of forces and of the virial per atom, in the target's scale.

    The defaults are upstream's.
    """

    kind: Annotated[
        Literal["mse", "mae", "huber"], Field(description="What is averaged of each error.")
    ] = "mse"
    delta: Annotated[
        float, Field(gt=0, description="'huber': errors beyond this count linearly.")
    ] = 1.0
    energy: Annotated[float, _WEIGHT] = 1.0
    forces: Annotated[float, _WEIGHT] = 1.0
    stress: Annotated[float, _WEIGHT] = 1.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoraOptions:
    """Upstream's low-rank updates, which add nothing at first: W x + alpha / rank B A x, B = 0."""

    rank: Annotated[int, Field(ge=1, description="Rank of the updates.")] = 4
    alpha: Annotated[float, Field(gt=0, description="Their factor, times the rank.")] = 8.0
    target_modules: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="Last parts of the names of the linear modules updated."),
    ] = ("input_linear", "output_linear")
    merge: Annotated[
        bool,
        Field(
            description="Fold them into the weights at the export. Else they stay, and `mtt train`"
            " can go on with them."
        ),
    ] = True


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TargetOptions:
    """One target."""

    inherit_heads: Annotated[
        str | None, Field(description="Target of the checkpoint whose heads a new one starts from.")
    ] = None
    unit: Annotated[
        str | None,
        Field(
            description="Unit of the energies; default: the checkpoint's, 'eV' of a new target. A"
            " checkpoint's that states another is refused."
        ),
    ] = None
    description: Annotated[str, Field(description="Of a new target, for who reads the model.")] = ""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PetOptions(TargetOptions):
    """`[model.options]` of the pet adapter."""

    target: Annotated[
        str,
        Field(
            pattern=TARGET,
            description="Energy to train: 'energy', or a variant of it such as 'energy/pbe0'. One"
            " that the checkpoint does not have gets new heads.",
        ),
    ] = "energy"
    targets: Annotated[
        dict[str, TargetOptions],
        Field(
            description="Of further targets, which data sets name, what inherit_heads, unit and"
            " description are of `target`."
        ),
    ] = field(default_factory=dict)
    keep_targets: Annotated[
        bool,
        Field(
            description="Keep those of the checkpoint's targets that no data set holds; they are"
            " not trained, so that all else should be frozen. Else they are dropped."
        ),
    ] = False
    head_modules: Annotated[
        tuple[str, ...],
        Field(description="Modules that `finetune.method = 'heads'` trains, by upstream's names."),
    ] = ("node_heads", "edge_heads")
    last_layer_modules: Annotated[
        tuple[str, ...], Field(description="More of them: the last layers.")
    ] = ("node_last_layers", "edge_last_layers")
    lora: Annotated[
        LoraOptions | None,
        Field(description="Upstream's low-rank updates, which `finetune.method = 'lora'` trains."),
    ] = None
    export_as_energy: Annotated[
        str | None,
        Field(
            description="Target that exports hold under the name 'energy', by which simulation"
            " engines look for it; another one of that name is left out of them."
        ),
    ] = None
    forces: Annotated[bool, Field(description="Train on forces.")] = True
    stress: Annotated[bool, Field(description="Train on stress, of periodic structures.")] = False
    hypers: Annotated[
        dict[str, Any],
        Field(
            description="Upstream's model hypers, over its defaults; for a model without a"
            " checkpoint."
        ),
    ] = field(default_factory=dict)
    elements: Annotated[
        tuple[str, ...], Field(description="Chemical symbols, for a model without a checkpoint.")
    ] = ()
    dtype: Annotated[
        Literal["float32", "float64"], Field(description="Of weights and computations.")
    ] = "float32"
    augment: Annotated[
        bool, Field(description="Turn and reflect each training structure at random, as upstream.")
    ] = True
    fit: Annotated[
        Literal["new", "always"],
        Field(
            description="Whether composition energies and scale are fitted to the training data for"
            " new targets only, as upstream does, or anew for one that the checkpoint has."
        ),
    ] = "new"
    kernels: Annotated[
        Literal["auto", "off"],
        Field(
            description="'auto': on a GPU and in float32, attention that forces are computed"
            " through runs on fastft's kernel, which rounds otherwise than upstream's."
        ),
    ] = "auto"
    fill_batches: Annotated[
        bool,
        Field(
            description="Fill training batches up with atoms that have no neighbours and do not"
            " count, so that batches of molecules of all sizes have few numbers of atoms, and"
            " `step.cuda_graphs` few graphs. It is work on some percent more atoms, for nothing"
            " without graphs, or where all batches have as many atoms."
        ),
    ] = False
    rescale_heads: Annotated[
        bool,
        Field(
            description="Multiply last layers by old scale / new scale where a scale is fitted for"
            " heads that are inherited, or a target's own with `fit = 'always'`, unless"
            " `finetune.new_heads` has them at random: training begins at the old potential."
            " Upstream does not: it begins at new scale / old scale times that."
        ),
    ] = True
    loss: Annotated[PetLossOptions, Field(description="The loss.")] = PetLossOptions()


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AtomsOptions:
    """`options` of a data set: where its file, which ASE reads, has what."""

    target: Annotated[
        str | None,
        Field(
            pattern=TARGET,
            description="The target whose labels these are; default: model.options.target.",
        ),
    ] = None
    lacks: Annotated[
        tuple[Literal["forces", "stress"], ...],
        Field(description="Labels that these data do not have, though the model is trained on."),
    ] = ()
    frames: Annotated[
        str, Field(description="Structures to take, as a slice: ':80', '80:', '::2'.")
    ] = ":"
    energy: Annotated[str, Field(description="Name of the energies, in the target's unit.")] = (
        "energy"
    )
    forces: Annotated[str, Field(description="Name of the forces, per angstrom.")] = "forces"
    stress: Annotated[
        str, Field(description="Name of the stress, per cubic angstrom; tension is positive.")
    ] = "stress"
    virial: Annotated[
        str | None, Field(description="Name of the virial, instead of `stress`: -stress x volume.")
    ] = None
