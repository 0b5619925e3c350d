"""The paper's loss: against upstream's forward and normalisation, over roll-outs, in training."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aurora
import pytest
import torch
from upstream_aurora import upstream_batch, write_weather

from fastft.errors import ConfigError, DataError
from fastft.task import Batch

# Supplement D, typed anew.
PAPER = {"msl": 1.5, "10u": 0.77, "10v": 0.66, "2t": 3.0}
PAPER |= {"z": 2.8, "q": 0.78, "t": 1.7, "u": 0.87, "v": 0.6}


def normalised(model: Any, predicted: aurora.Batch, samples: list[Any], step: int) -> Any:
    """Normalised predictions and targets of one step, by upstream's own normalisation."""
    height = predicted.spatial_shape[0]
    target = aurora.Batch(
        {
            n: torch.stack([torch.tensor(s["target_surf"][n][[step]]) for s in samples])
            for n in predicted.surf_vars
        },
        {},
        {
            n: torch.stack([torch.tensor(s["target_atmos"][n][[step]]) for s in samples])
            for n in predicted.atmos_vars
        },
        predicted.metadata,
    )
    both = [batch.normalise(model.surf_stats) for batch in (predicted, target)]
    pairs = [{**batch.surf_vars, **batch.atmos_vars} for batch in both]
    return {n: (pairs[0][n], pairs[1][n][..., :height, :]) for n in pairs[0]}


def paper_loss(pairs: Any, alpha: float = 0.25, beta: float = 1.0, gamma: float = 1.0) -> Any:
    surface = ("2t", "10u", "10v", "msl")
    total = sum(
        (alpha if name in surface else beta) * PAPER[name] * (a - b).abs().mean()
        for name, (a, b) in pairs.items()
    )
    return gamma * total / len(pairs)


@pytest.mark.parametrize("grid", [(16, 32), (17, 32)])
def test_loss_is_the_papers(
    grid: tuple[int, int], make_adapter: Any, build: Any, make_samples: Any
) -> None:
    adapter = make_adapter(loss={"alpha": 0.5, "beta": 0.75, "gamma": 2.0})
    task = build(adapter)
    samples = make_samples(adapter, 2, grid=grid)
    batch = Batch(adapter.collate(samples), 2)

    loss = task.loss(task.model, batch)
    loss.total.backward()
    gradients = [p.grad.clone() for p in task.model.parameters()]
    task.model.zero_grad()

    pairs = normalised(task.model, task.model(upstream_batch(samples)), samples, 0)
    expected = paper_loss(pairs, 0.5, 0.75, 2.0)
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=0)
    for ours, parameter in zip(gradients, task.model.parameters(), strict=True):
        theirs = parameter.grad
        assert theirs is not None
        assert ours.norm() > 0
        # Signs of differences that are rounded differently near zero.
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    for name, (prediction, target) in pairs.items():
        part = (prediction - target).abs().mean().detach()
        torch.testing.assert_close(loss.parts[name], part, rtol=1e-5, atol=0)
    assert set(loss.parts) == set(pairs)
    assert loss.predictions is None


def test_weights_and_presets(make_adapter: Any, build: Any, make_samples: Any) -> None:
    settings = {"preset": "none", "weights": {"2t": 3.0, "q": 0.0}}
    adapter = make_adapter(loss=settings)
    task = build(adapter)
    with torch.no_grad():
        loss = task.loss(task.model, Batch(adapter.collate(make_samples(adapter)), 2))
    surface, weights = ("2t", "10u", "10v", "msl"), {"2t": 3.0, "q": 0.0}
    expected = sum(
        (0.25 if name in surface else 1.0) * weights.get(name, 1.0) * part.item()
        for name, part in loss.parts.items()
    )
    assert loss.total.item() == pytest.approx(expected / 9, rel=1e-6)

    with pytest.raises(ConfigError) as error:
        build(make_adapter(loss={"weights": {"2tt": 1.0, "z": -1.0}}))
    assert error.value.problems == (
        "model.options.loss.weights: '2tt' must be a predicted variable; it is none; did you mean"
        " '2t'?",
        "model.options.loss.weights.z: must be 0 or more; got -1.0; correct it",
    )


@pytest.mark.parametrize("lora", [False, True])
def test_roll_out_is_upstreams(
    lora: bool, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    adapter = make_adapter(
        rollout_steps=3, arguments={"use_lora": lora, "lora_mode": "all", "lora_steps": 3}
    )
    task = build(adapter)
    if lora:
        with torch.no_grad():
            for name, parameter in task.model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.5)
    samples = make_samples(adapter, 2)
    batch = Batch(adapter.collate(samples), 2)

    task.model.eval()
    with torch.no_grad():
        loss = task.loss(task.model, batch)
        steps = list(aurora.rollout(task.model, upstream_batch(samples), 3))
    expected = [
        paper_loss(normalised(task.model, predicted, samples, step)).item()
        for step, predicted in enumerate(steps)
    ]
    assert loss.total.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    got = [loss.parts[f"step-{step}"].item() for step in (1, 2, 3)]
    assert got == pytest.approx(expected, rel=1e-5)
    for kind in ("surf_vars", "atmos_vars"):
        for name in getattr(steps[0], kind):
            theirs = torch.cat([getattr(step, kind)[name] for step in steps], 1)
            assert torch.equal(loss.predictions[name], theirs)
            assert loss.predictions[name].shape == batch[name].shape


def test_pushforward_trains_the_last_step_alone(
    make_adapter: Any, build: Any, make_samples: Any
) -> None:
    gradients, totals = {}, {}
    for pushforward in (False, True):
        adapter = make_adapter(rollout_steps=2, loss={"pushforward": pushforward})
        task = build(adapter)
        samples = make_samples(adapter, 1)
        loss = task.loss(task.model, Batch(adapter.collate(samples), 1))
        loss.total.backward()
        gradients[pushforward] = task.model.backbone.time_mlp[0].weight.grad.clone()
        totals[pushforward] = loss
    total, last = totals[False], totals[True]
    both = (total.parts["step-1"] + total.parts["step-2"]) / 2
    torch.testing.assert_close(total.total.detach(), both)
    torch.testing.assert_close(last.total.detach(), total.parts["step-2"])

    # By hand: the first step's prediction, detached, is data.
    task.model.zero_grad()
    with torch.no_grad():
        first = task.model(upstream_batch(samples))
    state = upstream_batch(samples)
    join = lambda a, b: {n: torch.cat([a[n][:, 1:], b[n]], 1) for n in b}  # noqa: E731
    fed = aurora.Batch(
        join(state.surf_vars, first.surf_vars),
        first.static_vars,
        join(state.atmos_vars, first.atmos_vars),
        first.metadata,
    )
    paper_loss(normalised(task.model, task.model(fed), samples, 1)).backward()
    expected = task.model.backbone.time_mlp[0].weight.grad
    torch.testing.assert_close(gradients[True], expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(gradients[False], gradients[True], rtol=1e-2)


WHOLE, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PRECISIONS: dict[str, tuple[dict[str, str], torch.dtype, tuple[torch.dtype, ...]]] = {
    "upstream's": ({"autocast": "backbone"}, BF16, (WHOLE, BF16, WHOLE)),
    "all": ({"autocast": "all"}, BF16, (BF16, BF16, BF16)),
    "all in fp16": ({"autocast": "all"}, FP16, (FP16, FP16, FP16)),
    "both": ({"autocast": "all", "backbone": "bf16"}, FP16, (FP16, BF16, FP16)),
    "no autocast": ({"autocast": "all", "backbone": "bf16"}, WHOLE, (WHOLE, WHOLE, WHOLE)),
}


@pytest.mark.parametrize("case", PRECISIONS)
def test_precision_follows_the_trainer(
    case: str, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    """The weights stay in float32."""
    options, dtype, expected = PRECISIONS[case]
    adapter = make_adapter(**options)
    task = build(adapter)
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in task.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            dtypes = seen.setdefault(name.partition(".")[0], set())

            def note(_: Any, inputs: Any, output: Any, dtypes: Any = dtypes) -> None:
                dtypes.add(output.dtype)

            module.register_forward_hook(note)
    batch = Batch(adapter.collate(make_samples(adapter)), 2)
    with torch.autocast("cpu", dtype if dtype is not WHOLE else None, enabled=dtype is not WHOLE):
        loss = task.loss(task.model, batch)
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in task.model.parameters())
    parts = ("encoder", "backbone", "decoder")
    assert seen == {part: {found} for part, found in zip(parts, expected, strict=True)}


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_of_a_bf16_backbone_alone(
    compiled: bool, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    """As they are measured and recomputed: autocast around them is to fp16."""
    adapter = make_adapter(autocast="all", backbone="bf16")
    task = build(adapter)
    block = next(b.module for b in task.blocks if b.layer)
    calls: list[Any] = []
    hold = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        task.loss(task.model, Batch(adapter.collate(make_samples(adapter)), 2))
    hold.remove()
    found: list[torch.dtype] = []
    block.attn.proj.register_forward_hook(lambda _, inputs, output: found.append(output.dtype))
    if compiled:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
    with torch.autocast("cpu", FP16):
        block(*calls[0][0], **calls[0][1])
    assert found == [BF16]


def test_bad_samples(make_adapter: Any, make_samples: Any) -> None:
    adapter = make_adapter()
    first, second = make_samples(adapter)
    second["surf"]["2tt"] = second["surf"].pop("2t")
    second["target_atmos"]["z"] = second["target_atmos"]["z"][:, :1]
    second["lat"] = second["lat"] - 1
    second["static"]["lsm"] = second["static"]["lsm"] + 1
    with pytest.raises(DataError) as error:
        adapter.collate([first, second])
    advice = "; got several; set data.mixing = 'batch', or data.batch_size = 1"
    assert error.value.problems == (
        f"lat: must be the same in all samples of a batch{advice}",
        f"static.lsm: must be the same in all samples of a batch{advice}",
        "surf.2t: must be in every sample; got none; did you mean '2tt'?; add it to the data, or"
        " name the variables that there are in model.options",
        "surf.2tt: must be a variable of the model; got data without one; did you mean '2t'?; else"
        " leave it out, or add it in model.options",
        "target_atmos.z: must have the shape [1, 2, 16, 32]; got [1, 1, 16, 32]; correct the data"
        " or model.options.rollout_steps",
    )

    (levels,) = make_samples(adapter, 1)
    levels["levels"] = [500, 700]
    with pytest.raises(DataError, match=r"levels: must be those of .*\[500, 850\]; got \[500, 70"):
        adapter.collate([levels])
    (odd,) = make_samples(adapter, 1, grid=(18, 34))
    with pytest.raises(DataError, match="patch size 4, the height too, or one more; got 18 x 34"):
        adapter.collate([odd])


RUN = """\
[run]
folder = "run"
steps = 20
device = "cpu"

[model]
adapter = "aurora"

[model.options]
levels = [500, 850]
surf_vars = {{ tp = {{ location = 0.0, scale = 0.01 }} }}
arguments = {arguments}

[data]
batch_size = 2
train = [{{ path = "train.nc", options = {{ static = "static.nc" }} }}]
validation = [{{ path = "later.nc", options = {{ static = "static.nc" }} }}]

[optim]
lr = 3e-2

[evaluate]
every_steps = 20
metrics = [{{ name = "rmse", prediction = "2t", target = "2t" }}]

[log]
every_steps = 1
tensorboard = false
"""


@pytest.mark.usefixtures("project")
def test_training_with_a_new_variable(make_adapter: Any, fastft: Callable[..., Any]) -> None:
    adapter = make_adapter(surf_vars={"tp": {"location": 0.0, "scale": 0.01}})
    write_weather(Path("train.nc"), adapter.variables, 0, 8)
    write_weather(Path("later.nc"), adapter.variables, 8, 4)
    arguments = ", ".join(f"{k} = {v}" for k, v in adapter.options.arguments.items())
    Path("aurora.toml").write_text(RUN.format(arguments=f"{{ {arguments} }}"))

    outcome = fastft("train", "aurora.toml")
    assert (outcome.errors, outcome.code) == ("", 0)
    # No data check found anything.
    assert "warning (" not in outcome.output
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
    assert {"train/tp", "train/z"} <= set(records[0])
    scores = [record for record in records if "validation/rmse" in record]
    assert math.isfinite(scores[-1]["validation/rmse"])

    outcome = fastft("export", "aurora.toml", "--to", "exported.ckpt")
    assert (outcome.errors, outcome.code) == ("", 0)
    assert json.loads(Path("exported.ckpt.json").read_text())["surf_vars"][-1] == "tp"
    outcome = fastft("show", "exported.ckpt", "--run", "aurora.toml")
    assert "10u, 10v, 2t, msl, tp" in outcome.output
