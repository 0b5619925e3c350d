"""The core's data checks: each looks at what one pass over every data set gathered (`scan`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastft.config import ChecksConfig
from fastft.data.scan import FieldScan, SourceScan, Tally, all_digests
from fastft.data.statistics import ChannelStatistics
from fastft.errors import nearest
from fastft.task import FieldSpec, Finding

# Shared samples from which on validation no longer measures generalisation.
LEAKAGE_ERROR_SHARE = 0.01
DRIFT_MEAN_STDS = 3.0
DRIFT_STD_RATIO = 5.0
# Labels per class that a partial reading needs before a class counts as absent.
LABELS_PER_CLASS = 20


@dataclass(frozen=True)
class Scans:
    """What the core's checks look at."""

    sources: Sequence[SourceScan]
    specs: Mapping[str, FieldSpec]
    config: ChecksConfig

    def fields(self) -> Iterator[tuple[str, str, FieldScan]]:
        """Yields where, name and content of every field of every data set."""
        for scan in self.sources:
            for name, content in scan.fields.items():
                yield f"{scan.where}: {name}", name, content


def find_unreadable(scans: Scans) -> Iterator[Finding]:
    """Samples that cannot be read."""
    for scan in scans.sources:
        yield from _tallied(
            scan.unreadable,
            "unreadable",
            scan.where,
            f"samples must be readable; got {scan.unreadable.count} that are not",
            "repair or remove them",
        )


def find_missing(scans: Scans) -> Iterator[Finding]:
    """Fields that some samples lack, or that the model names and no sample has."""
    for scan in scans.sources:
        for name, content in scan.fields.items():
            if absent := sorted(set(scan.indices) - set(content.present)):
                what = f"must be in every sample; got {len(absent)} of {len(scan.indices)} without"
                where = f"{scan.where}: {name}"
                advice = "fill it in, or remove these samples"
                example = f"sample {absent[0]}"
                yield Finding("missing", "error", where, what, len(absent), example, advice)
        absent = [name for name in scans.specs if name not in scan.fields] if scan.indices else []
        for name in absent:
            what = "the model expects it; got no sample that has it"
            example = f"sample {scan.indices[0]} has {', '.join(scan.fields)}"
            advice = f"map it in `fields`{nearest(name, scan.fields)}"
            where = f"{scan.where}: {name}"
            yield Finding("missing", "warning", where, what, len(scan.indices), example, advice)


def find_non_finite(scans: Scans) -> Iterator[Finding]:
    """NaN and infinite values."""
    for where, _, content in scans.fields():
        yield from _tallied(
            content.non_finite,
            "non-finite",
            where,
            f"values must be finite; got {content.non_finite.count} NaN or infinite ones",
            "mask, fill or remove them",
        )


def find_bad_shapes(scans: Scans) -> Iterator[Finding]:
    """Other numbers of dimensions or channels than the model or the first sample has.

    Sizes along other axes may differ: a collate may pad.
    """
    for where, name, content in scans.fields():
        axis = scans.specs.get(name, FieldSpec()).channel_axis
        channels = "" if axis is None else f", channels along axis {axis}"
        must = f"samples must fit each other and the model: {content.ndim} dimensions{channels}"
        yield from _tallied(
            content.bad_shapes,
            "shapes",
            where,
            f"{must}; got {content.bad_shapes.count} of another shape",
            "bring them to one shape, or transpose them",
        )


def find_bad_labels(scans: Scans) -> Iterator[Finding]:
    """Class indices outside of the model's classes."""
    for where, name, content in scans.fields():
        classes = scans.specs.get(name, FieldSpec()).classes or 0
        yield from _tallied(
            content.bad_labels,
            "labels",
            where,
            f"class indices must be integers from 0 to {classes - 1};"
            f" got {content.bad_labels.count} other values",
            "correct the labels, or the model's number of classes",
        )


def find_class_lists(scans: Scans) -> Iterator[Finding]:
    """Data sets that number their classes differently."""
    named = [scan for scan in scans.sources if scan.source.classes]
    for scan in named[1:]:
        first, classes = named[0].source.classes, scan.source.classes
        if list(classes) != list(first):
            differing = sorted(set(first) ^ set(classes)) or list(classes)
            what = f"classes must be those of {named[0].where}, so that indices mean the same"
            what += f"; got {len(classes)} classes instead of {len(first)}"
            advice = "give every data set the same class folders, empty ones where need be"
            example = f"'{differing[0]}'"
            yield Finding("classes", "error", scan.where, what, len(differing), example, advice)


def find_constant(scans: Scans) -> Iterator[Finding]:
    """Channels that hold one value throughout, and samples that hold nothing but zeros."""
    for where, _, content in scans.fields():
        statistics = content.statistics
        if statistics is None or statistics.samples < 2:
            continue
        low, high = statistics.lows.min(axis=0), statistics.highs.max(axis=0)
        flat = np.flatnonzero(low == high)
        if flat.size:
            whole = flat.size == low.size
            what = f"must vary; got one value throughout{'' if whole else f' in {_listed(flat)}'}"
            example = f"value {low[flat[0]]:g} in all {statistics.samples} samples"
            advice = "check how it was written; drop it if it carries nothing"
            yield Finding("constant", "warning", where, what, flat.size, example, advice)
        if not (flat.size == low.size and not low.any()):
            yield from _tallied(
                content.all_zero,
                "constant",
                where,
                f"samples must hold more than zeros; got {content.all_zero.count} that do not",
                "check whether they are empty records",
                "warning",
            )


def find_outliers(scans: Scans) -> Iterator[Finding]:
    """Samples with values far from the model's statistics, or else from the data's own bulk.

    From the bulk too where the data as a whole is far from the model's statistics (`drift`).
    """
    sigma = scans.config.outlier_sigma
    for where, name, content in scans.fields():
        statistics = content.statistics
        if statistics is None or not content.is_float:
            continue
        expected = _expected(scans, name)
        if expected is not None and _drifted(statistics, expected).size:
            expected = None
        center, spread = expected or statistics.robust()
        unit = np.where(spread > 0, spread, np.inf)
        above, below = statistics.highs - center, center - statistics.lows
        # Where a sample has no finite value in a channel, its extremes are infinite.
        distance = np.maximum(np.maximum(above, below), 0) / unit
        if count := int((distance > sigma).any(axis=1).sum()):
            sample, channel = np.unravel_index(np.argmax(distance), distance.shape)
            far_above = above[sample, channel] >= below[sample, channel]
            value = (statistics.highs if far_above else statistics.lows)[sample, channel]
            owner = "the model's mean" if expected else "the data's median"
            what = f"samples must lie within {sigma:g} sigma of {owner}; got {count} beyond"
            example = f"sample {content.measured[sample]}, channel {channel}: {value:g},"
            example += f" {distance[sample, channel]:.0f} sigma"
            advice = "look for fill values and wrong units; clip or mask them"
            yield Finding("outliers", "warning", where, what, count, example, advice)


def find_drift(scans: Scans) -> Iterator[Finding]:
    """Channels whose mean or std is far from what the model's normalisation assumes."""
    for where, name, content in scans.fields():
        statistics, expected = content.statistics, _expected(scans, name)
        if statistics is None or expected is None:
            continue
        far = _drifted(statistics, expected)
        if far.size:
            mean, std = (np.broadcast_to(value, statistics.mean.shape) for value in expected)
            c = far[0]
            what = f"mean and std must be near the model's; got {_listed(far)} far from them"
            example = f"channel {c}: mean {statistics.mean[c]:.4g}, std {statistics.std[c]:.4g};"
            example += f" the model has {mean[c]:.4g} and {std[c]:.4g}"
            advice = "check units and channel order; else let the model use the data's statistics"
            yield Finding("drift", "warning", where, what, far.size, example, advice)


def find_imbalance(scans: Scans) -> Iterator[Finding]:
    """Classes that training data holds rarely or never, all training data sets together."""
    training = [scan for scan in scans.sources if scan.source.split == "train"]
    complete = all(scan.complete for scan in training)
    for name in scans.specs:
        contents = [scan.fields[name] for scan in training if name in scan.fields]
        found = [c.label_counts for c in contents if c.label_counts is not None]
        counts = np.sum(found, axis=0) if found else np.zeros(0, np.int64)
        if not counts.any():
            continue
        seen, never = np.flatnonzero(counts), np.flatnonzero(counts == 0)
        if not complete and counts.sum() < LABELS_PER_CLASS * counts.size:
            never = never[:0]
        most, least = seen[counts[seen].argmax()], seen[counts[seen].argmin()]
        ratio = counts[most] / counts[least]
        problems = [f"{never.size} of {counts.size} classes never occur"] if never.size else []
        if ratio > scans.config.imbalance:
            problems.append(f"class {most} occurs {ratio:.0f} times as often as class {least}")
        if problems:
            what = "; ".join(problems)
            rare = never[0] if never.size else least
            example = f"class {rare}: {counts[rare]} times; class {most}: {counts[most]}"
            advice = "add data, weight the loss's classes, or correct the number of classes"
            count = max(never.size, 1)
            yield Finding("imbalance", "warning", f"train: {name}", what, count, example, advice)


def find_leakage(scans: Scans) -> Iterator[Finding]:
    """Samples of evaluation data that are in the training data, bit for bit, before transforms.

    Where only part of the training data was read, the share is estimated: each sample found there
    stands for as many as that part is smaller than the whole.
    """
    evaluation = [scan for scan in scans.sources if scan.source.split != "train"]
    if not evaluation:
        return
    training = [
        (scan, *all_digests(scan, scans.specs))
        for scan in scans.sources
        if scan.source.split == "train"
    ]
    for scan in evaluation:
        # Sample -> its twin in the training data, and how many shared samples it stands for.
        shared: dict[int, tuple[str, float]] = {}
        for other, digests, read in training:
            for digest in scan.digests.keys() & digests.keys():
                twin = f"sample {digests[digest]} of {other.where}"
                shared.setdefault(scan.digests[digest], (twin, 1 / read))
        if not shared:
            continue
        total = len(scan.digests)
        estimate = min(sum(number for _, number in shared.values()) / total, 1.0)
        exact = all(read == 1 for *_, read in training)
        share = f"{estimate:.1%}" if exact else f"an estimated {estimate:.1%} with unread ones"
        what = f"evaluation data must not be in the training data; got {len(shared)} of"
        what += f" {total} samples ({share}) that are"
        example = f"sample {min(shared)} is {shared[min(shared)][0]}"
        advice = "split the data anew, by place, time or molecule"
        severity = "error" if estimate >= LEAKAGE_ERROR_SHARE else "warning"
        yield Finding("leakage", severity, scan.where, what, len(shared), example, advice)


def _tallied(
    tally: Tally,
    check: str,
    where: str,
    what: str,
    advice: str,
    severity: Literal["error", "warning"] = "error",
) -> Iterator[Finding]:
    if tally.count:
        yield Finding(check, severity, where, what, tally.count, tally.example, advice)


def _drifted(statistics: ChannelStatistics, expected: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Channels far from the expected mean and std."""
    mean, std = expected
    moved = np.abs(statistics.mean - mean) > DRIFT_MEAN_STDS * std
    # A constant channel is the business of `constant`.
    ratio = np.where(statistics.std > 0, statistics.std / std, 1)
    scaled = (ratio > DRIFT_STD_RATIO) | (ratio < 1 / DRIFT_STD_RATIO)
    return np.flatnonzero((moved | scaled) & (statistics.count > 0))


def _expected(scans: Scans, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and std that the model's normalisation assumes, `[C]` or `[1]`; None: one is not set."""
    spec = scans.specs.get(name, FieldSpec())
    if spec.mean is None or spec.std is None:
        return None
    mean, std = (np.atleast_1d(np.asarray(v, np.float64)) for v in (spec.mean, spec.std))
    return mean, np.maximum(std, np.finfo(np.float64).tiny)


def _listed(channels: np.ndarray, most: int = 8) -> str:
    """The first few channel numbers."""
    numbers = ", ".join(map(str, channels[:most])) + (", ..." if channels.size > most else "")
    return f"channel{'s' if channels.size > 1 else ''} {numbers}"


CORE_CHECKS: Mapping[str, Callable[[Scans], Iterable[Finding]]] = {
    "unreadable": find_unreadable,
    "missing": find_missing,
    "non-finite": find_non_finite,
    "shapes": find_bad_shapes,
    "labels": find_bad_labels,
    "classes": find_class_lists,
    "leakage": find_leakage,
    "constant": find_constant,
    "outliers": find_outliers,
    "drift": find_drift,
    "imbalance": find_imbalance,
}
