"""Data sets, how they are read and checked."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastft.config.base import Count, Positive, describe, strict


@dataclass(frozen=True, kw_only=True, config=strict)
class DataSource:
    """One data set."""

    path: Annotated[Path, describe("File or folder.")]
    format: Annotated[
        Literal["auto", "npz", "images", "adapter"],
        describe("'npz': arrays; 'images': one folder per class; 'adapter': read by the adapter."),
    ] = "auto"
    name: Annotated[str | None, describe("Name in logs and messages; default: the path.")] = None
    weight: Annotated[Positive, describe("Share of the samples when data sets are mixed.")] = 1.0
    fields: Annotated[
        dict[str, str], describe("npz: field name -> array name, where they differ.")
    ] = Field(default_factory=dict)
    options: Annotated[dict[str, Any], describe("Settings for the adapter's reader.")] = Field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True, config=strict)
class ChecksConfig:
    """Data checks before the first step."""

    max_samples: Annotated[Count, describe("Samples read per data set.")] = 1000
    outlier_sigma: Annotated[
        Positive, describe("Values farther than this many standard deviations are outliers.")
    ] = 12.0
    imbalance: Annotated[
        Positive, describe("Largest tolerated ratio of the most to the least frequent class.")
    ] = 20.0
    ignore: Annotated[tuple[str, ...], describe("Names of checks to leave out.")] = ()


@dataclass(frozen=True, kw_only=True, config=strict)
class ReplayConfig:
    """A buffer of samples that the model itself carries on: its predictions become data.

    Each micro-batch draws samples of the buffer at random; what the model makes of them takes their
    place, for the next time they are drawn, one step later.
    """

    size: Annotated[Count, describe("Samples in the buffer.")] = 200
    refresh: Annotated[
        Count, describe("Micro-batches after which fresh data take the oldest sample's place.")
    ] = 10
    longest: Annotated[
        Count, describe("Steps that are predicted from a sample, before fresh data take its place.")
    ] = 40
    save: Annotated[
        bool,
        describe(
            "Save the buffer with checkpoints. Without it, a resumed run begins with data in its"
            " place, at the same steps, and differs from one that was not interrupted."
        ),
    ] = True


@dataclass(frozen=True, kw_only=True, config=strict)
class DataConfig:
    """Data sets and how they are read."""

    train: Annotated[tuple[DataSource, ...], describe("Training data sets.", min_length=1)]
    validation: Annotated[tuple[DataSource, ...], describe("Data to evaluate on.")] = ()
    test: Annotated[tuple[DataSource, ...], describe("For `evaluate --split test`.")] = ()
    batch_size: Annotated[
        Count | Literal["fit"],
        describe(
            "Samples per micro-batch; 'fit': the largest that fits into the GPU's memory and"
            " divides samples_per_step."
        ),
    ] = 32
    samples_per_step: Annotated[
        Count | None,
        describe("Samples per optimizer step, instead of step.accumulate; batch_size divides it."),
    ] = None
    evaluation_batch_size: Annotated[
        Count | None, describe("Samples per evaluation batch; default: batch_size.")
    ] = None
    mixing: Annotated[
        Literal["sample", "batch"],
        describe("Several data sets: mix within a batch, or draw one data set per batch."),
    ] = "sample"
    replay: Annotated[
        ReplayConfig | None, describe("Train on what the model predicted before.")
    ] = None
    workers: Annotated[int, describe("Processes per loader; 0 reads in the main one.", ge=0)] = 0
    prefetch: Annotated[Count, describe("Batches each worker reads ahead.")] = 2
    checks: Annotated[ChecksConfig, describe("Data checks.")] = ChecksConfig()

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch; 1 while what fits is not known."""
        return 1 if self.batch_size == "fit" else self.batch_size

    def __post_init__(self) -> None:
        """Refuses sizes that do not go together."""
        if self.batch_size == "fit" and self.samples_per_step is None:
            raise ValueError("batch_size 'fit' needs samples_per_step; got none; set it")
        if self.samples_per_step is not None and self.samples_per_step % self.micro_batch:
            raise ValueError(
                f"samples_per_step must be a multiple of batch_size; got {self.samples_per_step}"
                f" and {self.batch_size}; change one"
            )
        if self.replay is not None and self.mixing != "sample":
            raise ValueError(
                f"replay mixes data sets within a batch; got mixing '{self.mixing}'; drop one of"
                " them"
            )
        # What fits may be all of a step's samples.
        largest = self.samples_per_step if self.batch_size == "fit" else self.batch_size
        if self.replay is not None and self.replay.size < (largest or 1):
            raise ValueError(
                f"replay.size must be at least that of a batch; got {self.replay.size} and"
                f" {largest}; raise it"
            )
