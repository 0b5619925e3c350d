"""Encoder and decoder as blocks: the same bits whatever they keep."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastft import blocks, offload
from fastft.adapters.aurora.batch import first_state
from fastft.adapters.aurora.forward import CheckedMetadata, DeviceBatch
from fastft.blocks import COMPILED, EAGER, KEEP, LEAST, OFFLOAD, RECOMPUTE, BlockForwards
from fastft.config import FinetuneConfig, GradientsConfig, OptimConfig
from fastft.finetune import apply_method
from fastft.gradients import NormSummary
from fastft.memory.measure import capture_calls
from fastft.optim import Optimizer, layers_from_blocks, make_groups
from fastft.precision import make_precision
from fastft.step import TrainingStep
from fastft.task import Batch, Task

CPU = torch.device("cpu")
DROPOUT = {"drop_rate": 0.2}
ENDS = (
    "encoder.surf_token_embeds",
    "encoder.atmos_token_embeds",
    "encoder.surf_mlp",
    "encoder.level_agg",
    "decoder",
)
# One block at each depth, so that few graphs are compiled.
SHALLOW = {"encoder_depths": [1, 1], "decoder_depths": [1, 1], **DROPOUT}
LORA = {"use_lora": True, "lora_mode": "from_second", **DROPOUT}

CASES: dict[str, dict[str, Any]] = {
    "one step": {"arguments": DROPOUT},
    "all in bf16": {"arguments": DROPOUT, "autocast": "all", "rollout_steps": 2},
    "roll-out": {"arguments": DROPOUT, "rollout_steps": 2},
    "pushforward": {"arguments": DROPOUT, "rollout_steps": 3, "loss": {"pushforward": True}},
    "lora": {"model_class": "Aurora", "arguments": LORA, "rollout_steps": 2},
    "1.5": {
        "model_class": "AuroraV1p5",
        "arguments": {"level_condition": [500, 850], **DROPOUT},
        "rollout_steps": 2,
    },
}


def outcome(task: Task, batch: Batch, device: torch.device = CPU) -> dict[str, Tensor]:
    """Loss and gradients in bf16, with the same dropout at each call."""
    task.model.train()
    task.model.zero_grad()
    torch.manual_seed(2)
    with make_precision("bf16", device).autocast():
        loss = task.loss(task.model, batch)
    loss.total.backward()
    found = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
    found |= {f"predicted {n}": value for n, value in (loss.predictions or {}).items()}
    return {"loss": loss.total.detach(), "next draw": torch.rand(1), **found}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture
def make(make_adapter: Any, build: Any, make_samples: Any) -> Any:
    def made(mode: str = "off", **options: Any) -> tuple[Task, BlockForwards, Batch]:
        adapter = make_adapter(**options)
        task = build(adapter)
        if options.get("model_class") == "Aurora":
            apply_method(task, FinetuneConfig(method="lora"))
        samples = make_samples(adapter)
        for fields in (s[kind] for s in samples for kind in ("surf", "target_surf")):
            # Of precipitation, Aurora 1.5 takes the logarithm.
            fields.update({name: abs(values) for name, values in fields.items()})
        samples = [adapter.transform(sample, "train") for sample in samples]
        batch = Batch(adapter.collate(samples), 2)
        return task, BlockForwards(task, mode, make_precision("bf16", CPU)), batch

    return made


@pytest.mark.parametrize("case", CASES)
def test_every_way_has_the_bits_of_keeping_all(
    case: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_LEAST_BYTES", 0)
    task, forwards, batch = make(**CASES[case])
    expected = outcome(task, batch)
    for way in EAGER:
        forwards.use(dict.fromkeys(ENDS, way.name))
        assert_same_bits(outcome(task, batch), expected)
    assert all(value.isfinite().all() for value in expected.values())


def test_samples_from_a_replay_buffer(make: Any) -> None:
    task, forwards, batch = make(arguments=DROPOUT, rollout_steps=2)
    batch = dataclasses.replace(batch, leads=(1, 1))
    expected = outcome(task, batch)
    assert "predicted 2t" in expected
    forwards.use(dict.fromkeys(ENDS, RECOMPUTE.name))
    assert_same_bits(outcome(task, batch), expected)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_dropout_again(make_adapter: Any, make_samples: Any) -> None:
    gpu = torch.device("cuda")
    adapter = make_adapter(arguments=DROPOUT, autocast="all", rollout_steps=2)
    task = adapter.build(None, device=gpu, checkpoint=None, pretrained=False)
    batch = Batch(adapter.collate(make_samples(adapter)), 2).to(gpu)
    forwards = BlockForwards(task, "off", make_precision("bf16", gpu))
    expected = outcome(task, batch, gpu)
    for way in EAGER:
        forwards.use(dict.fromkeys(ENDS, way.name))
        found = outcome(task, batch, gpu)
        # A GPU may sum gradients in another order each time; other dropout changes all of them.
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-2 * value.norm(), (way.name, name)


def test_they_keep_less_and_compute_again(make: Any) -> None:
    task, forwards, batch = make(rollout_steps=2)
    calls = {"encoder": 0, "decoder": 0}

    def count(name: str) -> Any:
        # A module inside is called by its name in each forward, and once more to compute it again.
        return lambda *_: calls.update({name: calls[name] + 1})

    task.model.encoder.level_agg.layers[0][0].register_forward_hook(count("encoder"))
    task.model.decoder.level_decoder.register_forward_hook(count("decoder"))
    for way, expected in ((KEEP, 2), (RECOMPUTE, 4), (LEAST, 4), (OFFLOAD, 2)):
        calls.update(encoder=0, decoder=0)
        forwards.use_everywhere(way)
        outcome(task, batch)
        assert calls == {"encoder": expected, "decoder": expected}
    # Without gradients nothing is computed again.
    forwards.use_everywhere(RECOMPUTE)
    calls.update(encoder=0, decoder=0)
    with torch.no_grad():
        task.loss(task.model, batch)
    assert calls == {"encoder": 2, "decoder": 2}


def test_a_copy_computes_with_its_own_weights(make: Any) -> None:
    task, forwards, batch = make()
    forwards.use_everywhere(RECOMPUTE)
    expected = outcome(task, batch)
    other = dataclasses.replace(task, model=copy.deepcopy(task.model))
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.zero_()
    assert_same_bits(outcome(other, batch), expected)


def test_compiled(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    original = blocks.compiled
    monkeypatch.setattr(
        blocks, "compiled", lambda *a, **k: original(*a, **{**k, "backend": backend})
    )
    torch._dynamo.reset()
    settings = {"arguments": SHALLOW, "rollout_steps": 2, "autocast": "all", "chunk_patches": 16}
    task, forwards, batch = make("blocks", **settings)
    forwards.use_everywhere(KEEP)
    expected = outcome(task, batch)
    # Seven of encoder and decoder over two steps, whatever the number of chunks; two depths of the
    # network and two steps between them.
    assert len(graphs) == 11
    for way in (OFFLOAD, RECOMPUTE, LEAST):
        forwards.use_everywhere(way)
        assert_same_bits(outcome(task, batch), expected)
    assert len(graphs) == 11


def test_menus(make: Any) -> None:
    _, forwards, _ = make("blocks")
    compiled = [way.name for way in COMPILED]
    assert all(list(menu) == compiled for menu in forwards.menus.values())
    assert list(forwards.ways) == compiled
    assert list(forwards.ways)[-1] == LEAST.name


def test_layers_are_the_swin_blocks(make: Any) -> None:
    task, _, _ = make()
    swin = [block.name for block in task.layer_blocks]
    layers = layers_from_blocks(task)
    ends = {part: {n for p, n in layers.items() if p.startswith(part)} for part in ("enc", "dec")}
    assert ends == {"enc": {0}, "dec": {7}}
    assert {layers[f"{name}.attn.qkv.weight"] for name in swin} == set(range(1, 7))
    groups = make_groups(task, OptimConfig(lr=0.1), {})
    norms = NormSummary(names := list(layers), groups, task)(torch.ones(len(names)))
    labels = [name.removeprefix("layer/") for name in norms if name.startswith("layer/")]
    assert labels == ["encoder", "backbone", *swin, "decoder"]


def test_batches_are_seen_into(make: Any) -> None:
    _, _, batch = make()
    state = first_state(batch.data)
    leaves, kind = tree_flatten(state)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    fields = [state.surf_vars, state.static_vars, state.atmos_vars]
    assert len(tensors) == sum(map(len, fields)) + 2
    again = tree_unflatten(leaves, kind)
    assert (type(again), type(again.metadata)) == (DeviceBatch, CheckedMetadata)
    assert again.metadata.time == state.metadata.time
    assert again.metadata.atmos_levels == state.metadata.atmos_levels
    assert all(again.surf_vars[name] is value for name, value in state.surf_vars.items())


@pytest.mark.parametrize(("pushforward", "times"), [(False, 3), (True, 1)])
def test_calls_of_a_roll_out(pushforward: bool, times: int, make: Any) -> None:
    task, forwards, batch = make(rollout_steps=3, loss={"pushforward": pushforward})
    config = OptimConfig(lr=0.1)
    optimizer = Optimizer(make_groups(task, config, {}), config, total_steps=1)
    step = TrainingStep(task, optimizer, None, GradientsConfig(), forwards.precision)
    calls = capture_calls(step, batch)
    assert {call.times for call in calls.values()} == {times}
    inputs = tree_leaves(calls["encoder.level_agg"].arguments)
    assert all(x.grad_fn is None for x in inputs if isinstance(x, Tensor))
