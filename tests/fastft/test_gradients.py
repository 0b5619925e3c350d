"""The gradient guard: norms, clipping, bad steps, loss scale."""

import math

import pytest
import torch

from fastft.config import GradientsConfig, ZClipConfig
from fastft.gradients import GradientGuard

CPU = torch.device("cpu")


def make_guard(*, scaled: bool = False, fused: bool = False, **settings) -> GradientGuard:
    config = GradientsConfig(**settings)
    return GradientGuard(["a", "b", "c"], config, CPU, scaled=scaled, fused=fused)


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


SERIES = (3.0, 4.5, 0.1, math.nan, 5.0, math.inf, math.nan, math.nan, 2.0, 1.0)


@pytest.mark.usefixtures("kernel_path")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_norm": 2.0},
        {"clip_norm": 2.0, "scaled": True},
        {"clip_norm": 2.0, "explode_norm": 4.9},
        {"explode_norm": 4.9, "on_explode": "warn", "on_nonfinite": "warn"},
        {"stop_after": 2},
    ],
    ids=str,
)
def test_fastfts_norm_gives_the_same_verdicts(settings) -> None:
    plain, fused = make_guard(**settings), make_guard(fused=True, **settings)
    for value in SERIES:
        scale = plain.scale.item()
        found = gradients(value * scale, 1.5 * scale)
        one, other = plain.inspect(found), fused.inspect(found)
        torch.testing.assert_close(one.norm, other.norm, equal_nan=True)
        torch.testing.assert_close(one.tensor_norms, other.tensor_norms, equal_nan=True)
        assert one.skip.item() == other.skip.item()
        if math.isfinite(value):
            torch.testing.assert_close(one.divisor, other.divisor)
        assert fused.state_dict() == plain.state_dict()
    assert fused.take_bad_names() == plain.take_bad_names() == ["a"]


ZCLIP = {"zclip": ZClipConfig(warmup_steps=5), "fused": True}


@pytest.mark.usefixtures("kernel_path")
def test_zclip_clips_an_outlier_once_it_has_seen_enough() -> None:
    guard = make_guard(**ZCLIP)
    usual = (1.0, 1.2, 0.9, 1.1, 1.0)
    # The outlier within the warm-up of another guard goes through as it is.
    assert make_guard(**ZCLIP).inspect(gradients(10.0, 0.0)).divisor.item() == 1.0
    for value in usual:
        assert guard.inspect(gradients(value, 0.0)).divisor.item() == 1.0
    verdict = guard.inspect(gradients(10.0, 0.0))
    assert verdict.norm.item() == pytest.approx(10.0)
    # z_limit^2 / z deviations above the mean, after the paper.
    mean = sum(usual) / 5
    deviation = math.sqrt(sum((value - mean) ** 2 for value in usual) / 5)
    threshold = mean + 2.5**2 / ((10.0 - mean) / deviation) * deviation
    assert verdict.divisor.item() == pytest.approx(10.0 / threshold, rel=1e-4)
    assert verdict.skip.item() == 0.0


@pytest.mark.usefixtures("kernel_path")
def test_zclip_remembers_past_norms_through_a_round_trip() -> None:
    guard, other, fresh = (make_guard(**ZCLIP) for _ in range(3))
    for value in (1.0, 1.2, 0.9, math.nan, 1.1, 1.0):
        guard.inspect(gradients(value, 0.0))
    other.load_state_dict({name: value.clone() for name, value in guard.state_dict().items()})
    for value in (10.0, 1.3, 4.0):
        a, b, c = (g.inspect(gradients(value, 0.0)) for g in (guard, other, fresh))
        assert torch.equal(a.divisor, b.divisor)
        assert c.divisor.item() == 1.0
    assert {k: v.tolist() for k, v in guard.state_dict().items()} == {
        k: v.tolist() for k, v in other.state_dict().items()
    }


@pytest.mark.usefixtures("kernel_path")
def test_of_zclip_and_clip_norm_the_lower_threshold_counts() -> None:
    guard = make_guard(clip_norm=1.05, **ZCLIP)
    for value in (1.0, 1.2, 0.9, 1.1, 1.0):
        divisor = guard.inspect(gradients(value, 0.0)).divisor.item()
        assert divisor == pytest.approx(max(1.0, value / 1.05), rel=1e-4)
    assert guard.inspect(gradients(10.0, 0.0)).divisor.item() > 1.01 * 10.0 / 1.05
