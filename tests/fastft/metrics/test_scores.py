import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from fastft.config import MetricConfig
from fastft.errors import ConfigError, DataError
from fastft.metrics import MeanLoss, make_metrics
from fastft.task import Batch, Loss, Metric

CPU = torch.device("cpu")


def metric_of(**settings) -> Metric:
    (metric,) = make_metrics([MetricConfig(**settings)], CPU).values()
    return metric


def score(prediction, targets, **settings):
    metric = metric_of(**settings)
    # Two uneven batches.
    for part in (slice(0, 1), slice(1, None)):
        metric.update(prediction[part], Batch({"targets": targets[part]}, size=1))
    return metric.compute()


def sklearn_score(name: str, truth, predicted, **average) -> Any:
    functions: dict[str, Callable[..., Any]] = {
        "f1": sk.f1_score,
        "dice": sk.f1_score,
        "precision": sk.precision_score,
        "recall": sk.recall_score,
        "accuracy": sk.recall_score,
        "iou": sk.jaccard_score,
    }
    return functions[name](truth, predicted, **average, zero_division=0)


CLASS_SCORES = ["accuracy", "f1", "precision", "recall", "iou", "dice"]


@pytest.mark.parametrize("name", CLASS_SCORES)
@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
@pytest.mark.parametrize("shape", [(), (6, 7)])
def test_multiclass_scores_are_sklearn_s(name, average, shape) -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 4, *shape, generator=random)
    targets = torch.randint(0, 4, (9, *shape), generator=random)
    targets[:2] = 255
    settings = {"name": name, "average": average, "ignore_index": 255, "per_class": True}
    values = score(logits.bfloat16(), targets.to(torch.uint8), **settings)
    truth = targets.numpy().ravel()
    predicted = logits.bfloat16().argmax(1).numpy().ravel()[truth != 255]
    truth = truth[truth != 255]
    assert values[name] == pytest.approx(sklearn_score(name, truth, predicted, average=average))
    each = sklearn_score(name, truth, predicted, average=None, labels=range(4))
    assert [values[f"{name}/class_{i}"] for i in range(4)] == pytest.approx(np.array(each))


@pytest.mark.parametrize("name", CLASS_SCORES)
@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [((12,), (12,)), ((12, 1), (12,)), ((12, 1, 5), (12, 5)), ((12, 1, 5), (12, 1, 5))],
)
def test_binary_scores_are_those_of_class_one(name, shape, target_shape) -> None:
    random = torch.Generator().manual_seed(4)
    # All logits in [0, 1] or just below: nothing may take them for probabilities.
    logits = torch.rand(shape, generator=random) * 1.5 - 0.5
    targets = torch.randint(0, 2, target_shape, generator=random).float()
    values = score(logits, targets, name=name)
    truth, predicted = targets.numpy().ravel(), (logits > 0).numpy().ravel()
    if name == "accuracy":
        assert values == {name: pytest.approx(sk.accuracy_score(truth, predicted))}
    else:
        assert values == {name: pytest.approx(sklearn_score(name, truth, predicted))}


def test_by_hand_with_a_class_that_never_occurs() -> None:
    logits = torch.eye(4)[[0, 0, 1, 1]]
    targets = torch.tensor([0, 1, 1, 1])
    values = score(logits, targets, name="iou", per_class=True)
    assert values["iou/class_0"] == 0.5
    assert values["iou/class_1"] == pytest.approx(2 / 3)
    assert values["iou/class_3"] == 0
    assert values["iou"] == pytest.approx((0.5 + 2 / 3) / 2)


def test_an_ignored_class_that_is_predicted_counts_as_zero_except_in_iou() -> None:
    logits = torch.eye(3)[[0, 0, 1, 2]]
    targets = torch.tensor([0, 1, 1, 2])
    recall = score(logits, targets, name="recall", ignore_index=0)
    assert recall["recall"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    iou = score(logits, targets, name="iou", ignore_index=0)
    assert iou["iou"] == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize("name", CLASS_SCORES)
@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
def test_multilabel_scores_are_sklearn_s(name, average) -> None:
    random = torch.Generator().manual_seed(5)
    logits = torch.rand(12, 3, generator=random) * 1.5 - 0.5
    targets = torch.randint(0, 2, (12, 3), generator=random).float()
    values = score(logits, targets, name=name, average=average, per_class=True)
    truth, predicted = targets.numpy(), (logits > 0).numpy()
    if name == "accuracy":
        each = (truth == predicted).mean(0)
        weights = truth.sum(0) if average == "weighted" else None
        expected = np.average(each, weights=weights)
    else:
        each = np.array(sklearn_score(name, truth, predicted, average=None))
        expected = sklearn_score(name, truth, predicted, average=average)
    assert values[name] == pytest.approx(expected)
    assert [values[f"{name}/class_{i}"] for i in range(3)] == pytest.approx(each)


@pytest.mark.parametrize("name", ["recall", "iou"])
def test_binary_scores_per_class(name) -> None:
    logits = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0])
    targets = torch.tensor([0, 1, 1, 1, 255])
    values = score(logits, targets, name=name, per_class=True, ignore_index=255)
    no, yes = {"recall": (1, 2 / 3), "iou": (1 / 2, 2 / 3)}[name]
    assert values == pytest.approx({name: yes, f"{name}/class_0": no, f"{name}/class_1": yes})


def test_averages_default_to_micro_for_accuracy_and_macro_elsewhere() -> None:
    logits = torch.eye(2)[[0, 0, 0, 1]]
    targets = torch.tensor([0, 0, 0, 0])
    assert score(logits, targets, name="accuracy") == {"accuracy": 0.75}
    assert score(logits, targets, name="recall") == {"recall": 0.375}


def test_mean_errors() -> None:
    prediction, target = torch.randn(2, 8, 6).unbind()
    error = (prediction - target).double()
    strided = prediction.T.contiguous().T
    mae = score(strided.unsqueeze(1), target, name="mae")
    assert mae["mae"] == pytest.approx(error.abs().mean().item())
    rmse = score(strided, target.unsqueeze(2), name="rmse")
    assert rmse["rmse"] == pytest.approx(math.sqrt(error.square().mean().item()))


def test_reset_forgets_and_prediction_names_an_output() -> None:
    metric = metric_of(name="accuracy", prediction="mask", target="labels")
    batch = Batch({"labels": torch.tensor([1, 1])}, size=2)
    metric.update({"mask": torch.tensor([-1.0, -1.0])}, batch)
    assert metric.compute() == {"accuracy": 0.0}
    metric.reset()
    metric.update({"mask": torch.tensor([1.0, -1.0])}, batch)
    assert metric.compute() == {"accuracy": 0.5}


def test_names_stay_apart() -> None:
    configs = [
        MetricConfig(name="f1", prediction="mask"),
        MetricConfig(name="f1", prediction="edge", target="edges"),
        MetricConfig(name="f1", prediction="edge", average="micro"),
        MetricConfig(name="mae"),
    ]
    assert list(make_metrics(configs, CPU)) == ["f1/mask", "f1/edge", "f1/edge/2", "mae"]


@pytest.mark.parametrize("name", ["f1", "mae"])
@pytest.mark.parametrize(
    ("prediction", "target"), [((4,), (4, 2)), ((4, 3, 2), (4, 3)), ((4, 2), (4, 3))]
)
def test_shapes_that_do_not_fit(name, prediction, target) -> None:
    with pytest.raises(DataError, match=rf"metric '{name}': .* got \[1"):
        score(torch.zeros(prediction), torch.zeros(target), name=name)


def test_the_number_of_classes_stays() -> None:
    metric = metric_of(name="f1")
    batch = Batch({"targets": torch.tensor([0, 1])}, size=2)
    metric.update(torch.zeros(2, 3), batch)
    with pytest.raises(DataError, match="stay multiclass with 3 classes"):
        metric.update(torch.zeros(2, 4), batch)


@pytest.mark.parametrize("name", ["f1", "accuracy", "iou"])
@pytest.mark.parametrize("bad", [-1.0, 3.0, 0.5, math.nan])
def test_labels_outside_the_classes_are_reported(name, bad) -> None:
    targets = torch.tensor([0.0, 1.0, bad])
    with pytest.raises(DataError, match=rf"'{name}'.* from 0 to 2; got 1 others; set ignore_index"):
        score(torch.zeros(3, 3), targets, name=name)


def test_what_torchmetrics_refuses_names_the_metric() -> None:
    with pytest.raises(DataError, match=r"metric 'f1': .* should be a float tensor"):
        score(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4), name="f1")


def test_settings_that_mean_nothing_are_refused() -> None:
    configs = [MetricConfig(name="mae", per_class=True), MetricConfig(name="rmse", ignore_index=0)]
    with pytest.raises(ConfigError) as caught:
        make_metrics(configs, CPU)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("settings", "predictions", "error", "message"),
    [
        ({"prediction": "b"}, {"a": torch.ones(2)}, ConfigError, "got 'b'; choose from 'a'"),
        ({}, {"a": torch.ones(2)}, ConfigError, "got none; choose from 'a'"),
        ({"prediction": "b"}, torch.ones(2), ConfigError, "remove `prediction`"),
        ({}, [torch.ones(2)], DataError, "must be a tensor; got list"),
        ({"target": "c"}, torch.ones(2), DataError, "'c'; got none; choose from 'targets'"),
    ],
)
def test_errors_say_what_to_do(settings, predictions, error, message) -> None:
    metric = metric_of(name="f1", **settings)
    with pytest.raises(error, match=message):
        metric.update(predictions, Batch({"targets": torch.ones(2)}, size=2))
    with pytest.raises(DataError, match="needs a batch"):
        metric.compute()


def test_deterministic_mode_counts_without_a_matrix_per_label() -> None:
    # 2 TB, if each of the million pixels had a row of 500^2 numbers.
    batch = Batch({"targets": torch.full((1, 1000, 1000), 499)}, size=1)
    metric = metric_of(name="f1")
    torch.use_deterministic_algorithms(True)
    try:
        metric.update(torch.zeros(1, 500, 1, 1).expand(-1, -1, 1000, 1000), batch)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert metric.compute() == {"f1": 0.0}


def test_mean_errors_keep_float64() -> None:
    # float32 has steps of 64 there.
    targets = torch.tensor([1e9, 2e9], dtype=torch.float64)
    assert score(targets + 1, targets, name="mae") == {"mae": 1.0}


def test_the_mean_loss_weighs_batches_by_their_size() -> None:
    mean = MeanLoss()
    mean.update(Loss(torch.tensor(1.0, requires_grad=True)), 30)
    mean.update(Loss(torch.tensor(4.0, dtype=torch.bfloat16)), 10)
    assert mean.compute() == 1.75
    assert math.isnan(MeanLoss().compute())


def test_the_mean_losses_of_terms_add_up() -> None:
    mean = MeanLoss()
    for term, total, size in (("a", 1.0, 30), ("b", 2.0, 5), ("a", 4.0, 10)):
        mean.update(Loss(torch.tensor(total), term=term), size)
    assert mean.compute() == 1.75 + 2
