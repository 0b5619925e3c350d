"""One training step: accumulation, penalties, precision, compiled blocks, averaged weights."""

import dataclasses

import pytest
import torch
from small_model import Block, make_batch, squared_error
from torch import nn

from fastft.blocks import compile_task
from fastft.config import (
    GradientsConfig,
    LossConfig,
    OptimConfig,
    Penalty,
    ScheduleConfig,
)
from fastft.errors import ConfigError
from fastft.fused import Kernels
from fastft.loop import TrainingState
from fastft.losses import make_penalty
from fastft.optim import Optimizer, make_groups
from fastft.precision import make_precision
from fastft.step import Ema, TrainingStep, compute_loss
from fastft.task import Batch, Loss, Task, repeated_blocks
from fastft.task import Block as TaskBlock

CPU = torch.device("cpu")


def make_task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Block(), Block(), nn.Linear(4, 1))
    return Task(model=model, loss=squared_error, blocks=repeated_blocks(model))


def make_step(task: Task, precision: str = "fp32", penalty=None, **gradients) -> TrainingStep:
    config = OptimConfig(lr=0.05, name="sgd", schedule=ScheduleConfig(name="constant"))
    optimizer = Optimizer(make_groups(task, config, {}), config, total_steps=100)
    settings = GradientsConfig(**gradients)
    return TrainingStep(task, optimizer, penalty, settings, make_precision(precision, CPU))


def test_micro_batches_add_up_to_one_batch() -> None:
    whole, parts = make_task(), make_task()
    batch = make_batch(8)
    halves = [
        Batch({name: value[i : i + 4] for name, value in batch.data.items()}, 4) for i in (0, 4)
    ]
    one, two = make_step(whole), make_step(parts)
    for index in range(3):
        a, b = one(index, [batch]), two(index, halves)
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.verdict.norm, b.verdict.norm)
        torch.testing.assert_close(a.parts, b.parts)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(precision: str) -> None:
    step = make_step(make_task(), precision, clip_norm=1.0)
    losses = [step(i, [make_batch(64, i)]).loss.item() for i in range(60)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_penalty_is_in_the_loss_and_its_gradient_in_the_update() -> None:
    config = LossConfig(penalties=(Penalty(kind="l2", match=("0.weight",), weight=0.5),))
    for micro_batches in (1, 2):
        plain, punished = make_task(), make_task()
        batches = [make_batch(seed=i) for i in range(micro_batches)]
        without = make_step(plain)(0, batches)
        penalty = make_penalty(config, punished.model, ["0.weight"])
        before = punished.model.get_parameter("0.weight").detach().clone()
        result = make_step(punished, penalty=penalty)(0, batches)
        torch.testing.assert_close(result.loss - without.loss, 0.5 * before.square().sum())
        torch.testing.assert_close(result.parts["penalty"], 0.5 * before.square().sum())
        # The gradient of 0.5 w^2 is w, and SGD takes lr = 0.05 of it.
        difference = plain.model.get_parameter("0.weight") - punished.model.get_parameter(
            "0.weight"
        )
        torch.testing.assert_close(difference, 0.05 * before, rtol=1e-3, atol=1e-6)


def test_a_bad_step_changes_no_weight_and_is_counted() -> None:
    task = make_task()
    step = make_step(task)
    batch = make_batch()
    batch["inputs"][0, 0] = torch.inf
    before = [p.detach().clone() for p in task.model.parameters()]
    result = step(0, [batch])
    assert result.verdict.skip.item() == 1
    assert step.guard.counters()["nonfinite"].item() == 1
    for old, new in zip(before, task.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_bad_step_leaves_running_statistics_as_they_were() -> None:
    task = make_task()
    norm = nn.BatchNorm1d(4)
    step = make_step(dataclasses.replace(task, model=nn.Sequential(norm, task.model)))
    for bad in (False, True):
        batch = make_batch()
        if bad:
            batch["inputs"][0, 0] = torch.inf
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        assert step(0, [batch]).verdict.skip.item() == bad
        for name, buffer in norm.named_buffers():
            assert torch.equal(buffer, before[name]) == bad, name


def test_norms_by_group_and_layer_add_up_to_the_global_one() -> None:
    step = make_step(make_task())
    result = step(0, [make_batch()])
    norms = step.summary(result.verdict.tensor_norms)
    assert {"layer/0", "layer/1", "layer/2", "layer/3"} <= set(norms)
    for kind in ("layer/", "group/"):
        squares = [norm.square() for name, norm in norms.items() if name.startswith(kind)]
        torch.testing.assert_close(torch.stack(squares).sum().sqrt(), result.verdict.norm)


def test_updates_by_group_and_layer_beside_the_weights() -> None:
    task, kernels = make_task(), Kernels(adam=True, norm=True)
    config = OptimConfig(lr=0.05, weight_decay=0.1)
    staged = {"0.weight": 9, "0.bias": 9}
    task.model.get_submodule("0").requires_grad_(False)
    optimizer = Optimizer(make_groups(task, config, staged), config, 10, kernels)
    precision = make_precision("fp32", CPU)
    step = TrainingStep(task, optimizer, None, GradientsConfig(), precision, kernels)
    step(0, [make_batch()])
    before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    norms = step.summary(step(1, [make_batch()]).verdict.tensor_norms)
    ratios = step.update_ratios()
    assert ratios.keys() == norms.keys()
    assert ratios["layer/0"] == 0
    for layer in ("1", "2", "3"):
        mine = [n for n in before if n.startswith(layer + ".")]
        new = torch.cat([optimizer.parameters[name].detach().flatten() for name in mine])
        old = torch.cat([before[name].flatten() for name in mine])
        expected = (new - old).norm() / new.norm()
        torch.testing.assert_close(ratios[f"layer/{layer}"], expected, rtol=1e-4, atol=0)


def test_optimizers_of_torch_have_no_updates_to_show() -> None:
    step = make_step(make_task())
    step(0, [make_batch()])
    assert step.update_ratios() == {}


@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_compiled_gradients_equal_eager_ones_and_names_stay(mode: str) -> None:
    eager, compiled = make_task(), make_task()
    precision = make_precision("bf16", CPU)
    compile_task(compiled, mode, precision)
    gradients = []
    for task in (eager, compiled):
        compute_loss(task.loss, task.model, make_batch(), precision).total.backward()
        gradients.append({name: p.grad for name, p in task.model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert eager.model.state_dict().keys() == compiled.model.state_dict().keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0.05, atol=0.02)


def test_autocast_is_inside_what_is_compiled() -> None:
    """A compiled block computes in bf16 though nothing around it does."""
    task = make_task()
    dtypes = []
    block = task.model.get_submodule("1")
    block.get_submodule("down").register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    compile_task(task, "blocks", make_precision("bf16", CPU))
    block(torch.randn(2, 4))
    assert dtypes == [torch.bfloat16]


def test_blocks_are_needed_to_compile_blocks() -> None:
    task = Task(model=nn.Linear(1, 1), loss=squared_error)
    eager = dataclasses.replace(task, blocks=[TaskBlock("", task.model, compile=False)])
    for without in (task, eager):
        with pytest.raises(ConfigError, match="needs a model with repeated blocks"):
            compile_task(without, "blocks", make_precision("fp32", CPU))


def test_repeated_blocks_are_blocks_rather_than_stages() -> None:
    stages = [nn.Sequential(*(Block() for _ in range(2))) for _ in range(2)]
    model = nn.Sequential(nn.Linear(4, 4), *stages, nn.Linear(4, 1))
    assert [block.name for block in repeated_blocks(model)] == ["1.0", "1.1", "2.0", "2.1"]
    assert repeated_blocks(nn.Linear(1, 1)) == ()


def test_the_average_follows_the_weights_and_swaps_in_and_out() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = Ema(dict(model.named_parameters()), 0.5)
    nn.init.constant_(model.weight, 3.0)
    # Early decay is (1 + 0) / (10 + 0) = 0.1: 0.1 * 1 + 0.9 * 3.
    ema.update(0)
    with ema.swapped_in():
        assert model.weight.item() == pytest.approx(2.8)
    assert model.weight.item() == 3.0
    assert ema.average["weight"].item() == pytest.approx(2.8)
    ema.update(1000)
    assert ema.average["weight"].item() == pytest.approx(0.5 * 2.8 + 0.5 * 3.0)


def test_an_error_inside_does_not_leave_the_average_in_the_model() -> None:
    model = nn.Linear(1, 1)
    ema = Ema(dict(model.named_parameters()), 0.5)
    before = model.weight.item()
    nn.init.constant_(ema.average["weight"], 7.0)
    with pytest.raises(RuntimeError), ema.swapped_in():
        raise RuntimeError
    assert model.weight.item() == before


def test_the_saved_average_is_one_model_where_weights_are_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(2, 2, bias=False)
            self.outside = nn.Linear(2, 2, bias=False)
            self.outside.weight = self.inside.weight

    task = Task(model=Tied(), loss=squared_error)
    step = make_step(task)
    ema = Ema(step.optimizer.parameters, 0.5)
    nn.init.constant_(ema.average["inside.weight"], 7.0)
    state = TrainingState(task, step, ema, CPU, {}).ema_state()
    assert state is not None
    assert torch.equal(state["inside.weight"], state["outside.weight"])
    assert state["inside.weight"][0, 0] == 7.0


def test_float64_models_train() -> None:
    task = make_task()
    task.model.double()

    def loss(model: nn.Module, batch: Batch) -> Loss:
        return Loss((model(batch["inputs"].double()) - batch["targets"]).square().mean())

    step = make_step(Task(model=task.model, loss=loss), clip_norm=1.0)
    losses = [step(i, [make_batch(64, i)]).loss.item() for i in range(60)]
    assert losses[-1] < 0.3 * losses[0]


def test_a_loss_that_reaches_nothing_trained_is_an_error() -> None:
    task = make_task()

    def loss(model: nn.Module, batch: Batch) -> Loss:
        return Loss(batch["inputs"].sum())

    with pytest.raises(ConfigError, match="must depend on a trained parameter; at step 3"):
        make_step(Task(model=task.model, loss=loss))(2, [make_batch()])


def test_parts_may_differ_between_micro_batches() -> None:
    task = make_task()

    def loss(model: nn.Module, batch: Batch) -> Loss:
        error = model(batch["inputs"]).square().mean()
        return Loss(error, {batch.source: error.detach()})

    batches = [dataclasses.replace(make_batch(seed=i), source=n) for i, n in enumerate("aba")]
    parts = make_step(Task(model=task.model, loss=loss))(0, batches).parts
    assert set(parts) == {"a", "b"}
    means = [loss(make_task().model, batch).total for batch in batches]
    torch.testing.assert_close(parts["a"], (means[0] + means[2]).detach() / 2)


def test_the_loss_knows_the_learning_rate() -> None:
    task = make_task()
    seen: list[float] = []

    def loss(model: nn.Module, batch: Batch) -> Loss:
        seen.append(batch.lr_factor)
        return squared_error(model, batch)

    config = OptimConfig(lr=0.05, schedule=ScheduleConfig(name="linear"))
    other = Task(model=task.model, loss=loss)
    optimizer = Optimizer(make_groups(other, config, {}), config, total_steps=4)
    precision = make_precision("fp32", CPU)
    step = TrainingStep(other, optimizer, None, GradientsConfig(), precision)
    for index in range(4):
        step(index, [make_batch()])
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_products_outside_of_autocast_may_be_tf32() -> None:
    cuda = torch.device("cuda")
    try:
        assert make_precision("bf16", cuda).name == "bf16"
        assert torch.get_float32_matmul_precision() == "highest"
        assert make_precision("bf16", cuda, tf32=True).name == "bf16"
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        make_precision("fp32", CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
