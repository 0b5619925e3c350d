"""The forward without waits: upstream's to the bit, and nothing read from the device."""

from typing import Any

import aurora
import pytest
import torch
from aurora.rollout import _advance_batch, rollout
from upstream_aurora import upstream_batch, upstream_model
from waits import Waits

from fastft.adapters.aurora.batch import first_state
from fastft.adapters.aurora.checkpoint import _record
from fastft.adapters.aurora.forward import DeviceBatch
from fastft.errors import AdapterError, DataError
from fastft.task import Batch

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"model_class": "Aurora", "arguments": {"lora_mode": "from_second"}},
    "dynamic": {"arguments": {"dynamic_vars": True}},
    "levels": {"arguments": {"level_condition": [500, 850], "separate_perceiver": ["q"]}},
    "odd step": {"timestep_hours": 0.1},
}


def values(batch: aurora.Batch) -> dict[str, torch.Tensor]:
    static = {f"static {name}": value for name, value in batch.static_vars.items()}
    places = {"lat": batch.metadata.lat, "lon": batch.metadata.lon}
    return {**batch.surf_vars, **batch.atmos_vars, **static, **places}


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_are_upstreams(variant: str, make_adapter: Any, build: Any, make_samples: Any) -> None:
    adapter = make_adapter(**VARIANTS[variant])
    model = build(adapter).model
    theirs = upstream_model(_record(adapter.options, adapter.variables))
    theirs.load_state_dict(model.state_dict(), strict=True)
    samples = make_samples(adapter)
    state, other = first_state(adapter.collate(samples)), upstream_batch(samples)
    for step in range(2):
        with Waits() as waits:
            predicted = model(state)
        assert waits.found == []
        with Waits() as waits:
            expected = theirs(other)
        # The places are real, and the test can see them.
        assert {"tensor", "aten._local_scalar_dense.default"} <= set(waits.found)
        ours = values(predicted)
        assert all(torch.equal(ours[name], value) for name, value in values(expected).items())
        assert predicted.metadata.time == expected.metadata.time
        assert predicted.metadata.rollout_step == expected.metadata.rollout_step
        if step == 1:
            for prediction in (predicted, expected):
                torch.stack([v.mean() for v in values(prediction).values()]).sum().backward()
        state, other = _advance_batch(state, predicted), _advance_batch(other, expected)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"rollout_steps": 2}, {"loss": {"pushforward": True}}])
def test_a_training_step_waits_for_nothing(
    settings: dict[str, Any], make_adapter: Any, build: Any, make_samples: Any
) -> None:
    adapter = make_adapter(**{"rollout_steps": 2, **settings})
    task = build(adapter)
    batch = Batch(adapter.collate(make_samples(adapter)), 2)
    with Waits() as waits:
        task.loss(task.model, batch).total.backward()
        with torch.no_grad():
            task.loss(task.model, batch)
    assert waits.found == []


def test_upstreams_own_batches_take_upstreams_way(
    make_adapter: Any, build: Any, make_samples: Any
) -> None:
    adapter = make_adapter()
    model = build(adapter).model
    state = upstream_batch(make_samples(adapter))
    state.metadata.lat = state.metadata.lat.flip(0)
    with pytest.raises(ValueError, match="strictly decreasing"):
        model(state)


def test_what_is_checked_on_the_host(make_adapter: Any, build: Any, make_samples: Any) -> None:
    adapter = make_adapter()
    (sample,) = make_samples(adapter, 1)
    with pytest.raises(DataError) as error:
        adapter.collate([{**sample, "lat": sample["lat"][::-1].copy()}])
    assert error.value.problems == (
        "lat, lon: must be a grid as Aurora's; got another: Latitudes must be strictly decreasing;"
        " sort rows and columns",
    )
    with pytest.raises(AdapterError, match=r"within 1 minute and 3 weeks.*; got 1000; correct it"):
        build(make_adapter(timestep_hours=1000.0))


def test_the_whole_model_compiles_to_the_same(
    make_adapter: Any, build: Any, make_samples: Any
) -> None:
    """Dynamo finds the replaced names, and breaks at dates alone."""
    adapter = make_adapter(arguments={"encoder_depths": [1, 1], "decoder_depths": [1, 1]})
    model = build(adapter).model
    state = first_state(adapter.collate(make_samples(adapter)))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected, compiled = model(state), torch.compile(model, backend="eager")(state)
    assert type(compiled) is DeviceBatch
    for name, value in values(expected).items():
        torch.testing.assert_close(values(compiled)[name], value, rtol=1e-5, atol=1e-5)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks
    assert all("datetime" in reason or "timedelta" in reason for reason in breaks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AuroraPretrained", "AuroraHighRes"])
def test_a_gpu_is_not_waited_for(
    name: str, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    adapter = make_adapter(model_class=name, rollout_steps=2, arguments={"patch_size": 4})
    device = torch.device("cuda")
    task = build(adapter)
    task.model.to(device)
    samples = make_samples(adapter)
    batch = Batch(adapter.collate(samples), 2).to(device)
    with torch.no_grad():
        ours = task.model(first_state(batch.data))
        # It moves the batch to the device before the model normalises it, as fastft does. A model
        # called with a batch on the host normalises it there, where a division rounds otherwise.
        (theirs,) = rollout(task.model, upstream_batch(samples), 1)
    assert all(torch.equal(values(ours)[n], value) for n, value in values(theirs).items())
    # Masks of shifted windows are made, and kept, at the first call.
    task.loss(task.model, batch).total.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        task.loss(task.model, batch).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
