"""Wave, air pollution and 1.5: bits as upstream's, and a loss on what the decoder gives."""

import json
from pathlib import Path
from typing import Any

import aurora
import numpy as np
import pytest
import torch
import xarray as xr
from aurora import normalisation
from aurora.insolation import insolation
from aurora.rollout import rollout
from upstream_aurora import upstream_batch, upstream_model
from waits import Waits

from fastft.adapters.aurora.checkpoint import _record
from fastft.errors import ConfigError, DataError
from fastft.task import Batch

CLASSES = ("AuroraAirPollution", "AuroraWave", "AuroraV1p5")
GRID = (18, 36)
HEIGHTS = {
    **{"swh": ("mwd", "mwp", "pp1d"), "shww": ("mdww", "mpww"), "shts": ("mdts", "mpts")},
    **{"swh1": ("mwd1", "mwp1"), "swh2": ("mwd2", "mwp2")},
}


def make(make_adapter: Any, name: str, **options: Any) -> Any:
    arguments = {"patch_size": 3, **options.pop("arguments", {})}
    return make_adapter(model_class=name, arguments=arguments, **options)


def raw_samples(adapter: Any, count: int = 2) -> list[dict[str, Any]]:
    """Fields as files hold them; no waves in a fifth of the points, there all of them zero."""
    variables, steps = adapter.variables, adapter.options.rollout_steps
    samples = []
    for index in range(count):
        random = np.random.default_rng(index)

        def surface(name: str, random: Any = random) -> np.ndarray:
            noise = random.random((2 + steps, *GRID))
            if name.startswith(("mwd", "md", "dwi")):
                return (360 * noise).astype(np.float32)
            location, scale = normalisation.locations[name], normalisation.scales[name]
            return (abs(location) + scale * (0.2 + noise)).astype(np.float32)

        def upper(name: str, random: Any = random) -> np.ndarray:
            pairs = np.array([variables.levels[name][str(level)] for level in (500, 850)])
            location, scale = pairs.T[:, :, None, None]
            noise = random.random((2 + steps, 2, *GRID))
            return (location + scale * (0.2 + noise)).astype(np.float32)

        surf = {name: surface(name) for name in adapter.variant.reads}
        for height, others in HEIGHTS.items() if "swh" in surf else ():
            calm = random.random((2 + steps, *GRID)) < 0.2
            for name in (height, *others):
                surf[name][calm] = 0
        atmos = {name: upper(name) for name in variables.atmos}
        fixed = np.random.default_rng(99)
        samples.append(
            {
                "surf": {n: v[:2] for n, v in surf.items()},
                "atmos": {n: v[:2] for n, v in atmos.items()},
                "target_surf": {n: v[2:] for n, v in surf.items()},
                "target_atmos": {n: v[2:] for n, v in atmos.items()},
                "static": {
                    n: fixed.random(GRID).astype(np.float32) - 0.5 for n in variables.static
                },
                # A Tuesday: the sine of a Monday is 0.
                "time": np.int64(1_591_056_000 + 6 * 3600 * index),
                "lat": np.linspace(80, -80, GRID[0], dtype=np.float32),
                "lon": np.linspace(0, 360, GRID[1], endpoint=False, dtype=np.float32),
                "levels": [500, 850],
            }
        )
    return samples


def collated(adapter: Any, samples: list[dict[str, Any]]) -> Batch:
    return Batch(adapter.collate([adapter.transform(s, "train") for s in samples]), len(samples))


def theirs_of(adapter: Any, samples: list[dict[str, Any]]) -> aurora.Batch:
    """The batch that a user of upstream would make of the files."""
    state = upstream_batch(samples)
    if "insolation" in adapter.variables.surf:
        for name in set(adapter.variables.surf) - set(adapter.variant.inputs):
            del state.surf_vars[name]
        hours = np.timedelta64(6, "h")
        times = [[np.datetime64(int(s["time"]), "s") + k * hours for k in (-1, 0)] for s in samples]
        grid = samples[0]["lat"], samples[0]["lon"]
        sun = [[insolation([t], *grid, enforce_2d=True)[0] for t in both] for both in times]  # type: ignore[list-item]
        state.surf_vars["insolation"] = torch.tensor(np.array(sun), dtype=torch.float32)
    return state


# Upstream gives numpy times with a zone.
@pytest.mark.filterwarnings("ignore:no explicit representation of timezones")
@pytest.mark.parametrize("name", CLASSES)
def test_round_trip_and_roll_out(name: str, tmp_path: Path, make_adapter: Any, build: Any) -> None:
    adapter = make(make_adapter, name, rollout_steps=3)
    task = build(adapter)
    model = task.model
    if name == "AuroraAirPollution":
        # As in any checkpoint of upstream's, see `_share_static_z`.
        for layer in model.encoder.atmos_token_embeds.layers.values():
            layer.weights["z"].data.copy_(layer.weights["static_z"])
    adapter.save(task, tmp_path / "model.ckpt")
    record = json.loads((tmp_path / "model.ckpt.json").read_text())
    assert record["stabilise_level_agg"] == (name == "AuroraWave")
    theirs = upstream_model(record)
    theirs.load_checkpoint_local(str(tmp_path / "model.ckpt"), strict=True)
    weights = adapter.weights(tmp_path / "model.ckpt")
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert set(weights) == set(model.state_dict())

    # Upstream's air pollution mixes up the samples of a larger batch.
    samples = raw_samples(adapter, 1 if name == "AuroraAirPollution" else 2)
    batch = collated(adapter, samples)
    with torch.no_grad():
        with Waits() as waits:
            loss = task.loss(model, batch)
        assert waits.found == []
        steps = list(rollout(theirs, theirs_of(adapter, samples), 3))
        plain = list(rollout(model, theirs_of(adapter, samples), 3))
    assert loss.total.isfinite()
    for kind in ("surf_vars", "atmos_vars"):
        for variable in getattr(steps[0], kind):
            expected = torch.cat([getattr(step, kind)[variable] for step in steps], 1)
            for ours in (
                loss.predictions[variable],
                torch.cat([getattr(step, kind)[variable] for step in plain], 1),
            ):
                assert torch.equal(ours.isnan(), expected.isnan()), variable
                assert torch.equal(ours.nan_to_num(), expected.nan_to_num()), variable
    task.metrics["weighted_rmse"].update(loss.predictions, batch)
    scores = task.metrics["weighted_rmse"].compute()
    scored = {key.split("/")[1].removesuffix("_500").removesuffix("_850") for key in scores}
    assert scored == set(adapter.variant.channels.values())
    assert np.isfinite(list(scores.values())).all()


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_reach_everything(name: str, make_adapter: Any, build: Any) -> None:
    """Through two steps, and through what a hook makes NaN or holds above zero."""
    adapter = make(make_adapter, name, rollout_steps=2)
    task = build(adapter)
    with torch.no_grad():
        for parameter_name, parameter in task.model.named_parameters():
            if parameter_name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    task.loss(task.model, collated(adapter, raw_samples(adapter))).total.backward()
    gradients = {n: p.grad for n, p in task.model.named_parameters()}
    idle = {n for n, g in gradients.items() if g is None or not g.norm()}
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)
    # What belongs to levels that the data lack, to a head of what is computed, to the embeddings of
    # what is predicted only.
    levels = {n for n in idle if "token_embeds.layers" in n or "atmos_heads" in n}
    assert not [n for n in levels if ".500." in n or ".850." in n]
    others = set(adapter.variables.surf) - set(adapter.variant.inputs) | {"insolation"}
    assert {n for n in idle - levels if not others & set(n.split("."))} == set()


def test_air_pollution(make_adapter: Any, build: Any) -> None:
    adapter = make(make_adapter, "AuroraAirPollution", arguments={"use_lora": True})
    task = build(adapter)
    samples = raw_samples(adapter)
    # Everything below zero, and so2 above its bound: the decoder's own values count.
    with torch.no_grad():
        task.model.decoder.surf_heads["pm1"].bias.fill_(-50)
        for layer in task.model.decoder.atmos_heads["so2"].layers.values():
            layer.bias.fill_(50)
    together = task.loss(task.model, collated(adapter, samples))
    together.total.backward()
    assert task.model.decoder.surf_heads["pm1"].weight.grad.norm() > 0
    assert task.model.decoder.atmos_heads["so2_mod"].layers["850"].weight.grad.norm() > 0
    assert together.parts["so2"] > 10
    alone = [task.loss(task.model, collated(adapter, [sample])) for sample in samples]
    for name, part in together.parts.items():
        expected = torch.stack([loss.parts[name] for loss in alone]).mean()
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)
    # By hand: the normalised difference of the two.
    with torch.no_grad():
        loss = task.loss(task.model, collated(adapter, samples))
    predicted, target = loss.predictions["tcco"][:, 0], collated(adapter, samples)["tcco"][:, 0]
    error = (predicted - target).abs().mean() / normalisation.scales["tcco"]
    torch.testing.assert_close(loss.parts["tcco"], error, rtol=1e-4, atol=1e-6)


def test_an_export_of_air_pollution_computes_the_same(
    tmp_path: Path, make_adapter: Any, build: Any
) -> None:
    """z and static_z, which see the same field, have two embeddings here and one upstream."""
    adapter = make(make_adapter, "AuroraAirPollution")
    task = build(adapter)
    adapter.save(task, tmp_path / "model.ckpt")
    theirs = upstream_model(json.loads((tmp_path / "model.ckpt.json").read_text()))
    theirs.load_checkpoint_local(str(tmp_path / "model.ckpt"), strict=True)
    (sample,) = raw_samples(adapter, 1)
    with torch.no_grad():
        ours = task.loss(task.model, collated(adapter, [sample])).predictions
        expected = theirs(upstream_batch([sample]))
    for name, value in {**expected.surf_vars, **expected.atmos_vars}.items():
        spread = value.std().item()
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4 * spread)

    odd = make(make_adapter, "AuroraAirPollution", arguments={"simulate_indexing_bug": False})
    with pytest.raises(ConfigError, match=r"must read the weights back as they are; got others in"):
        odd.save(build(odd), tmp_path / "odd.ckpt")
    few = make(make_adapter, "AuroraAirPollution", arguments={"level_condition": [500, 850]})
    with pytest.raises(ConfigError, match=r"must read the weights back.*level_condition as the"):
        few.save(build(few), tmp_path / "few.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", "model.ckpt.json"}


def test_waves(make_adapter: Any, build: Any) -> None:
    adapter = make(make_adapter, "AuroraWave")
    task = build(adapter)
    (raw,) = raw_samples(adapter, 1)
    sample = adapter.transform(raw, "train")
    surf = sample["surf"]
    assert "dwi" not in surf
    calm = raw["surf"]["swh"] < 1e-4
    assert (np.isnan(surf["swh"]) == calm).all()
    assert (np.isnan(surf["mwd"]) == calm).all()
    angle = np.deg2rad(raw["surf"]["dwi"])
    np.testing.assert_allclose(surf["10u_wave"], -raw["surf"]["wind"] * np.sin(angle), rtol=1e-5)
    # Files' own arrays stay as they are.
    assert not np.isnan(raw["surf"]["swh"]).any()

    with torch.no_grad():
        loss = task.loss(task.model, collated(adapter, [raw]))
    assert {"swh", "swh_density", "mwd_sin", "mwd_cos", "mwd_density", "2t"} <= set(loss.parts)
    assert "mwd" not in loss.parts
    # By hand, from upstream's own decoder.
    kept = {}
    model = upstream_model_like(adapter, task)
    model.decoder.register_forward_hook(lambda _, __, pred: kept.update(pred.surf_vars))
    with torch.no_grad():
        model(upstream_batch([raw]))
    target = sample["target_surf"]
    direction = np.deg2rad(target["mwd"][0].astype(np.float64))
    error = np.abs(kept["mwd_sin"][0].numpy() - np.sin(direction))
    assert loss.parts["mwd_sin"].item() == pytest.approx(np.nanmean(error), rel=1e-4)
    height = (target["swh"][0] - normalisation.locations["swh"]) / normalisation.scales["swh"]
    error = np.abs(kept["swh"][0].numpy() - height)
    assert loss.parts["swh"].item() == pytest.approx(np.nanmean(error), rel=1e-4)
    sea = raw["static"]["wmb"] > 0
    density = torch.sigmoid(kept["swh_density"][0]).numpy()
    error = np.abs(density - ~np.isnan(target["swh"][0]))[sea]
    assert loss.parts["swh_density"].item() == pytest.approx(error.mean(), rel=1e-4)

    raw["surf"]["mwp"][:] = 0
    with pytest.raises(DataError, match="waves: heights and periods must be 1e-4 or more, or NaN"):
        adapter.transform(raw, "train")
    weighted = make(make_adapter, "AuroraWave", loss={"weights": {"mwd": 2.0, "mwd_cos": 0.0}})
    coefficients = build(weighted).loss._coefficients
    assert coefficients["mwd_sin"] == 2 * coefficients["mwp"]
    assert coefficients["mwd_cos"] == 0


def upstream_model_like(adapter: Any, task: Any) -> aurora.Aurora:
    model = upstream_model(_record(adapter.options, adapter.variables))
    model.load_state_dict(task.model.state_dict(), strict=True)
    return model


RUN = """\
[run]
folder = "run"
steps = 4
device = "cpu"
[model]
adapter = "aurora"
[model.options]
model_class = "AuroraWave"
levels = [500, 850]
arguments = {{ {arguments} }}
[data]
batch_size = 2
train = [{{ path = "waves.nc" }}]
[optim]
lr = 1e-2
[log]
every_steps = 1
tensorboard = false
"""


@pytest.mark.usefixtures("project")
def test_training_on_wave_files(make_adapter: Any, fastft: Any) -> None:
    adapter = make(make_adapter, "AuroraWave", rollout_steps=6)
    (raw,) = raw_samples(adapter, 1)
    axes = ("time", "level", "latitude", "longitude")
    fields: dict[str, Any] = {n: (axes[2:], v) for n, v in raw["static"].items() if n != "z"}
    fields["orography"] = (axes[2:], raw["static"]["z"])
    for kind in ("surf", "atmos"):
        for name, past in raw[kind].items():
            values = np.concatenate([past, raw[f"target_{kind}"][name]])
            fields[name] = (axes if kind == "atmos" else (axes[0], *axes[2:]), values)
    coordinates = {
        "time": np.datetime64("2020-01-01", "ns") + np.arange(8) * np.timedelta64(6, "h"),
        "level": raw["levels"],
        "latitude": raw["lat"],
        "longitude": raw["lon"],
    }
    xr.Dataset(fields, coordinates).to_netcdf("waves.nc")
    arguments = ", ".join(f"{k} = {v}" for k, v in adapter.options.arguments.items())
    run = RUN.format(arguments=arguments).replace(
        '"waves.nc" }', '"waves.nc", options = { rename = { "static.z" = "orography" } } }'
    )
    Path("wave.toml").write_text(run)
    outcome = fastft("train", "wave.toml")
    assert (outcome.errors, outcome.code) == ("", 0)
    # No waves in places, and angles of any mean: no data check minds.
    assert "missing-values" not in outcome.output
    assert "mwd" not in outcome.output
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    assert records[0]["train/swh_density"] > 0
    files = '{ path = "waves.nc", options = { rename = { "static.z" = "orography" } } }'
    outcome = fastft("evaluate", "wave.toml", f"data.validation=[{files}]")
    assert (outcome.errors, outcome.code) == ("", 0)
    maps = {path.name for path in Path("run/evaluation-validation/maps").iterdir()}
    assert {"mwd-6h.png", "swh-6h.png", "t_500-6h.png"} <= maps


def test_what_aurora_1_5_computes_and_predicts_only(make_adapter: Any, build: Any) -> None:
    adapter = make(make_adapter, "AuroraV1p5")
    task = build(adapter)
    assert task.model.autocast_backbone is False
    (raw,) = raw_samples(adapter, 1)
    sample = adapter.transform(raw, "train")
    assert "blh" not in sample["surf"]
    assert "blh" in sample["target_surf"]
    assert sample["target_surf"]["insolation"].shape == (1, *GRID)
    with torch.no_grad():
        loss = task.loss(task.model, collated(adapter, [raw]))
    assert "insolation" not in loss.parts
    known = collated(adapter, [raw])["insolation"]
    assert torch.equal(loss.predictions["insolation"], known)
    # Precipitation by its logarithm, as the model is trained on it.
    logarithm = lambda x: torch.log(x + 1e-3)  # noqa: E731
    target = torch.tensor(raw["target_surf"]["scaled_tp_1h"])
    difference = logarithm(loss.predictions["scaled_tp_1h"][:, 0]) - logarithm(target)
    error = difference.abs().mean() / normalisation.scales["scaled_tp_1h"]
    torch.testing.assert_close(loss.parts["scaled_tp_1h"], error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_class": "AuroraV1p5Ensemble"}, "whose loss, over several members, this adapter"),
        (
            {"model_class": "AuroraWave", "surf_vars": ["2t", "swh"]},
            "must hold all waves of AuroraWave; got none named mdts, mdww, ",
        ),
        (
            {
                "model_class": "AuroraAirPollution",
                "atmos_vars": ["t", "q"],
                "arguments": {"use_lora": True},
            },
            "must hold so2 with use_lora = true, since AuroraAirPollution bounds it; got none",
        ),
    ],
)
def test_refused(settings: dict[str, Any], message: str, make_adapter: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        make_adapter(**settings)


def test_new_variables(make_adapter: Any, build: Any) -> None:
    new = {"location": 0.5, "scale": 2.0}
    adapter = make(make_adapter, "AuroraWave", surf_vars={"sst": new}, masked=["sst"])
    assert {"encoder.surf_token_embeds.weights.sst", "decoder.surf_heads.sst.weight"} <= set(
        build(adapter).heads
    )
    adapter = make(make_adapter, "AuroraAirPollution", static_vars={"roads": new})
    assert "encoder.atmos_token_embeds.layers.500.weights.static_roads" in build(adapter).heads


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLASSES)
def test_a_gpu_is_not_waited_for(name: str, make_adapter: Any) -> None:
    adapter = make(make_adapter, name, rollout_steps=2)
    device = torch.device("cuda")
    task = adapter.build(None, device=device, checkpoint=None, pretrained=False)
    batch = collated(adapter, raw_samples(adapter)).to(device)
    # Masks of shifted windows are made, and kept, at the first call.
    task.loss(task.model, batch).total.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        task.loss(task.model, batch).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
