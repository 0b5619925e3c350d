"""`[model.options]` of the aurora adapter."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True)

# Those that Aurora was pretrained on, and has statistics for.
LEVELS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000)

# Bodnar et al. 2024 (arXiv 2405.13063), Supplement D: the weights w_k of the loss, in pretraining
# and in fine-tuning on IFS HRES at 0.25 degrees. Variables without one have weight 1.
LOSS_WEIGHTS = {
    "none": {},
    "pretrain": {
        **{"msl": 1.5, "10u": 0.77, "10v": 0.66, "2t": 3.0},
        **{"z": 2.8, "q": 0.78, "t": 1.7, "u": 0.87, "v": 0.6},
    },
    "ifs": {
        **{"msl": 1.6, "10u": 0.77, "10v": 0.66, "2t": 3.5},
        **{"z": 3.5, "q": 0.8, "t": 1.7, "u": 0.87, "v": 0.6},
    },
}

_VARIABLES = (
    " variables: an array of names takes just these; a table adds to those of the class, with"
    " their statistics"
)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AuroraLossOptions:
    """The paper's weighted mean absolute error of normalised variables."""

    preset: Annotated[
        Literal["none", "pretrain", "ifs"],
        Field(description="Weights of the paper's pretraining or of its IFS fine-tuning."),
    ] = "pretrain"
    weights: Annotated[
        dict[str, float], Field(description="Variable -> weight, over the preset's; default 1.")
    ] = field(default_factory=dict)
    alpha: Annotated[float, Field(ge=0, description="Weight of the surface variables.")] = 0.25
    beta: Annotated[float, Field(ge=0, description="Weight of the atmospheric variables.")] = 1.0
    gamma: Annotated[
        float, Field(gt=0, description="Weight of the data set; the paper's: 2 for ERA5, else 1.")
    ] = 1.0
    pushforward: Annotated[
        bool,
        Field(description="Roll-out: loss and gradients of the last step only, not of all steps."),
    ] = False


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AuroraOptions:
    """`[model.options]` of the aurora adapter."""

    model_class: Annotated[str, Field(description="Class of the package aurora.")] = (
        "AuroraPretrained"
    )
    arguments: Annotated[
        dict[str, Any], Field(description="Further arguments of the class's constructor.")
    ] = field(default_factory=dict)
    surf_vars: Annotated[
        tuple[Any, ...] | dict[str, Any] | None,
        Field(description=f"Surface{_VARIABLES}: tp = {{ location = 0.0, scale = 0.01 }}."),
    ] = None
    static_vars: Annotated[
        tuple[Any, ...] | dict[str, Any] | None,
        Field(description=f"Static{_VARIABLES} as for surf_vars."),
    ] = None
    atmos_vars: Annotated[
        tuple[Any, ...] | dict[str, Any] | None,
        Field(
            description=f"Atmospheric{_VARIABLES}, for all levels or by level in hPa:"
            ' r = { "500" = { location = 50.0, scale = 30.0 } }.'
        ),
    ] = None
    levels: Annotated[
        # Upstream's embedding of levels ends there.
        tuple[Annotated[int, Field(ge=1, le=100_000)], ...],
        Field(min_length=1, description="Pressure levels of the data in hPa."),
    ] = LEVELS
    masked: Annotated[
        tuple[str, ...],
        Field(
            description="Predicted variables that are NaN in places, as over land: targets that"
            " are do not count, inputs are filled with the variable's location."
        ),
    ] = ()
    new_embeddings: Annotated[
        Literal["zero", "random"],
        Field(
            description="Embeddings of variables that the class has not: 'zero' leaves what is"
            " predicted of the others as it was."
        ),
    ] = "zero"
    stabilise_level_agg: Annotated[
        bool | None,
        Field(
            description="Normalise keys and queries where levels are aggregated; default: the"
            " class's, true of AuroraWave."
        ),
    ] = None
    layer_norms: Annotated[
        tuple[str, ...],
        Field(
            description="Modules, `*` for any characters, whose output goes through an added layer"
            " norm; its gate starts at 0, which leaves the output as it was."
        ),
    ] = ()
    hook: Annotated[
        str | None,
        Field(
            description="'file.py:function' of your own, which gets the model and changes it, or"
            " returns a module around it."
        ),
    ] = None
    timestep_hours: Annotated[
        float | None, Field(gt=0, description="Lead time of a step; default: the class's.")
    ] = None
    rollout_steps: Annotated[
        int, Field(ge=1, description="Steps that each sample has targets for, and losses.")
    ] = 1
    hub: Annotated[
        bool, Field(description="Start from the class's weights on the Hugging Face hub.")
    ] = False
    autocast: Annotated[
        Literal["backbone", "all"],
        Field(
            description="What step.precision = 'bf16' or 'fp16' runs in: the backbone, as upstream,"
            " or encoder and decoder too. step.precision = 'fp32' turns it off."
        ),
    ] = "backbone"
    backbone: Annotated[
        Literal["step", "bf16"],
        Field(
            description="Under step.precision = 'fp16': 'bf16' runs the backbone in that, as"
            " upstream does, for weights that leave fp16's range there."
        ),
    ] = "step"
    chunk_patches: Annotated[
        int,
        Field(
            ge=1,
            description="Patches that encoder and decoder take at a time, where they aggregate"
            " levels: fewer take less memory, and one chunk of all gives upstream's bits.",
        ),
    ] = 4096
    kernels: Annotated[
        Literal["auto", "off"],
        Field(
            description="'auto': on a GPU, perceivers and Swin blocks that compute in 16 bits run"
            " on fastft's kernels, which round otherwise than upstream's; 'off': none does, and the"
            " update has step.kernels."
        ),
    ] = "auto"
    residual: Annotated[
        Literal["fp32", "autocast"],
        Field(
            description="With the kernels: precision of what the Swin blocks add to: upstream's, or"
            " that of step.precision from the first downsampling on, which takes less time and"
            " memory."
        ),
    ] = "fp32"
    loss: Annotated[AuroraLossOptions, Field(description="The loss.")] = AuroraLossOptions()
