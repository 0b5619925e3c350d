"""Added layer norms and a user's own changes: what is new, unchanged, saved and read back."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from upstream_aurora import upstream_batch, upstream_model, write_weather

from fastft.adapters.aurora import insert_layer_norms
from fastft.errors import AdapterError, ConfigError
from fastft.task import Batch

NORMS = ["backbone.encoder_layers.*.blocks.0", "encoder.surf_mlp", "backbone.*.attn"]
BLOCK = "backbone.encoder_layers.0.blocks.0"


def predict(task: Any, adapter: Any, samples: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return task.loss(task.model, Batch(adapter.collate(samples), len(samples))).predictions


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_norms_change_nothing_at_first(
    precision: torch.dtype, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    plain, adapter = make_adapter(), make_adapter(layer_norms=NORMS)
    task, old = build(adapter), build(plain)
    missing = task.model.load_state_dict(old.model.state_dict(), strict=False)
    assert set(missing.missing_keys) == set(task.added)
    assert not missing.unexpected_keys
    assert f"{BLOCK}.output_norm.gate" in task.added
    assert f"{BLOCK}.attn.output_norm.norm.weight" in task.added
    assert set(task.added) < set(task.heads)
    samples = make_samples(adapter)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
        ours, theirs = (predict(t, a, samples) for t, a in ((task, adapter), (old, plain)))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        loss = task.loss(task.model, Batch(adapter.collate(samples), 2))
    loss.total.backward()
    gates = [p for n, p in task.model.named_parameters() if n.endswith("output_norm.gate")]
    assert len(gates) == 2 + 1 + 6
    assert all(gate.grad.norm() > 0 for gate in gates)


def test_an_open_gate_is_the_norm(make_adapter: Any, build: Any, make_samples: Any) -> None:
    adapter = make_adapter(layer_norms=[BLOCK])
    task = build(adapter)
    block = task.model.get_submodule(BLOCK)
    seen = []
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        block.output_norm.gate.fill_(1)
    predict(task, adapter, make_samples(adapter))
    (output,) = seen
    torch.testing.assert_close(output.mean(-1), torch.zeros(output.shape[:2]), rtol=0, atol=1e-5)
    # A copy's hook uses the copy's norm.
    other = copy.deepcopy(task.model)
    with torch.no_grad():
        other.get_submodule(BLOCK).output_norm.gate.fill_(0)
    before = predict(task, adapter, make_samples(adapter))
    with torch.no_grad():
        after = task.loss(other, Batch(adapter.collate(make_samples(adapter)), 2)).predictions
    assert not torch.equal(before["2t"], after["2t"])


def test_norms_compile(make_adapter: Any, build: Any, make_samples: Any) -> None:
    adapter = make_adapter(layer_norms=["backbone.*.attn", "backbone.*.mlp"])
    task = build(adapter)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.3)
    samples = make_samples(adapter)
    eager = predict(task, adapter, samples)
    torch._dynamo.reset()
    for block in task.compiled_blocks:
        block.module.forward = torch.compile(
            block.module.forward, fullgraph=True, dynamic=False, backend="aot_eager"
        )
    compiled = predict(task, adapter, samples)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-4)


def test_upstream_reads_added_norms(
    tmp_path: Path, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    adapter = make_adapter(layer_norms=NORMS)
    task = build(adapter)
    with torch.no_grad():
        for name in task.added:
            task.model.get_parameter(name).normal_(mean=0.5)
    adapter.save(task, tmp_path / "model.ckpt")
    record = json.loads((tmp_path / "model.ckpt.json").read_text())
    model = upstream_model(record)
    insert_layer_norms(model, record["layer_norms"])
    model.load_checkpoint_local(str(tmp_path / "model.ckpt"), strict=True)
    samples = make_samples(adapter)
    with torch.no_grad():
        theirs = model(upstream_batch(samples))
    ours = predict(task, adapter, samples)
    for name, value in {**theirs.surf_vars, **theirs.atmos_vars}.items():
        assert torch.equal(ours[name], value), name
    # A second time changes nothing.
    assert insert_layer_norms(model, record["layer_norms"]) == record["layer_norms"]
    assert len(model.get_submodule(BLOCK)._forward_hooks) == 1


def test_places_of_norms_that_are_none(make_adapter: Any, build: Any) -> None:
    with pytest.raises(ConfigError) as error:
        build(
            make_adapter(layer_norms=["backbone.encoder_layer.*", "decoder", "backbone.time_mlp"])
        )
    first, second, third = list(error.value.problems)
    assert first.startswith(
        "model.options.layer_norms: 'backbone.encoder_layer.*' must match a module; it matches none"
    )
    assert second.startswith("model.options.layer_norms: 'decoder' must match modules of Linear, ")
    assert second.endswith("; got decoder, a Perceiver3DDecoder; name others")
    assert third.endswith("got backbone.time_mlp, a Sequential; name others")


HOOK = """\
import dataclasses

import torch
from torch import nn


def offset(model):
    # In place: a learned offset of the encoder's output.
    model.encoder.offset = nn.Parameter(torch.zeros(model.encoder.embed_dim))
    model.encoder.register_forward_hook(lambda encoder, _, x: x + encoder.offset)


class Corrected(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.warming = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        predicted = self.inner(batch)
        warmer = {"2t": predicted.surf_vars["2t"] + self.warming}
        return dataclasses.replace(predicted, surf_vars={**predicted.surf_vars, **warmer})


def around(model):
    return Corrected(model)


def other(model):
    return nn.Linear(2, 2)
"""

RUN = """\
[run]
folder = "{hook}"
steps = 2
device = "cpu"
[model]
adapter = "aurora"
checkpoint = "old.ckpt"
[model.options]
levels = [500, 850]
hook = "hook.py:{hook}"
layer_norms = ["backbone.decoder_layers.1.blocks.0"]
arguments = {{ {arguments} }}
[data]
batch_size = 1
train = [{{ path = "train.nc", options = {{ static = "static.nc" }} }}]
[optim]
lr = 1e-2
[log]
tensorboard = false
"""


def rows(output: str) -> dict[str, int]:
    """The load report's counts."""
    found = re.findall(r"(loaded|new|missing|unexpected|mismatched)\W+(\d+)", output)
    return {name: int(count) for name, count in found}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("hook", "new", "inner"),
    [("offset", "encoder.offset", ""), ("around", "warming", "inner.")],
)
def test_a_users_change(
    hook: str,
    new: str,
    inner: str,
    make_adapter: Any,
    build: Any,
    make_samples: Any,
    fastft: Callable[..., Any],
) -> None:
    plain = make_adapter()
    old = build(plain)
    plain.save(old, Path("old.ckpt"))
    write_weather(Path("train.nc"), plain.variables, 0, 6)
    Path("hook.py").write_text(HOOK)
    arguments = ", ".join(f"{k} = {v}" for k, v in plain.options.arguments.items())
    Path("run.toml").write_text(RUN.format(hook=hook, arguments=arguments))

    # Strict: all of the checkpoint's tensors are loaded, what is new is named.
    outcome = fastft("train", "run.toml")
    assert (outcome.errors, outcome.code) == ("", 0)
    assert rows(outcome.output)["loaded"] == len(old.model.state_dict())
    assert rows(outcome.output)["new"] == 4
    assert new in outcome.output
    weights = load_file(f"{hook}/checkpoints/step-00000002/model.safetensors")
    assert weights[new].norm() > 0
    assert f"{inner}backbone.decoder_layers.1.blocks.0.output_norm.gate" in weights
    outcome = fastft("train", "run.toml", "run.steps=3", "--resume")
    assert (outcome.errors, outcome.code) == ("", 0)

    outcome = fastft("export", "run.toml", "--to", "new.ckpt")
    assert (outcome.errors, outcome.code) == ("", 0)
    exported = torch.load("new.ckpt", weights_only=True)
    assert {new, "encoder.surf_token_embeds.weights.2t"} < set(exported)
    # And back, as a checkpoint: nothing is new any more.
    outcome = fastft("train", "run.toml", "run.folder=again", "model.checkpoint=new.ckpt")
    assert (outcome.errors, outcome.code) == ("", 0)
    assert rows(outcome.output)["new"] == 0


@pytest.mark.usefixtures("project")
def test_hooks_start_from_the_same_predictions(
    make_adapter: Any, build: Any, make_samples: Any
) -> None:
    Path("hook.py").write_text(HOOK)
    plain = make_adapter(rollout_steps=2)
    old, samples = build(plain), make_samples(plain)
    expected = predict(old, plain, samples)
    for hook in ("offset", "around"):
        adapter = make_adapter(rollout_steps=2, hook=f"hook.py:{hook}")
        task = build(adapter)
        assert isinstance(task.model, nn.Module)
        for block in task.blocks:
            if not block.name.endswith("decoder"):
                assert task.model.get_submodule(block.name) is block.module
        found = predict(task, adapter, samples)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("hook.py", "model.options.hook: must be 'file.py:function'; got 'hook.py'; correct it"),
        ("none.py:f", "model.options.hook: none.py must be a .py file; got no such file"),
        (
            "hook.py:offest",
            "hook.py must define a function offest; got none; did you mean 'offset'",
        ),
        ("hook.py:other", "other in hook.py must return None, or a module that .* got Linear"),
    ],
)
def test_hooks_that_are_none(hook: str, message: str, make_adapter: Any, build: Any) -> None:
    Path("hook.py").write_text(HOOK)
    with pytest.raises(AdapterError, match=message):
        build(make_adapter(hook=hook))
