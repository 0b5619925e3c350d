"""Loading into a model: names, new heads, strictness, and the report."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fastft.checkpoint import LoadReport, Weights, load_weights
from fastft.config import ModelConfig, NewHead
from fastft.errors import CheckpointError, ConfigError

STRICT = ModelConfig(adapter="python")


def loose(min_coverage: float = 0.5) -> ModelConfig:
    return ModelConfig(adapter="python", strict=False, min_coverage=min_coverage)


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def pretrained() -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = Net()
    return state_of(model) | {"norm.num_batches_tracked": torch.tensor(7)}


def load(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: ModelConfig = STRICT,
    heads: Mapping[str, NewHead] | None = None,
) -> LoadReport:
    weights = Weights(Path("weights.pt"), "torch", dict(tensors))
    return load_weights(model, weights, config, heads or {})


def shown(report: LoadReport) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(report.table())
    return console.export_text()


def equals(model: nn.Module, state: Mapping[str, Tensor], *, under: str = "") -> bool:
    ours = model.state_dict()
    return all(torch.equal(ours[n], state[n]) for n in ours if n.startswith(under))


def test_all_tensors_and_buffers_load():
    model, state = Net(), pretrained()
    report = load(model, state)
    assert equals(model, state)
    assert set(report.loaded) == state.keys()
    assert report.coverage == 1
    assert report.missing == report.unexpected == report.mismatched == ()
    assert not report.casts


@pytest.mark.parametrize(
    ("written", "prefix"),
    [
        ("module.", "module."),
        ("_orig_mod.", ""),
        ("module._orig_mod.model.", "module.model."),
        ("model.net.", "model.net."),
        ("backbone.", "backbone."),
    ],
)
def test_prefixes_are_taken_off(written: str, prefix: str):
    model, state = Net(), pretrained()
    report = load(model, {written + name: tensor for name, tensor in state.items()})
    assert report.prefix == prefix
    assert equals(model, state)
    assert f"'{prefix}' taken off" in shown(report) or not prefix


def test_wrappers_inside_names_of_either_side():
    model, state = Net(), pretrained()
    compiled = Net()
    compiled.stem = nn.ModuleDict({"_orig_mod": compiled.stem})  # type: ignore[assignment]
    load(compiled, state)
    assert torch.equal(compiled.state_dict()["stem._orig_mod.weight"], state["stem.weight"])
    load(model, compiled.state_dict())
    assert equals(model, state)


def test_a_model_that_really_begins_with_model_keeps_its_prefix():
    model = nn.ModuleDict({"model": Net()})
    state = {f"module.model.{name}": tensor for name, tensor in pretrained().items()}
    assert load(model, state).prefix == "module."


def test_a_bare_model_inside_a_larger_one():
    model, state = nn.ModuleDict({"encoder": Net(), "decoder": nn.Linear(3, 3)}), pretrained()
    report = load(model, state, heads={"decoder": NewHead()})
    assert report.added == "encoder."
    assert equals(model["encoder"], state)


def test_other_tensors_beside_the_prefixed_ones_are_unexpected():
    state = {f"model.{name}": tensor for name, tensor in pretrained().items()}
    report = load(
        Net(), {**state, "loss.scale": torch.ones(2), "stem.bias": torch.ones(8)}, loose()
    )
    assert report.unexpected == ("loss.scale", "stem.bias")
    assert report.coverage == 1


def test_strict_names_every_kind_with_shapes_and_changes_nothing():
    model, state = Net(), pretrained()
    before = state_of(model)
    del state["stem.bias"]
    state["old.weight"] = torch.ones(2, 2)
    state["head.2.weight"] = torch.ones(1000, 8)
    with pytest.raises(CheckpointError) as caught:
        load(model, state)
    message = str(caught.value)
    assert "1 missing in the checkpoint: stem.bias [8]" in message
    assert "1 unexpected in the checkpoint: old.weight [2, 2]" in message
    assert "1 mismatched: head.2.weight [3, 8], in the checkpoint [1000, 8]" in message
    assert "finetune.new_heads (head.2?)" in message
    assert "model.strict = false" in message
    assert equals(model, before)


def test_what_only_the_model_has_may_be_new():
    model, state = Net(), pretrained()
    del state["head.0.weight"], state["head.0.bias"]
    del state["head.2.weight"], state["head.2.bias"]
    new = re.escape("name what is new in finetune.new_heads (head.0, head.2?)")
    with pytest.raises(CheckpointError, match=new):
        load(model, state)
    # The checkpoint has the module, or calls it by another name.
    for other in ({"head.2.weight": torch.ones(3, 8)}, {"top.weight": torch.ones(3, 8)}):
        with pytest.raises(CheckpointError) as caught:
            load(model, state | other)
        assert "new_heads" not in str(caught.value)


def test_not_strict_loads_what_fits_and_reports_the_rest():
    model, state = Net(), pretrained()
    before = state_of(model)
    state["old.weight"] = torch.ones(2, 2)
    state["head.2.weight"] = torch.ones(1000, 8)
    del state["head.2.bias"]
    report = load(model, state, loose())
    assert report.missing == ("head.2.bias",)
    assert report.unexpected == ("old.weight",)
    assert report.mismatched == ("head.2.weight",)
    total = sum(tensor.numel() for tensor in before.values())
    assert report.coverage == pytest.approx(1 - (3 * 8 + 3) / total)
    assert torch.equal(model.stem.weight, state["stem.weight"])
    assert equals(model, before, under="head.2")
    text = shown(report)
    assert "[3, 8], in the checkpoint [1000, 8]" in text
    assert "old.weight [2, 2]" in text


def test_too_little_coverage_names_the_look_alikes_and_changes_nothing():
    model = Net()
    before = state_of(model)
    state = {f"student.{name}": tensor for name, tensor in pretrained().items()}
    with pytest.raises(CheckpointError) as caught:
        load(model, state, loose(min_coverage=0.25))
    message = str(caught.value)
    assert "at least 25%" in message
    assert "got 0.0%" in message
    assert "'student.stem.weight' for 'stem.weight'" in message
    assert equals(model, before)
    assert load(model, state, loose(min_coverage=0)).loaded == ()


def test_floating_types_are_cast_and_counted_but_integers_are_not_floats():
    model, state = Net(), pretrained()
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}
    report = load(model, halves)
    assert report.casts == {"bfloat16 -> float32": len(state) - 1}
    assert model.stem.weight.dtype == torch.float32
    assert torch.equal(model.stem.weight, halves["stem.weight"].float())
    with pytest.raises(CheckpointError, match=r"stem\.weight float32, in the checkpoint int8"):
        load(model, {**state, "stem.weight": torch.ones(8, 4, dtype=torch.int8)})


def test_batch_counters_may_be_absent_or_vectors():
    model, state = Net(), pretrained()
    load(model, {**state, "norm.num_batches_tracked": torch.tensor([7])})
    assert model.norm.num_batches_tracked == 7
    del state["norm.num_batches_tracked"]
    report = load(model, state)
    assert report.missing == ("norm.num_batches_tracked",)


def test_tied_weights():
    model, values = Tied(), torch.randn(5, 4)
    report = load(model, {"embed.weight": values})
    assert report.loaded == ("embed.weight", "head.weight")
    assert report.coverage == 1
    assert torch.equal(model.head.weight, values)
    assert model.head.weight is model.embed.weight
    with pytest.raises(CheckpointError, match=r"tied to embed\.weight"):
        load(model, {"embed.weight": values, "head.weight": values + 1})


def test_random_head_keeps_its_initialisation_whatever_the_checkpoint_has():
    model, state = Net(classes=5), pretrained()
    before = state_of(model)
    report = load(model, state, heads={"head": NewHead()})
    assert equals(model, before, under="head")
    assert equals(model, state, under="stem")
    assert report.new == ("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")
    assert report.coverage == 1
    assert not report.unexpected


def test_zero_head_outputs_zero_and_has_gradients():
    model = Net()
    load(model, pretrained(), heads={"head": NewHead(init="zero")})
    output = model(torch.randn(6, 4))
    assert not output.any()
    (output - 1).square().sum().backward()
    last = model.get_parameter("head.2.weight").grad
    assert last is not None
    assert last.any()
    assert model.get_parameter("head.0.weight").any()


def test_zero_of_a_single_layer():
    model, state = Net(), pretrained()
    load(model, state, heads={"head.2": NewHead(init="zero")})
    assert not model.get_parameter("head.2.weight").any()
    assert torch.equal(model.get_parameter("head.0.weight"), state["head.0.weight"])


def test_inherited_head():
    model, state = Net(), pretrained()
    torch.manual_seed(2)
    donor = {f"model.other.{n}": t for n, t in Net().head.state_dict().items()}
    state = {f"model.{name}": t for name, t in state.items() if not name.startswith("head")} | donor
    for source in ("other", "model.other"):
        report = load(model, state, heads={"head": NewHead(init="inherit", source=source)})
        assert torch.equal(model.get_parameter("head.2.weight"), donor["model.other.2.weight"])
        assert not report.unexpected


def test_a_single_parameter_may_be_new():
    start, state = Net(), pretrained()
    state["token"] = torch.full((8, 4), 3.0)
    random = start.get_parameter("stem.weight").clone()
    for head, expected in (
        (NewHead(), random),
        (NewHead(init="zero"), torch.zeros(8, 4)),
        (NewHead(init="inherit", source="token"), state["token"]),
    ):
        model = Net()
        model.load_state_dict(start.state_dict())
        given = {k: v for k, v in state.items() if k != "token" or head.init == "inherit"}
        load(model, given, heads={"stem.weight": head})
        assert torch.equal(model.get_parameter("stem.weight"), expected)
        assert torch.equal(model.get_parameter("stem.bias"), state["stem.bias"])


def test_inherited_head_that_is_absent_or_has_other_shapes():
    model, state = Net(), pretrained()
    donors = {
        f"{name}.{n}": t for name in ("sst", "wind") for n, t in Net().head.state_dict().items()
    }
    state |= donors | {"wide.2.weight": torch.ones(9, 8)}
    with pytest.raises(CheckpointError, match=r"no module 'winds'; name one that fits: .*wind"):
        load(model, state, heads={"head": NewHead(init="inherit", source="winds")})
    with pytest.raises(CheckpointError, match=re.escape("[9, 8] for head.2.weight [3, 8]")):
        load(model, state, heads={"head": NewHead(init="inherit", source="wide")})


BAD_HEADS = {
    "misspelt": ({"haed": NewHead()}, r"finetune\.new_heads\.haed: .*did you mean 'head'\?"),
    "unknown": ({"zzz": NewHead()}, "choose from 'stem', 'norm', 'head'"),
    "without parameters": ({"head.1": NewHead()}, "must have parameters"),
    "no source": ({"head": NewHead(init="inherit")}, "head.source: must name a module"),
    "several": ({"haed": NewHead(), "head.1": NewHead()}, "(?s)haed.*must have parameters"),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_bad_new_heads(name: str):
    heads, message = BAD_HEADS[name]
    with pytest.raises(ConfigError, match=message):
        load(Net(), pretrained(), heads=heads)


def test_heads_that_cannot_be_new():
    model = Tied()
    with pytest.raises(ConfigError, match=r"head\.weight is embed\.weight; untie"):
        load(model, model.state_dict(), heads={"head": NewHead()})
    normed = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="reparametrised weights; use 'random'"):
        load(normed, normed.state_dict(), heads={"1": NewHead(init="zero")})


def test_added_tensors_need_not_be_in_the_checkpoint() -> None:
    tensors = pretrained()
    own = {name: tensors.pop(name) for name in ("stem.weight", "stem.bias")}
    model = Net()
    before = state_of(model)
    weights = Weights(Path("weights.pt"), "torch", tensors)
    report = load_weights(model, weights, STRICT, {}, added=["stem.weight", "stem.bias"])
    assert report.new == ("stem.weight", "stem.bias")
    assert report.missing == ()
    assert torch.equal(model.stem.weight, before["stem.weight"])
    assert report.coverage == 1.0
    # Where it has them, they are loaded as all others.
    report = load_weights(
        model, Weights(Path("weights.pt"), "torch", tensors | own), STRICT, {}, added=list(own)
    )
    assert report.new == ()
    assert torch.equal(model.stem.weight, own["stem.weight"])
    with pytest.raises(CheckpointError, match="1 missing in the checkpoint: stem"):
        load_weights(model, weights, STRICT, {}, added=["stem.weight"])
