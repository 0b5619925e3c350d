from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fastft.config import ChecksConfig, DataSource
from fastft.data import check_data, describe_findings
from fastft.data.checks import run_checks
from fastft.data.sources import ArrayData, OpenSource, open_source
from fastft.data.statistics import ChannelStatistics
from fastft.errors import AdapterError, ConfigError, DataError
from fastft.task import CheckData, Dataset, FieldSpec, Finding

SPECS = {
    "inputs": FieldSpec(mean=(0.0, 5.0), std=(1.0, 2.0), channel_axis=0),
    "targets": FieldSpec(classes=3, ignore_index=-1),
}


def clean_samples(number: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Fields: inputs `[2, 4]`, targets in 0..2, energy (no expectations), name."""
    rng = np.random.default_rng(seed)
    return [
        {
            "inputs": rng.normal(size=(2, 4)) * [[1], [2]] + [[0], [5]],
            "targets": index % 3,
            "energy": float(rng.normal(1e6)),
            "name": f"sample {index}",
        }
        for index in range(number)
    ]


@pytest.fixture
def find(adapter_of) -> Callable[..., list[Finding]]:
    def run(
        train: Dataset | Sequence,
        validation: Dataset | Sequence = (),
        specs: dict[str, FieldSpec] = SPECS,
        **settings: Any,
    ) -> list[Finding]:
        sources = [OpenSource("mine", "train", train, adapter_of())]
        if len(validation):
            sources.append(OpenSource("held out", "validation", validation, adapter_of()))
        return run_checks(sources, (), specs, ChecksConfig(**settings))

    return run


def test_clean_data_gives_no_findings(find):
    assert find(clean_samples(), clean_samples(seed=1)) == []


def set_input(index: int, value: float):
    def plant(samples: list[dict[str, Any]]) -> None:
        samples[index]["inputs"][1, 2] = value

    return plant


def set_all(field: str, value: Any):
    def plant(samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            sample[field] = value

    return plant


def set_one(index: int, field: str, value: Any):
    def plant(samples: list[dict[str, Any]]) -> None:
        samples[index][field] = value

    return plant


def scale_inputs(factor: float, offset: float):
    def plant(samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            sample["inputs"][1] = sample["inputs"][1] * factor + offset

    return plant


def flatten_channel(samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        sample["inputs"][1] = 5.0


def rare_class(samples: list[dict[str, Any]]) -> None:
    for sample in samples[1:]:
        sample["targets"] = int(sample["name"][-1]) % 2
    samples[0]["targets"] = 2


@pytest.mark.parametrize(
    ("plant", "check", "severity", "count", "what", "example"),
    [
        (set_input(7, np.nan), "non-finite", "error", 1, "got 1 NaN or infinite", "sample 7: nan"),
        (
            set_input(7, -np.inf),
            "non-finite",
            "error",
            1,
            "values must be finite",
            "sample 7: -inf",
        ),
        (set_one(4, "energy", None), "missing", "error", 1, "got 1 of 60 without", "sample 4"),
        (set_all("energy", None), "missing", "error", 60, "got 60 of 60 without", "sample 0"),
        (lambda s: s[9].pop("targets"), "missing", "error", 1, "1 of 60", "sample 9"),
        (
            lambda s: [sample.pop("targets") for sample in s],
            "missing",
            "warning",
            60,
            "the model expects it",
            "inputs, energy, name",
        ),
        (set_one(3, "targets", 3), "labels", "error", 1, "from 0 to 2; got 1", "sample 3: 3"),
        (set_one(3, "targets", -2), "labels", "error", 1, "from 0 to 2", "sample 3: -2"),
        (set_one(3, "targets", 1.0), "labels", "error", 1, "must be integers", "sample 3: 1.0"),
        (
            set_one(3, "targets", torch.tensor([0, 8, -1, 9])),
            "labels",
            "error",
            2,
            "got 2 other values",
            "sample 3: 8",
        ),
        (
            set_one(3, "inputs", np.arange(8.0).reshape(4, 2)),
            "shapes",
            "error",
            1,
            "channels along axis 0; got 1 of another",
            "sample 3: [4, 2]",
        ),
        (set_one(3, "inputs", np.ones((1, 2, 4))), "shapes", "error", 1, "2 dim", "sample 3: [1,"),
        (flatten_channel, "constant", "warning", 1, "throughout in channel 1", "value 5 in all 60"),
        (
            set_all("energy", 3.0),
            "constant",
            "warning",
            1,
            "one value throughout",
            "value 3 in all 60",
        ),
        (
            set_one(8, "inputs", np.zeros((2, 4))),
            "constant",
            "warning",
            1,
            "more than zeros; got 1",
            "sample 8",
        ),
        (
            set_input(7, 60.0),
            "outliers",
            "warning",
            1,
            "within 25 sigma of the model's mean; got 1",
            "sample 7, channel 1: 60, 28 sigma",
        ),
        (
            set_one(5, "energy", -9999.0),
            "outliers",
            "warning",
            1,
            "of the data's median",
            "sample 5, channel 0: -9999",
        ),
        (scale_inputs(1, 7), "drift", "warning", 1, "got channel 1 far", "channel 1: mean"),
        (scale_inputs(0.1, 4.5), "drift", "warning", 1, "got channel 1 far", "channel 1: mean"),
        (scale_inputs(5.6, -23), "drift", "warning", 1, "got channel 1 far", "channel 1: mean"),
        (rare_class, "imbalance", "warning", 1, "as often as class 2", "class 2: 1 times"),
        (set_all("targets", 1), "imbalance", "warning", 2, "2 of 3 classes never", "class 0: 0"),
    ],
)
def test_a_planted_defect_is_found_alone(find, plant, check, severity, count, what, example):
    samples = clean_samples()
    plant(samples)
    (finding,) = find(samples, outlier_sigma=25.0)
    assert (finding.check, finding.severity, finding.count) == (check, severity, count)
    assert what in finding.what
    assert example in finding.example
    assert find(samples, outlier_sigma=25.0, ignore=(check,)) == []


@pytest.mark.parametrize(("shared", "severity"), [(1, "warning"), (2, "error")])
def test_leakage_is_an_error_from_one_percent_on(find, shared, severity):
    train, validation = clean_samples(), clean_samples(150, seed=1)
    validation[11:11] = [{**sample, "targets": 0} for sample in train[5 : 5 + shared]]
    (finding,) = find(train, validation)
    assert (finding.check, finding.severity, finding.count) == ("leakage", severity, shared)
    assert finding.example == "sample 11 is sample 5 of mine (train)"


def test_leakage_is_seen_through_augmentation(adapter_of):
    def jitter(sample: dict[str, Any]) -> dict[str, Any]:
        sample["inputs"] += np.random.normal(size=(2, 4))  # noqa: NPY002
        return sample

    sources = [
        OpenSource(split, split, clean_samples(), adapter_of(change=jitter))
        for split in ("train", "validation")
    ]
    (finding,) = run_checks(sources, (), SPECS, ChecksConfig())
    assert (finding.check, finding.count) == ("leakage", 60)


def unique_rows(number: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"inputs": rng.normal(size=(number, 2)), "targets": rng.integers(3, size=number)}


def test_leakage_is_sought_in_all_of_a_large_array(find):
    train, validation = unique_rows(30_000, 0), unique_rows(300, 1)
    assert find(ArrayData(train), ArrayData(validation), {}, max_samples=100) == []
    # Of the 100 samples read of each, none has its twin among the other's.
    validation["inputs"][3:9] = train["inputs"][20_001:20_007]
    (finding,) = find(ArrayData(train), ArrayData(validation), {}, max_samples=100)
    assert (finding.check, finding.severity, finding.count) == ("leakage", "error", 2)
    assert "got 2 of 100 samples (2.0%) that are" in finding.what
    assert finding.example == "sample 3 is sample 20001 of mine (train)"


@pytest.mark.parametrize(("size", "severity"), [(30_000, "error"), (150, "warning")])
def test_leakage_is_estimated_where_part_of_the_training_data_is_read(find, size, severity):
    class Slow(list):
        """No arrays: each sample is read on its own."""

    train = Slow({"inputs": row} for row in unique_rows(size, 0)["inputs"])
    validation = Slow({"inputs": row} for row in unique_rows(2000, 1)["inputs"])
    # One of the 150 samples read of each.
    validation[0] = train[0]
    estimate = 100 * size / 150 / 150
    (finding,) = find(train, validation, {}, max_samples=150)
    assert (finding.check, finding.severity, finding.count) == ("leakage", severity, 1)
    share = f"{min(estimate, 100):.1f}%"
    if size > 150:
        share = f"an estimated {share} with unread ones"
    assert f"got 1 of 150 samples ({share}) that are" in finding.what


def test_all_validation_samples_from_300_000_training_samples(find):
    train = unique_rows(300_000, 0)
    validation = {name: array[::30] for name, array in train.items()}
    (finding,) = find(ArrayData(train), ArrayData(validation), {})
    assert (finding.check, finding.severity) == ("leakage", "error")
    assert "got 1000 of 1000 samples (100.0%) that are" in finding.what


def test_class_lists_must_agree(adapter_of):
    class Named(list):
        classes: Sequence[str] = ()

    train, validation = Named(clean_samples()), Named(clean_samples(seed=1))
    train.classes, validation.classes = ["cat", "dog", "emu"], ["cat", "emu"]
    sources = [
        OpenSource("a", "train", train, adapter_of()),
        OpenSource("b", "validation", validation, adapter_of()),
    ]
    (finding,) = run_checks(sources, (), SPECS, ChecksConfig())
    assert (finding.check, finding.severity, finding.example) == ("classes", "error", "'dog'")


def test_outliers_are_sought_in_data_of_another_unit_too(find):
    samples = clean_samples()
    scale_inputs(1, 300)(samples)
    set_input(7, 9999.0)(samples)
    drift, outliers = sorted(find(samples), key=lambda finding: finding.check)
    assert (drift.check, drift.count) == ("drift", 1)
    assert (outliers.check, outliers.count) == ("outliers", 1)
    assert "the data's median" in outliers.what


def test_unreadable_samples_are_listed_and_left_out(adapter_of):
    def change(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["name"] in ("sample 3", "sample 9"):
            raise OSError("gone")
        return sample

    def count_samples(data: CheckData):
        for name, split, samples in data.sources:
            number = len(list(samples))
            yield Finding("count-samples", "warning", name, split, number, "", "")

    source = OpenSource("mine", "train", clean_samples(), adapter_of(change=change))
    unreadable, counted = run_checks([source], [count_samples], SPECS, ChecksConfig())
    assert (unreadable.check, unreadable.count) == ("unreadable", 2)
    assert unreadable.example.startswith("mine: sample 3: must be readable; got OSError")
    assert counted.count == 58
    ignore = ChecksConfig(ignore=("count-samples", "unreadable"))
    assert run_checks([source], [count_samples], SPECS, ignore) == []


def test_a_large_data_set_is_read_evenly(find):
    read: set[int] = set()

    class Large:
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> dict[str, Any]:
            read.add(index)
            return {
                "inputs": np.random.default_rng(index).normal(size=3),
                "targets": index // 10**4,
            }

    # 100 classes in sorted order and 200 samples: too few to call a class absent.
    assert find(Large(), specs={"targets": FieldSpec(classes=110)}, max_samples=200) == []
    assert len(read) == 200
    assert max(np.diff(sorted(read))) == 5000


def test_checks_leave_the_global_generators_alone(adapter_of):
    def change(sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "drawn": torch.rand(3).numpy()}

    passes: list[list[Any]] = []

    def read_twice(data: CheckData) -> list[Finding]:
        for _ in range(2):
            passes.append([sample["drawn"].tolist() for sample in data.sources[0][2]])
        return []

    before = torch.get_rng_state()
    source = OpenSource("mine", "train", clean_samples(), adapter_of(change=change))
    run_checks([source], [read_twice], SPECS, ChecksConfig())
    assert passes[0] == passes[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_check_data_raises_all_errors_at_once_and_returns_warnings(adapter_of):
    samples = clean_samples()
    set_input(7, 60.0)(samples)
    source = OpenSource("mine", "train", samples, adapter_of())
    assert [f.check for f in check_data([source], (), SPECS, ChecksConfig())] == ["outliers"]
    set_input(8, np.nan)(samples)
    set_one(3, "targets", 3)(samples)
    with pytest.raises(DataError) as error:
        check_data([source], (), SPECS, ChecksConfig())
    assert error.value.problems == (
        "mine (train): inputs: values must be finite; got 1 NaN or infinite ones, as sample 8: nan;"
        " mask, fill or remove them (or add 'non-finite' to data.checks.ignore)",
        "mine (train): targets: class indices must be integers from 0 to 2; got 1 other values, as"
        " sample 3: 3; correct the labels, or the model's number of classes"
        " (or add 'labels' to data.checks.ignore)",
    )


def test_unknown_names_to_ignore(find):
    with pytest.raises(ConfigError, match=r"got 'nonfinite'; did you mean 'non-finite'\?"):
        find(clean_samples(), ignore=("nonfinite",))


def test_statistics_per_channel_need_an_axis(find):
    with pytest.raises(AdapterError, match=r"field 'inputs': .* set FieldSpec\.channel_axis"):
        find(clean_samples(), specs={"inputs": FieldSpec(mean=(0, 1))})


def test_findings_print(find):
    samples = clean_samples()
    samples[3]["inputs"] = np.ones((1, 2, 4))
    console = Console(width=200, record=True)
    console.print(describe_findings(find(samples)))
    text = console.export_text()
    assert "shapes" in text
    assert "sample 3: [1, 2, 4]" in text


def test_statistics_are_exact_far_from_zero():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 2, 9)) + np.array([[1e8], [-3.0]])
    statistics = ChannelStatistics(2)
    for sample in values:
        statistics.add(sample)
    flat = np.moveaxis(values, 1, 0).reshape(2, -1)
    assert statistics.mean == pytest.approx(flat.mean(axis=1), rel=1e-12)
    assert statistics.std == pytest.approx(flat.std(axis=1), rel=1e-6)


def test_npz_fields_flow_through_to_the_checks(adapter_of, write_npz: Callable[..., DataSource]):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    x[17, 2] = np.inf
    source = open_source(adapter_of(), write_npz(x=x), "train")
    (finding,) = run_checks([source], (), {}, ChecksConfig())
    assert finding.where == "data (train): x"
    assert finding.example == "sample 17: inf"
