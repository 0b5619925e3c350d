"""Groups, schedules and updates of the optimizer."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from fastft.config import OptimConfig, ParameterRule, ScheduleConfig
from fastft.errors import CheckpointError, ConfigError
from fastft.fused import TORCH_ONLY, Kernels
from fastft.optim import Optimizer, layers_from_blocks, make_groups, schedule_factor
from fastft.task import Batch, Block, Loss, Task


def no_loss(model: nn.Module, batch: Batch) -> Loss:
    raise NotImplementedError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def make_task() -> Task:
    torch.manual_seed(0)
    net = Net()
    blocks = tuple(Block(f"blocks.{i}", block) for i, block in enumerate(net.blocks))
    return Task(model=net, loss=no_loss, blocks=blocks, heads=("head",))


def settings_of(task: Task, config: OptimConfig) -> dict[str, tuple[float, float]]:
    groups = make_groups(task, config, {})
    return {name: (g.lr, g.weight_decay) for g in groups for name in g.parameters}


def test_embeddings_with_sparse_gradients_are_refused_unless_frozen() -> None:
    task = make_task()
    task.model.words = nn.EmbeddingBag(5, 4, sparse=True)
    with pytest.raises(ConfigError, match="gradients must be dense; got sparse ones from words"):
        make_groups(task, OptimConfig(lr=0.1), {})
    task.model.words.weight.requires_grad_(False)
    make_groups(task, OptimConfig(lr=0.1), {})


def test_first_rule_that_matches_wins_and_biases_do_not_decay() -> None:
    config = OptimConfig(
        lr=1.0,
        weight_decay=0.1,
        groups=(
            ParameterRule(match=("head.*",), lr=2.0),
            ParameterRule(match=("head.*", "blocks.*"), lr=3.0, weight_decay=0.5),
        ),
    )
    settings = settings_of(make_task(), config)
    assert settings["head.weight"] == (2.0, 0.1)
    assert settings["head.bias"] == (2.0, 0.0)
    assert settings["blocks.1.weight"] == (3.0, 0.5)
    assert settings["norm.weight"] == (1.0, 0.0)
    assert settings["stem.weight"] == (1.0, 0.1)


def test_norms_and_biases_decay_where_asked() -> None:
    config = OptimConfig(lr=1.0, weight_decay=0.1, decay_norms_and_biases=True)
    assert {decay for _, decay in settings_of(make_task(), config).values()} == {0.1}


def test_layer_decay_counts_from_the_output() -> None:
    settings = settings_of(make_task(), OptimConfig(lr=1.0, layer_decay=0.5))
    assert settings["head.weight"][0] == 1.0
    assert settings["norm.weight"][0] == 1.0
    assert settings["blocks.2.weight"][0] == 0.5
    assert settings["stem.weight"][0] == 0.5**4


def test_what_stands_between_blocks_belongs_to_the_block_before() -> None:
    task = make_task()
    middle = dataclasses.replace(
        task, blocks=(Block("stem", task.model.get_submodule("stem")), task.blocks[1])
    )
    layers = layers_from_blocks(middle)
    assert layers["stem.weight"] == 1
    assert layers["blocks.0.weight"] == 1
    assert layers["blocks.1.weight"] == 2
    assert layers["head.weight"] == 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("haed.*",),), "optim.groups.0.match: 'haed.*' must match a parameter"),
        ((("head.*",), ("head.weight",)), "optim.groups.1.match: .* only what earlier rules took"),
        ((("stem.*",),), "match only frozen parameters"),
    ],
)
def test_idle_rules_are_refused(rules: tuple[tuple[str, ...], ...], message: str) -> None:
    task = make_task()
    task.model.stem.requires_grad_(False)
    config = OptimConfig(lr=1.0, groups=tuple(ParameterRule(match=rule) for rule in rules))
    with pytest.raises(ConfigError, match=message):
        make_groups(task, config, {})


def test_every_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    task = make_task()
    task.model.stem.requires_grad_(False)
    groups = make_groups(task, OptimConfig(lr=1.0, weight_decay=0.1), {"stem.bias": 5})
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(set(dict(task.model.named_parameters())) - {"stem.weight"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(name="constant"), {0: 1.0, 99: 1.0}),
        (ScheduleConfig(name="linear", end_factor=0.1), {0: 1.0, 50: 0.55, 100: 0.1}),
        (ScheduleConfig(name="cosine"), {0: 1.0, 50: 0.5, 100: 0.0, 101: 0.0}),
        (ScheduleConfig(name="cosine", warmup_steps=10), {0: 1 / 11, 9: 10 / 11, 10: 1.0, 55: 0.5}),
        (ScheduleConfig(name="step", step_size=30, gamma=0.5), {29: 1.0, 30: 0.5, 60: 0.25}),
    ],
)
def test_schedules(config: ScheduleConfig, expected: dict[int, float]) -> None:
    for step, factor in expected.items():
        assert schedule_factor(config, step, 100) == pytest.approx(factor)


def test_a_cosine_is_one_and_its_last_step_still_learns() -> None:
    quarter = schedule_factor(ScheduleConfig(), 25, 100)
    assert quarter == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule_factor(ScheduleConfig(), 99, 100) > 0


def backward(task: Task, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in task.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


FUSED = Kernels(adam=True)
# Name, whose, and how fastft's keeps its moments.
OPTIMIZERS = [
    *((name, TORCH_ONLY, "fp32") for name in ("adamw", "adam", "sgd", "rmsprop")),
    *(("adamw", FUSED, moments) for moments in ("fp32", "bf16", "8bit")),
    ("adam", FUSED, "fp32"),
]
EXACT = [optimizer for optimizer in OPTIMIZERS if optimizer[2] == "fp32"]


def label(value: object) -> str:
    return ("fastft" if value.adam else "torch") if isinstance(value, Kernels) else str(value)


@pytest.mark.parametrize(("name", "kernels", "moments"), EXACT, ids=label)
def test_updates_equal_torch_on_a_schedule_and_the_divisor_divides(name, kernels, moments) -> None:
    ours, theirs = make_task(), make_task()
    schedule = ScheduleConfig(name="cosine", warmup_steps=2)
    config = OptimConfig(lr=0.01, name=name, weight_decay=0.1, schedule=schedule)
    optimizer = Optimizer(make_groups(ours, config, {}), config, 5, kernels)
    decayed = [p for p in theirs.model.parameters() if p.ndim > 1]
    plain = [p for p in theirs.model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.01),
        "adam": lambda: torch.optim.Adam(groups, lr=0.01),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9),
    }[name]()
    for step in range(5):
        backward(theirs, step)
        for group in reference.param_groups:
            group["lr"] = 0.01 * schedule_factor(schedule, step, 5)
        reference.step()
        backward(ours, step)
        for parameter in ours.model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 4
        optimizer.update(step, torch.tensor(4.0), torch.tensor(0.0))
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "kernels", "moments"), OPTIMIZERS, ids=label)
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_update_changes_nothing(name, kernels, moments, first: bool) -> None:
    """As if the step had not been: the following updates equal those of a run without it."""
    skipping, plain = make_task(), make_task()
    schedule = ScheduleConfig(name="constant")
    config = OptimConfig(lr=0.01, name=name, weight_decay=0.1, moments=moments, schedule=schedule)
    one = torch.tensor(1.0)
    results = []
    for task, bad_step in ((skipping, 0 if first else 2), (plain, None)):
        optimizer = Optimizer(make_groups(task, config, {}), config, 9, kernels)
        for step in range(4):
            if step == bad_step:
                before = [p.detach().clone() for p in task.model.parameters()]
                backward(task, 99)
                for parameter in task.model.parameters():
                    assert parameter.grad is not None
                    parameter.grad[..., 0] = math.nan
                optimizer.update(step, one, torch.tensor(1.0))
                for old, new in zip(before, task.model.parameters(), strict=True):
                    assert torch.equal(old, new)
            backward(task, step)
            optimizer.update(step, one, torch.tensor(0.0))
        results.append([p.detach().clone() for p in task.model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def copy_state(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize(("name", "kernels", "moments"), OPTIMIZERS, ids=label)
def test_state_round_trip_goes_on_bitwise(name, kernels, moments) -> None:
    config = OptimConfig(lr=0.01, name=name, weight_decay=0.1, moments=moments)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    task = make_task()
    optimizer = Optimizer(make_groups(task, config, {}), config, 9, kernels, seed=3)
    for step in range(3):
        backward(task, step)
        optimizer.update(step, one, zero)
    other = make_task()
    other.model.load_state_dict(task.model.state_dict())
    resumed = Optimizer(make_groups(other, config, {}), config, 9, kernels, seed=3)
    resumed.load_state_dict(copy_state(optimizer))
    for step in range(3, 6):
        for run, opt in ((task, optimizer), (other, resumed)):
            backward(run, step)
            opt.update(step, one, zero)
    for a, b in zip(task.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_other_parameters_is_refused() -> None:
    config = OptimConfig(lr=0.01)
    task = make_task()
    state = Optimizer(make_groups(task, config, {}), config, 9).state_dict()
    task.model.stem.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"2 differ, the first is 'stem\.bias'"):
        Optimizer(make_groups(task, config, {}), config, 9).load_state_dict(state)


def train_pair(pair, steps: range, absent: Mapping[str, int] | None = None) -> None:
    """The same gradients, four times too large, to several optimizers; step 2 is skipped.

    Args:
        pair: (task, optimizer) each.
        absent: name in the model and the step from which it has gradients.
    """
    for step in steps:
        for task, optimizer in pair:
            backward(task, step)
            for name, parameter in task.model.named_parameters():
                parameter.grad = None if step < (absent or {}).get(name, 0) else parameter.grad * 4
            optimizer.update(step, torch.tensor(4.0), torch.tensor(float(step == 2)))


def make_pair(config: OptimConfig, *kernels: Kernels) -> list[tuple[Task, Optimizer]]:
    tasks = [make_task() for _ in kernels]
    return [
        (task, Optimizer(make_groups(task, config, {}), config, 8, kind))
        for task, kind in zip(tasks, kernels, strict=True)
    ]


def assert_close(one: Task, other: Task) -> None:
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


GROUPS = OptimConfig(
    lr=0.01,
    weight_decay=0.1,
    groups=(ParameterRule(match=("head.*",), lr=0.03, weight_decay=0.0, betas=(0.8, 0.9)),),
    schedule=ScheduleConfig(name="cosine", warmup_steps=2),
)


@pytest.mark.usefixtures("kernel_path")
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_fastfts_adam_follows_torchs(name) -> None:
    """Groups, a schedule, a divisor, a skipped step, and tensors whose gradients come later."""
    config = dataclasses.replace(GROUPS, name=name)
    (ours, fused), (theirs, plain) = pair = make_pair(config, FUSED, TORCH_ONLY)
    train_pair(pair, range(6), absent={"blocks.1.weight": 1, "stem.bias": 4})
    assert_close(ours, theirs)
    for parameter, state in fused.state_dict().items():
        assert float(state["step"]) == float(plain.state_dict()[parameter]["step"])


@pytest.mark.parametrize("kinds", [(TORCH_ONLY, FUSED), (FUSED, TORCH_ONLY)])
def test_torchs_state_loads_into_fastfts_and_back(kinds: tuple[Kernels, Kernels]) -> None:
    """As when a run goes on on another device."""
    (before, first), (after, second) = make_pair(GROUPS, *kinds)
    train_pair([(before, first)], range(4), absent={"stem.bias": 9})
    after.model.load_state_dict(before.model.state_dict())
    second.load_state_dict(copy_state(first))
    train_pair([(before, first), (after, second)], range(4, 7))
    assert_close(before, after)
    assert float(second.state_dict()["stem.bias"]["step"]) == 3
    assert float(second.state_dict()["stem.weight"]["step"]) == 6


@pytest.mark.usefixtures("kernel_path")
@pytest.mark.parametrize(("moments", "size"), [("fp32", 8), ("bf16", 4), ("8bit", 2 + 2 / 128)])
def test_moments_take_fewer_bytes_and_still_learn(moments, size: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8, bias=False)
    task = Task(model=model, loss=no_loss)
    config = OptimConfig(
        lr=0.1, weight_decay=0.0, moments=moments, schedule=ScheduleConfig(name="constant")
    )
    optimizer = Optimizer(make_groups(task, config, {}), config, 30, FUSED)
    losses = []
    for step in range(30):
        loss = (model.weight - torch.arange(16)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.update(step, torch.tensor(1.0), torch.tensor(0.0))
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert losses == sorted(losses, reverse=True)
    state = optimizer.state_dict()["weight"]
    stored = sum(value.nbytes for name, value in state.items() if name != "step")
    assert stored / model.weight.numel() == size


@pytest.mark.usefixtures("kernel_path")
def test_update_norms_are_those_of_the_last_update() -> None:
    ((task, optimizer),) = make_pair(GROUPS, FUSED)
    train_pair([(task, optimizer)], range(2), absent={"stem.weight": 2})
    assert set(optimizer.update_norms()) == set(optimizer.parameters) - {"stem.weight"}
    before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    train_pair([(task, optimizer)], range(3, 4))
    found = optimizer.update_norms()
    assert set(found) == set(optimizer.parameters)
    for name, (update, weight) in found.items():
        parameter = optimizer.parameters[name].detach()
        torch.testing.assert_close(update, (parameter - before[name]).norm(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weight, parameter.norm())


def test_torchs_optimizers_measure_no_updates() -> None:
    ((task, optimizer),) = make_pair(GROUPS, TORCH_ONLY)
    train_pair([(task, optimizer)], range(1))
    assert optimizer.update_norms() == {}
