"""Checkpoints that upstream wrote, old and new, and those that it is to read."""

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aurora
import pytest
import torch
from aurora import normalisation
from upstream_aurora import upstream_batch, upstream_model

from fastft.adapters.aurora import checkpoint
from fastft.checkpoint import Weights, load_weights
from fastft.config import ModelConfig, NewHead
from fastft.errors import AdapterError, CheckpointError, ConfigError
from fastft.task import Batch

NEW = {"location": 0.5, "scale": 2.0}
CPU = torch.device("cpu")


def predict(task: Any, adapter: Any, samples: Any) -> dict[str, torch.Tensor]:
    task.model.eval()
    with torch.no_grad():
        return task.loss(task.model, Batch(adapter.collate(samples), len(samples))).predictions


def numbered(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as the first checkpoints had it: variables by number, below 'net.'."""
    state = dict(state)
    surf, static, atmos = (
        ("2t", "10u", "10v", "msl"),
        ("lsm", "z", "slt"),
        ("z", "u", "v", "t", "q"),
    )
    for kind, names, heads in (("surf", surf + static, surf), ("atmos", atmos, atmos)):
        embeds = [state.pop(f"encoder.{kind}_token_embeds.weights.{name}") for name in names]
        state[f"encoder.{kind}_token_embeds.weight"] = torch.cat(embeds, 1)
        for part in ("weight", "bias"):
            each = [state.pop(f"decoder.{kind}_heads.{name}.{part}") for name in heads]
            state[f"decoder.{kind}_head.{part}"] = torch.stack(each, 1).flatten(0, 1)
    return {f"net.{name}": tensor for name, tensor in state.items()}


def test_upstream_reads_what_is_saved(
    tmp_path: Path, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    adapter = make_adapter(
        surf_vars={"tp": NEW, "2t": {"location": 280.0, "scale": 20.0}},
        static_vars={"slope": NEW},
        atmos_vars={"o3": {"500": NEW, "850": {"location": 1.0, "scale": 3.0}}},
        stabilise_level_agg=True,
        timestep_hours=3.0,
        arguments={"use_lora": True},
    )
    task = build(adapter)
    samples = make_samples(adapter)
    ours = predict(task, adapter, samples)
    # The core writes to such a name first, then renames.
    adapter.save(task, tmp_path / ".tmp-model.ckpt")
    (tmp_path / ".tmp-model.ckpt").rename(tmp_path / "model.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", "model.ckpt.json"}

    # Upstream alone, from the two files.
    record = json.loads((tmp_path / "model.ckpt.json").read_text())
    for variable, levels in record["level_statistics"].items():
        for level, statistics in levels.items():
            normalisation.locations[f"{variable}_{level}"] = statistics["location"]
            normalisation.scales[f"{variable}_{level}"] = statistics["scale"]
    model = upstream_model(record)
    model.load_checkpoint_local(str(tmp_path / "model.ckpt"), strict=True)
    task.model.eval()
    model.eval()
    with torch.no_grad():
        state = upstream_batch(samples)
        theirs = next(aurora.rollout(model, state, 1))
    for name, value in {**theirs.surf_vars, **theirs.atmos_vars}.items():
        assert torch.equal(value, ours[name]), name

    rows = dict(adapter.describe(tmp_path / "model.ckpt").rows)
    assert rows["surface variables"] == "10u, 10v, 2t, msl, tp"
    assert rows["static variables"] == "lsm, slope, slt, z"
    assert rows["atmospheric variables"] == "o3, q, t, u, v, z"
    assert rows["levels (hPa)"] == "500, 850"
    assert rows["embedding"] == "16 wide, patches of 4"
    assert (rows["encoder blocks"], rows["decoder blocks"]) == ("2, 1", "1, 2")
    assert rows["LoRA"] == "yes"
    assert adapter.describe(tmp_path / "model.ckpt.json") is None


def test_what_upstream_could_not_read(tmp_path: Path, make_adapter: Any, build: Any) -> None:
    adapter = make_adapter()
    with pytest.raises(ConfigError, match=r"--to: must end in .ckpt, .pt, .pth, .*'.safetensors'"):
        adapter.save(build(adapter), tmp_path / "model.safetensors")
    adapter = make_adapter(surf_vars=["msl"])
    with pytest.raises(ConfigError, match=r"must hold '2t' for an export, .*; got msl; take it in"):
        adapter.save(build(adapter), tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())


def test_first_checkpoints_and_shorter_histories(
    tmp_path: Path, make_adapter: Any, build: Any
) -> None:
    adapter = make_adapter()
    state = build(adapter).model.state_dict()
    torch.save(numbered(state), tmp_path / "old.ckpt")
    tensors = adapter.weights(tmp_path / "old.ckpt")
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)

    longer = make_adapter(arguments={"max_history_size": 3})
    tensors = longer.weights(tmp_path / "old.ckpt")
    model = longer.build(None, device=CPU, checkpoint=None, pretrained=False).model
    model.load_checkpoint_local(str(tmp_path / "old.ckpt"), strict=True)
    upstream = model.state_dict()
    assert set(tensors) == set(upstream)
    assert all(torch.equal(tensors[name], upstream[name]) for name in upstream)

    odd = numbered(state)
    name = "net.encoder.surf_token_embeds.weight"
    odd[name] = odd[name][:, :6]
    torch.save(odd, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt: must be a checkpoint that AuroraPre"):
        adapter.weights(tmp_path / "odd.ckpt")


def test_levels_of_their_own_start_alike(
    tmp_path: Path, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    plain = make_adapter()
    task, samples = build(plain), make_samples(plain)
    plain.save(task, tmp_path / "plain.ckpt")
    adapter = make_adapter(arguments={"level_condition": [500, 850, 1000]})
    model = build(adapter)
    model.model.load_state_dict(dict(adapter.weights(tmp_path / "plain.ckpt")), strict=True)
    ours, theirs = predict(model, adapter, samples), predict(task, plain, samples)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4 * value.std().item())

    # From weather to air pollution: all but what is new, and patches of another size.
    pollution = make_adapter(model_class="AuroraAirPollution", arguments={"use_lora": False})
    other = build(pollution)
    tensors = dict(pollution.weights(tmp_path / "plain.ckpt"))
    report = load_weights(
        other.model,
        Weights(tmp_path / "plain.ckpt", "torch", tensors),
        ModelConfig(adapter="aurora", strict=False, min_coverage=0.1),
        {},
    )
    assert report.unexpected == ()
    assert all(".surf_" in n or ".atmos_" in n for n in report.mismatched)
    assert not [name for name in report.missing if name.startswith("backbone.")]


def test_other_files_are_the_cores(tmp_path: Path, make_adapter: Any) -> None:
    adapter = make_adapter()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "nested.ckpt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "absent.ckpt"):
        assert adapter.weights(path) is None
        assert adapter.describe(path) is None


def test_the_core_reports_what_is_new(tmp_path: Path, make_adapter: Any, build: Any) -> None:
    old = build(make_adapter()).model.state_dict()
    torch.save(numbered(old) | {"net.left.over": torch.zeros(3)}, tmp_path / "old.ckpt")
    adapter = make_adapter(surf_vars={"tp": NEW}, stabilise_level_agg=True)
    task = adapter.build(None, device=CPU, checkpoint=None, pretrained=False)
    tensors = dict(adapter.weights(tmp_path / "old.ckpt"))
    config = ModelConfig(adapter="aurora", strict=False)
    heads = {
        "encoder.surf_token_embeds.weights.tp": NewHead(),
        "decoder.surf_heads.tp": NewHead(init="zero"),
    }
    weights = Weights(tmp_path / "old.ckpt", "torch", tensors)
    report = load_weights(task.model, weights, config, MappingProxyType(heads))
    assert set(report.new) == set(task.heads)
    assert report.unexpected == ("left.over",)
    assert {name.rpartition(".")[0] for name in report.missing} == {
        "encoder.level_agg.layers.0.0.ln_k",
        "encoder.level_agg.layers.0.0.ln_q",
    }
    assert task.model.get_parameter("encoder.surf_token_embeds.weights.tp").norm() == 0
    with pytest.raises(CheckpointError, match=r"1 unexpected in the checkpoint: left\.over"):
        load_weights(task.model, weights, ModelConfig(adapter="aurora"), heads)


def test_hub(
    tmp_path: Path, make_adapter: Any, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = build(make_adapter()).model.state_dict()
    torch.save(numbered(state), tmp_path / "hub.ckpt")
    asked: list[Any] = []

    def download(*names: str, revision: str) -> str:
        asked.append((*names, revision))
        return str(tmp_path / "hub.ckpt")

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    new: dict[str, Any] = {"surf_vars": {"tp": NEW}, "atmos_vars": ["t", "q"], "hub": True}

    def start(**options: Any) -> Any:
        pretrained = options.pop("pretrained", True)
        adapter = make_adapter(**{**new, **options})
        return adapter.build(None, device=CPU, checkpoint=None, pretrained=pretrained).model

    other = make_adapter(**new).build(None, device=CPU, checkpoint=Path(), pretrained=False)
    assert other.notes[0].startswith("model.options.hub is not used: with model.strict, model.")
    model = start(stabilise_level_agg=True)
    assert [names[:2] for names in asked] == [("microsoft/aurora", "aurora-0.25-pretrained.ckpt")]
    ours = model.state_dict()
    assert all(torch.equal(ours[name], state[name]) for name in ours if name in state)
    assert ours["encoder.surf_token_embeds.weights.tp"].norm() == 0
    start(pretrained=False)
    start(hub=False)
    assert len(asked) == 1

    with pytest.raises(AdapterError, match=r"must fit AuroraPretrained .* missing, first backbone"):
        start(arguments={"encoder_depths": [3, 1], "decoder_depths": [1, 3]})
    adapted = start(arguments={"use_lora": True}).state_dict()
    assert all(torch.equal(adapted[name], ours[name]) for name in ours if name in state)
    with pytest.raises(AdapterError, match=r"of another shape"):
        start(arguments={"embed_dim": 32})

    def refuse(*names: str, revision: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(checkpoint, "hf_hub_download", refuse)
    with pytest.raises(AdapterError, match=r"must be fetched; got OSError: no network; connect"):
        start()


RUN = """\
[run]
folder = "run"
steps = 1
device = "cpu"
[model]
adapter = "aurora"
checkpoint = "small.ckpt"
[model.options]
levels = [500, 850]
arguments = {{ {arguments} }}
[data]
train = [{{ path = "era5.nc" }}]
[optim]
lr = 1e-3
"""


@pytest.mark.usefixtures("project")
def test_a_checkpoint_of_another_class(
    make_adapter: Any, build: Any, fastft: Callable[..., Any]
) -> None:
    adapter = make_adapter(arguments={"embed_dim": 32})
    adapter.save(build(adapter), Path("small.ckpt"))
    tiny = make_adapter().options.arguments
    arguments = ", ".join(f"{name} = {value}" for name, value in tiny.items())
    Path("run.toml").write_text(RUN.format(arguments=arguments))
    outcome = fastft("train", "run.toml")
    assert outcome.code == 2
    assert "small.ckpt: every tensor of model and checkpoint must match" in outcome.errors
    assert "mismatched: " in outcome.errors
