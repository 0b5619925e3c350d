"""Which variables a run has, their statistics, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aurora import normalisation

from fastft.config import DataConfig, DataSource, NewHead
from fastft.errors import ConfigError
from fastft.task import Batch

NEW = {"location": 0.5, "scale": 2.0}


def predict(task: Any, adapter: Any, samples: Any) -> dict[str, torch.Tensor]:
    task.model.eval()
    with torch.no_grad():
        return task.loss(task.model, Batch(adapter.collate(samples), len(samples))).predictions


def test_defaults_lists_and_tables(make_adapter: Any) -> None:
    plain = make_adapter().variables
    assert plain.surf == ("2t", "10u", "10v", "msl")
    assert plain.static == ("lsm", "z", "slt")
    assert plain.atmos == ("z", "u", "v", "t", "q")
    assert not any(plain.new.values())

    # '2d' is no default, but aurora knows its statistics.
    chosen = make_adapter(surf_vars=["2t", "2d"], atmos_vars=["t"]).variables
    assert (chosen.surf, chosen.atmos) == (("2t", "2d"), ("t",))
    assert chosen.new["surf_vars"] == {"2d"}
    assert chosen.statistics["2d"].location == normalisation.locations["2d"]

    added = make_adapter(
        surf_vars={"tp": NEW, "2t": {"location": 280.0, "scale": 20.0}, "2d": {}},
        static_vars={"slope": NEW},
        atmos_vars={"cc": NEW, "o3": {"500": NEW, "850": {"location": 1.0, "scale": 3.0}}},
    ).variables
    assert added.surf == ("2t", "10u", "10v", "msl", "tp", "2d")
    assert added.static[-1] == "slope"
    assert added.atmos[-2:] == ("cc", "o3")
    assert set(added.given) == {"tp", "2t", "slope"}
    assert added.statistics["2t"] == (280.0, 20.0)
    assert added.levels["cc"] == {"500": (0.5, 2.0), "850": (0.5, 2.0)}
    assert added.levels["o3"]["850"] == (1.0, 3.0)


def test_statistics_by_level_reach_the_model(
    make_adapter: Any, build: Any, make_samples: Any
) -> None:
    levels = {"500": {"location": 100.0, "scale": 10.0}, "850": {"location": -5.0, "scale": 0.5}}
    adapter = make_adapter(atmos_vars={"o3": levels}, surf_vars={"tp": NEW})
    task = build(adapter)
    for parameter in task.model.parameters():
        parameter.data.zero_()
    predictions = predict(task, adapter, make_samples(adapter, 1))
    # A model of zeros predicts the locations.
    assert predictions["o3"][0, 0, :, 0, 0].tolist() == [100.0, -5.0]
    assert predictions["tp"].unique().tolist() == [0.5]
    assert normalisation.scales["o3_850"] == 0.5
    # Surface statistics are the model's own.
    assert "tp" not in normalisation.locations
    build(make_adapter(atmos_vars={"o3": levels}))


def test_new_variables_leave_the_others_as_they_were(
    make_adapter: Any, build: Any, make_samples: Any
) -> None:
    old = make_adapter()
    task = build(old)
    before = predict(task, old, make_samples(old))
    new = {
        "surf_vars": {"tp": NEW},
        "static_vars": {"slope": NEW},
        "atmos_vars": {"cc": NEW},
    }
    for embeddings, unchanged in (("zero", True), ("random", False)):
        adapter = make_adapter(new_embeddings=embeddings, **new)
        extended = build(adapter)
        names = extended.model.load_state_dict(task.model.state_dict(), strict=False)
        assert set(names.missing_keys) == set(extended.heads)
        assert sorted(extended.heads) == [
            "decoder.atmos_heads.cc.bias",
            "decoder.atmos_heads.cc.weight",
            "decoder.surf_heads.tp.bias",
            "decoder.surf_heads.tp.weight",
            "encoder.atmos_token_embeds.weights.cc",
            "encoder.surf_token_embeds.weights.slope",
            "encoder.surf_token_embeds.weights.tp",
        ]
        samples = make_samples(adapter)
        for sample, original in zip(samples, make_samples(old), strict=True):
            for kind in ("surf", "static", "atmos", "target_surf", "target_atmos"):
                sample[kind].update(original[kind])
        after = predict(extended, adapter, samples)
        assert set(after) == {*before, "tp", "cc"}
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) if unchanged else not any(same)
        # It can be learnt from zero.
        loss = extended.loss(extended.model, Batch(adapter.collate(samples), 2))
        loss.total.backward()
        for name in extended.heads:
            assert extended.model.get_parameter(name).grad.norm() > 0, name


def test_what_says_how_new_embeddings_start(make_adapter: Any, build: Any) -> None:
    variables = {"surf_vars": {"tp": NEW, "2d": {}}}
    tp, dew = (f"encoder.surf_token_embeds.weights.{name}" for name in ("tp", "2d"))

    def notes(embeddings: str, **starts: Any) -> list[str]:
        adapter = make_adapter(new_embeddings=embeddings, **variables)
        names = {"tp": tp, "dew": dew, "all": "encoder.surf_token_embeds"}
        heads = {names[name]: NewHead(init=init) for name, init in starts.items()}
        adapter.expect(DataConfig(train=(DataSource(path=Path("era5.nc")),)), heads)
        return list(build(adapter).notes)

    for embeddings, start in (("zero", "zero"), ("zero", "inherit"), ("random", "random")):
        assert notes(embeddings, tp=start, dew=start) == []
    assert notes("random", all="zero", tp="random", dew="zero") == [
        f"{dew}: as finetune.new_heads says, over model.options.new_embeddings = 'random'"
    ]
    assert notes("zero", all="random") == [
        f"{dew} and 1 more: at zero, by model.options.new_embeddings, where finetune.new_heads has"
        " init = 'random'; for that, set new_embeddings = 'random'"
    ]


def test_conflicting_statistics(make_adapter: Any, build: Any) -> None:
    build(make_adapter(atmos_vars={"o3": NEW}))
    known = {"500": {"location": 0.0, "scale": 1.0}}
    other = {"850": {"location": 0.5, "scale": 3.0}, "500": NEW}
    before = dict(normalisation.locations)
    with pytest.raises(ConfigError) as error:
        build(make_adapter(atmos_vars={"t": known, "o3": other, "co2": NEW}))
    start = "must be aurora's, since all models in a process share them:"
    end = "leave them out, or give the variable another name"
    assert error.value.problems == (
        f"model.options.atmos_vars.t: statistics at 500 hPa {start} location 252.949, scale"
        f" 13.0645; got location 0, scale 1; {end}",
        f"model.options.atmos_vars.o3: statistics at 850 hPa {start} location 0.5, scale 2; got"
        f" location 0.5, scale 3; {end}",
    )
    assert normalisation.locations == before

    # What one run told aurora is no default of another.
    with pytest.raises(ConfigError, match="'o3' must have statistics, and aurora knows none"):
        make_adapter(atmos_vars=["o3"])


def test_everything_wrong_at_once(make_adapter: Any) -> None:
    with pytest.raises(ConfigError) as error:
        make_adapter(
            surf_vars=["2t", "2tt", "a.b", "time", "t"],
            static_vars={"slope": {"location": 0.0}, "z": {"location": 0.0, "scale": 0.0}},
            atmos_vars={"o3": {"500": NEW}, "cc": {}, "q": {"501": NEW}, "u": 3},
        )
    table = "must be { location = number, scale = number above 0 }; got"
    reserved = "surf, atmos, static, lat, lon, time, levels"
    assert error.value.problems == (
        f"model.options.surf_vars: names must be text without dots, and none of {reserved}; got"
        " 'a.b'; rename it",
        f"model.options.surf_vars: names must be text without dots, and none of {reserved}; got"
        " 'time'; rename it",
        f"model.options.static_vars.slope: {table} {{'location': 0.0}}; correct it",
        f"model.options.static_vars.z: {table} {{'location': 0.0, 'scale': 0.0}}; correct it",
        "model.options.surf_vars: '2tt' must have statistics, and aurora knows none; got a name"
        " alone; did you mean '2t'?; else give location and scale: surf_vars.2tt = { location ="
        " 0.0, scale = 1.0 }; with surf_vars.2tt = {}, `fastft stats` prints those of the data",
        "model.options.surf_vars: 't' must have statistics, and aurora knows none; got a name"
        " alone; did you mean '2t'?; else give location and scale: surf_vars.t = { location = 0.0,"
        " scale = 1.0 }; with surf_vars.t = {}, `fastft stats` prints those of the data",
        f"model.options.atmos_vars.u: {table} 3; correct it",
        "model.options.atmos_vars.q.501: must be a level of model.options.levels, or 'location'"
        " and 'scale'; got '501'; choose from 500, 850",
        "model.options.atmos_vars.o3: must have statistics at every level of"
        ' model.options.levels; got none at 850 hPa; add "850" = { location = 0.0, scale = 1.0 },'
        " or drop the level",
        "model.options.atmos_vars: 'cc' must have statistics, and aurora knows none; got a name"
        " alone; choose from 'co', 'go3', 'no', 'no2', 'q', 'so2', 't', 'u', 'v', 'w', ...; else"
        " give location and scale: atmos_vars.cc = { location = 0.0, scale = 1.0 }; with"
        " atmos_vars.cc = {}, `fastft stats` prints those of the data",
        "model.options.surf_vars: 't' must be of one kind; got it in another too; rename one",
    )


RUN = """\
[run]
folder = "run"
steps = 1
device = "cpu"
[model]
adapter = "aurora"
[model.options]
{options}
[data]
train = [{{ path = "era5.nc" }}]
[optim]
lr = 1e-3
"""


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            'model_class = "AuroraV1p5Ensemble"',
            "model.options.model_class: must be one of Aurora, AuroraPretrained,"
            " AuroraSmallPretrained, AuroraSmall, Aurora12hPretrained, AuroraHighRes,"
            " AuroraAirPollution, AuroraWave, AuroraV1p5; got 'AuroraV1p5Ensemble', whose loss,"
            " over several members, this adapter does not have; choose another class",
        ),
        (
            'model_class = "AuroraSmol"',
            "model.options.model_class: must be a class of the package aurora; got 'AuroraSmol';"
            " did you mean 'AuroraSmall'?",
        ),
        (
            "arguments = { autocast = true, embed_dims = 8 }",
            "model.options.arguments.autocast: must be left out; got a value; set step.precision"
            " and model.options.autocast\n"
            "fastft: model.options.arguments.embed_dims: must be an argument of AuroraPretrained;"
            " it is none; did you mean 'embed_dim'?",
        ),
        (
            'surf_vars = { tp = { location = 0.0, scale = 1.0, units = "m" } }',
            "model.options.surf_vars.tp: must be { location = number, scale = number above 0 };"
            " got {'location': 0.0, 'scale': 1.0, 'units': 'm'}; correct it",
        ),
        (
            "surf_vars = []",
            "model.options.surf_vars: must name at least one variable; got none; add one",
        ),
        (
            "levels = [500, 850, 500]",
            "model.options.levels: must hold each level once; got [500, 850, 500]; drop one",
        ),
        (
            "levels = []",
            "model.options.levels: must hold at least one entry; got none; add one",
        ),
        (
            "arguments = { latent_levels = 1 }",
            "model.options: AuroraPretrained must take these arguments; got AssertionError:"
            " At least two latent levels are required.; correct model.options.arguments",
        ),
    ],
)
def test_exit_code(options: str, message: str, fastft: Callable[..., Any]) -> None:
    Path("run.toml").write_text(RUN.format(options=options))
    outcome = fastft("train", "run.toml")
    assert outcome.code == 2
    assert outcome.errors.startswith(f"fastft: {message}"), json.dumps(outcome.errors)
