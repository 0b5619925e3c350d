"""The run file's `[loss]`: a weighted sum of terms, and penalties on parameters.

Terms are computed in fp32, or fp64 where the model does, whatever autocast says, and none waits for
the device: labels that do not count are masked by multiplication, never by boolean indexing,
because the host would have to read the size of its result. Where no label counts, a term is 0 and
so are its gradients.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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
    PythonLoss,
)
from fastft.errors import ConfigError, DataError, nearest
from fastft.names import matching, named_parameters, unmatched
from fastft.operands import pick_operands, same_shape, unique_names
from fastft.task import Criterion, Loss
from fastft.userfile import import_file

# (prediction, target) -> scalar.
Term = Callable[[Any, Any], Tensor]


def make_criterion(config: LossConfig, device: torch.device) -> Criterion | None:
    """The weighted sum of the terms, or None without terms.

    `Loss.parts` holds each term's unweighted value where there are several; a name that occurs
    twice is followed by the key of its prediction or target: `mse/energy`.

    Raises:
        ConfigError: a user's own loss is missing; when called: a prediction that is not there.
        DataError: when called: a field that is missing or does not fit the prediction.
    """
    if not config.terms:
        return None
    names = unique_names(config.terms)
    functions = [_make_term(*pair, device) for pair in zip(config.terms, names, strict=True)]
    weights = torch.tensor([term.weight for term in config.terms], device=device)

    def criterion(predictions: Any, fields: Mapping[str, Any]) -> Loss:
        values = []
        with torch.autocast(device.type, enabled=False):
            for term, name, function in zip(config.terms, names, functions, strict=True):
                own = isinstance(term, PythonLoss)
                pair = pick_operands(term, predictions, fields, f"loss '{name}'", free=own)
                values.append(function(*tree_map_only(Tensor, _at_least_fp32, pair)))
            total = (weights * torch.stack(values)).sum()
        several = len(values) > 1
        parts = {n: v.detach() for n, v in zip(names, values, strict=True)} if several else {}
        return Loss(total, parts, tree_map_only(Tensor, Tensor.detach, predictions))

    return criterion


def make_penalty(
    config: LossConfig, model: nn.Module, trained: Collection[str]
) -> Callable[[], Tensor] | None:
    """The sum of the penalties as a function of the model's present parameters, or None.

    A parameter counts while it requires a gradient, looked up at each call: a frozen one would add
    a constant to the loss and nothing to the gradient, and one that a later stage unfreezes counts
    from then on. Parameters are looked up by name now, so call this on the model as it is trained.

    Args:
        trained: names of the parameters that are trained, now or later.

    Raises:
        ConfigError: a pattern matches no parameter, or a penalty only ones that are never trained.
    """
    if not config.penalties:
        return None
    parameters = dict(named_parameters(model))
    problems = [
        problem
        for i, penalty in enumerate(config.penalties)
        for problem in unmatched(penalty.match, list(parameters), where=f"loss.penalties.{i}.match")
    ]
    names = [matching(penalty.match, parameters) for penalty in config.penalties]
    problems += [
        f"loss.penalties.{i}.match: must match a trained parameter; all it matches are frozen, as"
        f" '{found[0]}'; drop the penalty or train them"
        for i, found in enumerate(names)
        if found and not set(found) & set(trained)
    ]
    if problems:
        raise ConfigError(problems)
    matched = [
        (penalty, [parameters[name] for name in found])
        for penalty, found in zip(config.penalties, names, strict=True)
    ]
    device = next(iter(parameters.values())).device

    def penalty_sum() -> Tensor:
        total = torch.zeros((), device=device)
        for penalty, chosen in matched:
            size = Tensor.abs if penalty.kind == "l1" else Tensor.square
            for parameter in chosen:
                if parameter.requires_grad:
                    total = total + penalty.weight * size(parameter.float()).sum()
        # Sharded parameters (FSDP2) give the sum of all ranks, as a DTensor.
        return cast(Any, total).full_tensor() if hasattr(total, "full_tensor") else total

    return penalty_sum


def _make_term(term: LossTerm, name: str, device: torch.device) -> Term:
    where = f"loss '{name}'"
    match term:
        case CrossEntropy(class_weights=weights, ignore_index=ignore, label_smoothing=smoothing):
            settings = {"weights": _tensor(weights, device), "smoothing": smoothing}
            return partial(_classify, where=where, ignore_index=ignore, **settings)
        case Focal(class_weights=weights, ignore_index=ignore, gamma=gamma):
            settings = {"weights": _tensor(weights, device), "gamma": gamma}
            return partial(_focal, where=where, ignore_index=ignore, **settings)
        case Dice(ignore_index=ignore, smooth=smooth):
            return partial(_dice, where=where, ignore_index=ignore, smooth=smooth)
        case BinaryCrossEntropy(positive_weight=weight):
            weight = torch.tensor(weight, device=device)
            return partial(_binary, where=where, positive_weight=weight)
        case MeanSquaredError():
            return partial(_regress, where=where, error=F.mse_loss)
        case MeanAbsoluteError():
            return partial(_regress, where=where, error=F.l1_loss)
        case Huber(delta=delta):
            return partial(_regress, where=where, error=partial(F.huber_loss, delta=delta))
        case PythonLoss():
            return partial(_call_user, where=where, function=_load(term, where))


def _classify(
    logits: Tensor,
    labels: Tensor,
    *,
    where: str,
    weights: Tensor | None,
    ignore_index: int,
    smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Tensor:
    """Cross entropy `-w_y (1 - p_y)^gamma log p_y`, over the sum of the weights `w_y` that count.

    Spelled out, because `F.cross_entropy` is NaN where every label is ignored and, on images,
    refuses `torch.use_deterministic_algorithms`.

    Shapes: logits [B, C, ...], C >= 2; labels [B, ...]; weights [C].
    """
    labels = _labels(logits, labels, where)
    classes = logits.shape[1]
    if classes == 1:
        raise DataError(
            f"{where}: needs one logit per class on axis 1; got {list(logits.shape)}; use 'bce'"
        )
    if weights is not None and len(weights) != classes:
        raise ConfigError(
            f"{where}: class_weights must have one factor for each of the {classes} classes;"
            f" got {len(weights)}; add or remove some"
        )
    keep = labels != ignore_index
    labels = torch.where(keep, labels, 0)
    _refuse_strange_labels(labels, classes, where)
    factor = keep.float() if weights is None else weights[labels] * keep
    log_p = logits.log_softmax(1)
    log_p_label = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    values = -log_p_label
    if gamma:
        # At p = 1 the slope of x^gamma is infinite for gamma < 1; the clamp has slope 0 there.
        miss = (-log_p_label.expm1()).clamp(min=torch.finfo(torch.float32).tiny)
        values = values * miss**gamma
    total = (factor * values).sum()
    if smoothing:
        if weights is not None:
            log_p = log_p * weights.view(-1, *[1] * (logits.ndim - 2))
        spread = (-log_p.mean(1) * keep).sum()
        total = (1 - smoothing) * total + smoothing * spread
    return total / _positive(factor.sum())


def _refuse_strange_labels(labels: Tensor, classes: int, where: str) -> None:
    """On a CPU, where looking costs nothing: a GPU would have to be waited for, and what is traced
    (subclasses of Tensor) has no values."""
    if labels.is_cuda or type(labels) is not Tensor or torch.compiler.is_compiling():
        return
    low, high = labels.aminmax() if labels.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise DataError(
            f"{where}: labels must be from 0 to {classes - 1} or the ignore_index; got {int(low)}"
            f" to {int(high)}; correct the labels or the number of classes"
        )


def _focal(logits: Tensor, labels: Tensor, *, where: str, **settings: Any) -> Tensor:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5); cross entropy at gamma = 0.

    Shapes: logits [B, C, ...]; labels [B, ...], with C = 1 also [B, 1, ...] and floats, rounded.
    """
    labels = _labels(logits, labels, where)
    if logits.shape[1] == 1:
        # sigmoid(z) is the second softmax of (0, z).
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
        labels = labels.round().long()
    return _classify(logits, labels, where=where, **settings)


def _dice(
    logits: Tensor, labels: Tensor, *, where: str, smooth: float, ignore_index: int
) -> Tensor:
    """`1 - (2 sum p g + s) / (sum p^2 + sum g^2 + s)` over each sample's pixels.

    Averaged over samples and classes, background included. Per sample, as in the source, so that
    the loss of a batch is the mean over its micro-batches.

    Shapes: logits [B, C, ...]; labels [B, ...], with C = 1 also [B, 1, ...] and floats in [0, 1].
    Source: Milletari et al. 2016, arXiv 1606.04797, section 3.
    """
    labels = _labels(logits, labels, where)
    batch, classes = logits.shape[:2]
    labels = labels.reshape(batch, 1, -1)
    logits = logits.reshape(batch, classes, -1)
    keep = labels != ignore_index
    if classes == 1:
        truth = torch.where(keep, labels, 0).float()
        p = logits.sigmoid() * keep
    else:
        index = torch.arange(classes, device=logits.device).unsqueeze(1)
        truth = ((labels == index) & keep).float()
        p = logits.softmax(1) * keep
    overlap = (p * truth).sum(-1)
    size = (p.square() + truth.square()).sum(-1)
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()


def _binary(logits: Tensor, targets: Tensor, *, where: str, positive_weight: Tensor) -> Tensor:
    logits, targets = same_shape(logits, targets.to(logits.dtype), where)
    keep = targets >= 0
    values = F.binary_cross_entropy_with_logits(
        logits, targets.clamp(min=0), pos_weight=positive_weight, reduction="none"
    )
    return (values * keep).sum() / _positive(keep.sum())


def _regress(
    prediction: Tensor, target: Tensor, *, where: str, error: Callable[..., Tensor]
) -> Tensor:
    return error(*same_shape(prediction, target.to(prediction.dtype), where))


def _call_user(prediction: Any, target: Any, *, where: str, function: Term) -> Tensor:
    value = function(prediction, target)
    if not isinstance(value, Tensor) or value.ndim > 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{where}: must return a scalar tensor; got {got}; reduce it to a mean")
    return value.float()


def _load(term: PythonLoss, where: str) -> Term:
    module = import_file(term.file, where=where)
    function: Term | None = getattr(module, term.function, None)
    if not callable(function):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(
            f"{where}: {term.file} must define the function '{term.function}'; got none"
            f"{nearest(term.function, functions)}"
        )
    return function


def _labels(logits: Tensor, labels: Tensor, where: str) -> Tensor:
    """Class indices [B, ...] that fit logits [B, C, ...]; int64, or floats where C is 1."""
    if logits.ndim < 2:
        raise DataError(
            f"{where}: logits must be [B, C, ...]; got {list(logits.shape)}; give them a class axis"
        )
    one = logits.shape[1] == 1
    if one and labels.shape == logits.shape:
        labels = labels.squeeze(1)
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise DataError(
            f"{where}: labels must be [B, ...] for logits [B, C, ...]; got {list(labels.shape)} for"
            f" {list(logits.shape)}; reshape one of them"
        )
    if not labels.is_floating_point():
        return labels.long()
    if not one:
        raise DataError(
            f"{where}: labels must be class indices; got {labels.dtype}; store them as integers"
        )
    return labels


def _positive(value: Tensor) -> Tensor:
    """`value`, or 1 where it is 0: a denominator whose numerator is then 0."""
    return torch.where(value > 0, value, 1)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _tensor(values: Sequence[float] | None, device: torch.device) -> Tensor | None:
    return None if values is None else torch.tensor(values, device=device)
