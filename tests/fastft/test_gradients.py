"""The gradient guard: norms, clipping, bad steps, loss scale."""

import math

import pytest
import torch

from fastft.config import GradientsConfig
from fastft.gradients import GradientGuard

CPU = torch.device("cpu")


def make_guard(*, scaled: bool = False, **settings) -> GradientGuard:
    return GradientGuard(["a", "b", "c"], GradientsConfig(**settings), CPU, scaled=scaled)


def gradients(*values: float) -> list[torch.Tensor | None]:
    return [torch.tensor([value, 0.0]) for value in values] + [None]


def test_norms_are_global_and_per_tensor_and_a_missing_gradient_counts_nothing() -> None:
    verdict = make_guard().inspect(gradients(3.0, 4.0))
    assert verdict.norm.item() == pytest.approx(5.0)
    assert verdict.tensor_norms.tolist() == [3.0, 4.0, 0.0]
    assert verdict.divisor.item() == 1.0
    assert verdict.skip.item() == 0.0


def test_clipping_agrees_with_torch() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for parameter, gradient in zip(parameters, gradients(3.0, 4.0), strict=False):
        parameter.grad = gradient
    verdict = make_guard(clip_norm=1.0).inspect([p.grad for p in parameters] + [None])
    ours = [p.grad / verdict.divisor for p in parameters if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for a, p in zip(ours, parameters, strict=True):
        torch.testing.assert_close(a, p.grad)


def test_a_small_norm_is_not_scaled_up() -> None:
    assert make_guard(clip_norm=10.0).inspect(gradients(3.0, 4.0)).divisor.item() == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("policy", "skip"), [("skip", 1.0), ("warn", 0.0)])
def test_nonfinite_gradients(bad: float, policy, skip: float) -> None:
    guard = make_guard(on_nonfinite=policy)
    assert guard.inspect(gradients(1.0, bad)).skip.item() == skip
    assert guard.inspect(gradients(1.0, 1.0)).skip.item() == 0.0
    counters = {name: value.item() for name, value in guard.counters().items()}
    expected = {"nonfinite": 1, "exploding": 0, "skipped": skip, "bad_in_a_row": 0, "stop": 0}
    assert counters == expected
    assert guard.take_bad_names() == ["b"]
    assert guard.take_bad_names() == []


@pytest.mark.parametrize(("policy", "skip"), [("skip", 1.0), ("warn", 0.0)])
def test_exploding_gradients(policy, skip: float) -> None:
    guard = make_guard(explode_norm=4.5, on_explode=policy)
    assert guard.inspect(gradients(3.0, 3.0)).skip.item() == 0.0
    assert guard.inspect(gradients(3.0, 4.0)).skip.item() == skip
    assert guard.counters()["exploding"].item() == 1


def test_stop_is_a_latch_after_n_bad_steps_in_a_row() -> None:
    guard = make_guard(stop_after=2)
    bad, good = gradients(math.nan, 1.0), gradients(1.0, 1.0)
    for step in (bad, good, bad):
        guard.inspect(step)
    assert guard.counters()["stop"].item() == 0
    guard.inspect(bad)
    assert guard.counters()["stop"].item() == 1
    # Until the host sees it, no update goes through, good or bad.
    assert guard.inspect(good).skip.item() == 1
    assert guard.counters()["stop"].item() == 1


def test_the_loss_scale_moves_as_torchs_grad_scaler_does() -> None:
    guard = make_guard(scaled=True)
    scaler = torch.GradScaler("cpu", init_scale=2.0**16)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler.scale(torch.ones(()))
    for step in range(4100):
        value = math.inf if step in (0, 1, 2500) else 1.0
        guard.inspect(gradients(value, 1.0))
        weight.grad = torch.tensor([value, 1.0])
        scaler.step(optimizer)
        scaler.update()
        if step in (0, 1, 2, 2001, 2002, 2499, 2500, 4099):
            assert guard.scale.item() == scaler.get_scale()


def test_scaled_norms_are_those_of_the_unscaled_gradients() -> None:
    guard = make_guard(scaled=True, clip_norm=1.0)
    scale = guard.scale.item()
    verdict = guard.inspect(gradients(3.0 * scale, 4.0 * scale))
    assert verdict.norm.item() == pytest.approx(5.0)
    assert verdict.divisor.item() == pytest.approx(5.0 * scale)


def test_state_round_trip() -> None:
    guard = make_guard(scaled=True, stop_after=3)
    for value in (math.nan, 1.0, math.nan):
        guard.inspect(gradients(value, 1.0))
    other = make_guard(scaled=True, stop_after=3)
    other.load_state_dict({name: value.clone() for name, value in guard.state_dict().items()})
    for one in (guard, other):
        one.inspect(gradients(math.nan, 1.0))
    assert {k: v.item() for k, v in guard.state_dict().items()} == {
        k: v.item() for k, v in other.state_dict().items()
    }
