import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft.config import (
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    Focal,
    Huber,
    LossConfig,
    LossTerm,
    MeanAbsoluteError,
    MeanSquaredError,
    Penalty,
    PythonLoss,
)
from fastft.errors import ConfigError, DataError
from fastft.losses import make_criterion, make_penalty

CPU = torch.device("cpu")


def criterion_of(*terms: LossTerm):
    criterion = make_criterion(LossConfig(terms=terms), CPU)
    assert criterion is not None
    return criterion


def value(term: LossTerm, prediction, target):
    return criterion_of(term)(prediction, {"targets": target}).total


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(4, 5, 7, 3, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def labels() -> torch.Tensor:
    labels = torch.randint(0, 5, (4, 7, 3), generator=torch.Generator().manual_seed(1))
    labels[0, :3] = -100
    return labels


def check_value_and_gradient(term: LossTerm, prediction, target, expected) -> None:
    """Compares with `expected(prediction)` in float64."""
    ours = prediction.clone().requires_grad_()
    truth = prediction.double().requires_grad_()
    total, reference = value(term, ours, target), expected(truth)
    total.backward()
    reference.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), reference, rtol=1e-5, atol=1e-7)
    assert ours.grad is not None
    assert truth.grad is not None
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 2.0, 0.0, 3.0)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_cross_entropy_is_torch_s(logits, labels, smoothing, weights, dtype) -> None:
    term = CrossEntropy(class_weights=weights, label_smoothing=smoothing)
    factors = None if weights is None else torch.tensor(weights, dtype=torch.float64)

    def expected(z):
        return F.cross_entropy(z, labels, weight=factors, label_smoothing=smoothing)

    check_value_and_gradient(term, logits, labels.to(dtype), expected)


def test_regressions_are_torch_s() -> None:
    prediction, target = torch.randn(2, 6, 3)
    for term, function in (
        (MeanSquaredError(), F.mse_loss),
        (MeanAbsoluteError(), F.l1_loss),
        (Huber(delta=0.3), lambda p, t: F.huber_loss(p, t, delta=0.3)),
    ):
        check_value_and_gradient(
            term, prediction, target, lambda p, f=function: f(p, target.double())
        )


@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [((4, 1), (4,)), ((4,), (4, 1)), ((4, 1, 3), (4, 3)), ((4, 3), (4, 3, 1))],
)
def test_an_axis_of_size_one_does_not_broadcast(shape, target_shape) -> None:
    prediction, target = torch.randn(shape), torch.randn(target_shape)
    expected = F.mse_loss(prediction.flatten(), target.flatten())
    torch.testing.assert_close(value(MeanSquaredError(), prediction, target), expected)


@pytest.mark.parametrize("term", [MeanSquaredError(), MeanAbsoluteError(), BinaryCrossEntropy()])
@pytest.mark.parametrize(("shape", "target_shape"), [((4, 3), (4,)), ((4, 1), (1, 4)), ((4,), ())])
def test_other_shapes_are_refused(term, shape, target_shape) -> None:
    with pytest.raises(DataError, match=r"must have one shape; got \[4"):
        value(term, torch.randn(shape), torch.rand(target_shape))


def test_bce_leaves_negative_targets_out() -> None:
    z = torch.randn(5, 3) * 4
    targets = torch.tensor([[0, 1, -1]] * 5)
    factor = torch.tensor(2.5, dtype=torch.float64)

    def expected(z):
        return F.binary_cross_entropy_with_logits(
            z[:, :2], targets[:, :2].double(), pos_weight=factor
        )

    check_value_and_gradient(BinaryCrossEntropy(positive_weight=2.5), z, targets, expected)


def test_focal_against_its_formula(logits, labels) -> None:
    weights = (1.0, 0.5, 2.0, 0.1, 3.0)

    def expected(z):
        keep = labels >= 0
        z, y = z.movedim(1, -1)[keep], labels[keep]
        p = z.softmax(-1)[torch.arange(len(y)), y]
        w = torch.tensor(weights, dtype=torch.float64)[y]
        return (w * (1 - p) ** 1.5 * -p.log()).sum() / w.sum()

    check_value_and_gradient(Focal(gamma=1.5, class_weights=weights), logits, labels, expected)
    torch.testing.assert_close(
        value(Focal(gamma=0.0, class_weights=weights), logits, labels),
        value(CrossEntropy(class_weights=weights), logits, labels),
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_binary_focal_against_its_formula(dtype) -> None:
    z, targets = torch.randn(6, 1, 4), torch.randint(0, 2, (6, 4))

    def expected(z):
        p = z.squeeze(1).sigmoid()
        p = torch.where(targets == 1, p, 1 - p)
        return ((1 - p) ** 2 * -p.log()).mean()

    check_value_and_gradient(Focal(), z, targets.to(dtype), expected)
    check_value_and_gradient(Focal(), z, targets.unsqueeze(1).to(dtype), expected)


def test_focal_has_finite_gradients_when_it_is_sure() -> None:
    z = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    value(Focal(gamma=0.5), z, torch.tensor([0, 0])).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_dice_against_its_formula(logits, labels) -> None:
    def expected(z):
        p = z.softmax(1)
        losses = []
        for sample in range(4):
            keep = labels[sample] >= 0
            for c in range(5):
                q, g = p[sample, c][keep], (labels[sample][keep] == c).double()
                d = (2 * (q * g).sum() + 0.5) / ((q**2).sum() + (g**2).sum() + 0.5)
                losses.append(1 - d)
        return torch.stack(losses).mean()

    check_value_and_gradient(Dice(smooth=0.5), logits, labels, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_binary_dice_against_its_formula(dtype) -> None:
    z, targets = torch.randn(3, 1, 4, 4), torch.randint(0, 2, (3, 4, 4)).to(dtype)
    targets[0, 0] = 255
    keep = (targets != 255).double()

    def expected(z):
        p, g = z.squeeze(1).sigmoid() * keep, targets.double() * keep
        overlap, size = (p * g).sum((1, 2)), (p**2 + g**2).sum((1, 2))
        return (1 - (2 * overlap + 1) / (size + 1)).mean()

    check_value_and_gradient(Dice(ignore_index=255), z, targets, expected)
    check_value_and_gradient(Dice(ignore_index=255), z, targets.unsqueeze(1), expected)


def test_a_perfect_segmentation_has_no_dice_loss() -> None:
    labels = torch.randint(0, 3, (2, 8, 8))
    logits = F.one_hot(labels, 3).movedim(-1, 1) * 100.0
    assert value(Dice(), logits, labels) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "term",
    [
        CrossEntropy(label_smoothing=0.1),
        CrossEntropy(class_weights=(1.0,) * 5),
        Focal(),
        Dice(),
        BinaryCrossEntropy(),
    ],
)
def test_without_labels_the_loss_and_its_gradient_are_zero(logits, term) -> None:
    shape = logits.shape if isinstance(term, BinaryCrossEntropy) else (4, 7, 3)
    z = logits.requires_grad_()
    total = value(term, z, torch.full(shape, -100))
    total.backward()
    assert total == 0
    assert z.grad.count_nonzero() == 0


EVERY_TERM = (
    CrossEntropy(class_weights=(1.0,) * 5, label_smoothing=0.1),
    Focal(),
    Dice(),
    BinaryCrossEntropy(target="values"),
    MeanSquaredError(target="values"),
    MeanAbsoluteError(target="values"),
    Huber(target="values"),
)


def test_bf16_predictions_are_computed_in_fp32_under_autocast(logits, labels) -> None:
    criterion = criterion_of(*EVERY_TERM)
    fields = {"targets": labels, "values": torch.rand_like(logits)}
    rounded = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(rounded, fields)
    expected = criterion(rounded.float(), fields)
    assert all(part.dtype == torch.float32 for part in (loss.total, *loss.parts.values()))
    assert loss.parts == expected.parts
    assert loss.total == expected.total


def test_nothing_depends_on_values_that_only_the_device_knows() -> None:
    # Fake tensors raise at `.item()`, and at shapes that depend on values.
    with FakeTensorMode():
        criterion = criterion_of(*EVERY_TERM)
        fields = {"targets": torch.zeros(4, 7, 3, dtype=torch.long)}
        fields["values"] = torch.zeros(4, 5, 7, 3)
        criterion(torch.zeros(4, 5, 7, 3, requires_grad=True), fields).total.backward()


def test_the_criterion_compiles_to_one_graph(logits, labels) -> None:
    fields = {"targets": labels, "values": torch.rand_like(logits)}
    criterion = criterion_of(*EVERY_TERM)
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    assert compiled(logits, fields).total == criterion(logits, fields).total


def test_a_sum_of_terms() -> None:
    predictions = {"energy": torch.randn(3, 1, requires_grad=True), "forces": torch.randn(3, 4, 3)}
    fields = {"e": torch.randn(3), "f": torch.randn(3, 4, 3)}
    criterion = criterion_of(
        MeanSquaredError(prediction="energy", target="e", weight=0.5),
        MeanSquaredError(prediction="forces", target="f", weight=100.0),
        MeanAbsoluteError(prediction="forces", target="f"),
    )
    loss = criterion(predictions, fields)
    energy, forces = predictions["energy"], predictions["forces"]
    expected = {
        "mse/energy": F.mse_loss(energy.squeeze(1), fields["e"]),
        "mse/forces": F.mse_loss(forces, fields["f"]),
        "mae": F.l1_loss(forces, fields["f"]),
    }
    torch.testing.assert_close(dict(loss.parts), {k: v.detach() for k, v in expected.items()})
    parts = list(expected.values())
    torch.testing.assert_close(loss.total, 0.5 * parts[0] + 100 * parts[1] + parts[2])
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in loss.parts.values())
    assert not loss.predictions["energy"].requires_grad
    assert loss.predictions["forces"].data_ptr() == forces.data_ptr()


def test_terms_that_differ_only_in_settings_are_numbered() -> None:
    loss = criterion_of(Huber(), Huber(delta=2.0), MeanSquaredError())(
        torch.zeros(2), {"targets": torch.ones(2)}
    )
    assert list(loss.parts) == ["huber/targets", "huber/targets/2", "mse"]


def test_one_term_has_no_parts_and_none_no_criterion() -> None:
    loss = criterion_of(MeanSquaredError(weight=2.0))(torch.zeros(2), {"targets": torch.ones(2)})
    assert loss.total == 2
    assert loss.parts == {}
    assert make_criterion(LossConfig(), CPU) is None


def test_a_user_s_own_loss(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def ratio(prediction, target):\n    return (prediction / target).log().square().mean()\n"
        "def vector(prediction, target):\n    return prediction\n"
        "def both(outputs, target):\n    return outputs['a'].sum() + outputs['b'].sum()\n"
    )
    ones = torch.ones(3)
    assert value(PythonLoss(file=file, function="ratio"), math.e * ones, ones) == pytest.approx(1)
    whole = {"a": ones.bfloat16(), "b": ones}
    assert value(PythonLoss(file=file, function="both"), whole, ones) == 6
    with pytest.raises(ConfigError, match=r"'python': must return a scalar tensor; got \[3\]"):
        value(PythonLoss(file=file, function="vector"), ones, ones)
    with pytest.raises(ConfigError, match=r"mine.py must define .*'ration'.* mean 'ratio'\?"):
        criterion_of(PythonLoss(file=file, function="ration"))
    with pytest.raises(ConfigError, match=r"absent.py must be .* got no such file"):
        criterion_of(PythonLoss(file=tmp_path / "absent.py"))


@pytest.mark.parametrize(
    ("term", "predictions", "error", "message"),
    [
        (
            MeanSquaredError(prediction="energi"),
            {"energy": torch.ones(2), "forces": torch.ones(2)},
            ConfigError,
            r"loss 'mse': .* got 'energi'; did you mean 'energy'\?",
        ),
        (
            MeanSquaredError(),
            {"energy": torch.ones(2), "forces": torch.ones(2)},
            ConfigError,
            "got none; choose from 'energy', 'forces'",
        ),
        (
            MeanSquaredError(prediction="energy"),
            torch.ones(2),
            ConfigError,
            "mapping with the key 'energy'; got Tensor; remove `prediction`",
        ),
        (MeanSquaredError(), (torch.ones(2),), DataError, "must be a tensor; got tuple"),
        (
            MeanSquaredError(target="target"),
            torch.ones(2),
            DataError,
            r"the field 'target'; got none; did you mean 'targets'\?",
        ),
        (CrossEntropy(), torch.ones(2), DataError, r"must be \[B, C, ...\]; got \[2\]"),
        (CrossEntropy(), torch.ones(2, 1), DataError, "use 'bce'"),
        (CrossEntropy(), torch.ones(2, 3, 4), DataError, r"got \[2\] for \[2, 3, 4\]"),
        (CrossEntropy(), torch.ones(2, 3), DataError, "class indices; got torch.float32"),
    ],
)
def test_errors_say_what_to_do(term, predictions, error, message) -> None:
    with pytest.raises(error, match=message):
        value(term, predictions, torch.ones(2))


def test_class_weights_must_fit() -> None:
    term = CrossEntropy(class_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="one factor for each of the 3 classes; got 2"):
        value(term, torch.ones(2, 3), torch.ones(2, dtype=torch.long))


def test_penalties_count_the_parameters_that_are_trained_now() -> None:
    linear, head = nn.Linear(2, 3), nn.Linear(3, 1)
    model = nn.Sequential(linear, head)
    penalties = (
        Penalty(kind="l2", match=("*.weight", "1.*"), weight=0.1),
        Penalty(kind="l1", match=("1.bias",), weight=2.0),
    )
    penalty = make_penalty(LossConfig(penalties=penalties), model, dict(model.named_parameters()))
    assert penalty is not None
    last = 0.1 * (head.weight.square().sum() + head.bias.square().sum())
    last = last + 2 * head.bias.abs().sum()
    torch.testing.assert_close(penalty(), last + 0.1 * linear.weight.square().sum())
    linear.requires_grad_(False)
    torch.testing.assert_close(penalty(), last)
    penalty().backward()
    assert linear.weight.grad is None
    torch.testing.assert_close(head.weight.grad, 0.2 * head.weight)
    model.requires_grad_(False)
    assert penalty() == 0


def test_a_penalty_on_nothing_is_an_error() -> None:
    penalties = (
        Penalty(kind="l1", match=("head.wieght",), weight=1.0),
        Penalty(kind="l2", match=("*.gamma", "*"), weight=1.0),
    )
    model = nn.ModuleDict({"head": nn.Linear(1, 1)})
    with pytest.raises(ConfigError) as caught:
        make_penalty(LossConfig(penalties=penalties), model, ["head.bias"])
    assert "did you mean 'head.weight'?" in caught.value.problems[0]
    assert "loss.penalties.1.match: '*.gamma' must match a parameter" in str(caught.value)
    assert len(caught.value.problems) == 2
    frozen = Penalty(kind="l2", match=("head.weight",), weight=1.0)
    with pytest.raises(ConfigError, match=r"all it matches are frozen, as 'head\.weight'"):
        make_penalty(LossConfig(penalties=(frozen,)), model, ["head.bias"])
    assert make_penalty(LossConfig(), model, []) is None
