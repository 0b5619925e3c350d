"""The model that the trainer gets: its class, blocks, compiled graphs."""

from pathlib import Path
from typing import Any, cast

import aurora
import pytest
import torch
from torch import nn

from fastft.adapters import registry
from fastft.adapters.aurora.build import timestep_hours
from fastft.blocks import allow_graphs
from fastft.checkpoint import Weights, load_weights
from fastft.config import FinetuneConfig, LoraConfig, ModelConfig, NewHead
from fastft.errors import AdapterError, ConfigError
from fastft.finetune import apply_method
from fastft.task import Batch, Loss

CPU = torch.device("cpu")


def test_files_are_short() -> None:
    import fastft.adapters.aurora

    folders = Path(cast(str, fastft.adapters.aurora.__file__)).parent, Path(__file__).parent
    for folder in folders:
        for file in folder.glob("*.py"):
            assert len(file.read_text().splitlines()) <= 400, file


def test_classes(make_adapter: Any) -> None:
    for name in ("Aurora", "AuroraSmallPretrained", "Aurora12hPretrained", "AuroraHighRes"):
        adapter = make_adapter(model_class=name)
        model = adapter.build(None, device=CPU, checkpoint=None, pretrained=True).model
        assert type(model) is getattr(aurora, name)
        assert model.use_lora == (name in ("Aurora", "AuroraHighRes"))
        hours = 12.0 if name == "Aurora12hPretrained" else 6.0
        assert timestep_hours(adapter.options) == model.timestep.total_seconds() / 3600 == hours


def test_a_loss_of_the_run_file_is_refused(make_adapter: Any) -> None:
    with pytest.raises(ConfigError, match=r"loss\.terms: must be absent, since the aurora adapter"):
        make_adapter().build(
            lambda predictions, fields: Loss(predictions),
            device=CPU,
            checkpoint=None,
            pretrained=True,
        )


def test_blocks_are_in_forward_order(make_adapter: Any, build: Any, make_samples: Any) -> None:
    adapter = make_adapter()
    task = build(adapter)
    called: list[nn.Module] = []
    for block in task.blocks:
        assert block.compile
        assert not block.dynamic
        named = task.model.get_submodule(block.name)
        # The decoder's is beside the model, which has its parameters once.
        assert block.module is (named.patches if block.name == "decoder" else named)
        assert set(block.module.parameters()) == set(named.parameters())
        block.module.register_forward_hook(lambda module, *_: called.append(module))
    task.loss(task.model, Batch(adapter.collate(make_samples(adapter)), 2))
    assert [block.module for block in task.blocks] == called
    kinds = [m for m in task.model.modules() if type(m).__name__ == "Swin3DTransformerBlock"]
    assert len(kinds) == 6
    assert {block.module for block in task.layer_blocks} == set(kinds)
    others = [block.name for block in task.blocks if not block.layer]
    encoder = ["surf_token_embeds", "atmos_token_embeds", "surf_mlp", "level_agg"]
    encoder = [f"encoder.{name}" for name in encoder]
    stages = ["backbone.encoder_layers.0.downsample", "backbone.decoder_layers.0.upsample"]
    assert others == [*encoder, *stages, "decoder"]


@pytest.mark.parametrize(
    ("rollout_steps", "settings", "expected"),
    [
        (1, {}, 10),
        (2, {}, 12),
        # Without the low-rank updates and with them, in the first step and all others.
        (3, {"model_class": "Aurora", "arguments": {"lora_mode": "from_second"}}, 15),
    ],
)
def test_blocks_compile(
    rollout_steps: int,
    settings: dict[str, Any],
    expected: int,
    make_adapter: Any,
    build: Any,
    make_samples: Any,
) -> None:
    adapter = make_adapter(rollout_steps=rollout_steps, **settings)
    task = build(adapter)
    batch = Batch(adapter.collate(make_samples(adapter)), 2)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        task.model.zero_grad()
        loss = task.loss(task.model, batch)
        loss.total.backward()
        return loss.total, {n: p.grad for n, p in task.model.named_parameters()}

    eager, gradients = run()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    allow_graphs(len(task.compiled_blocks))
    for block in task.compiled_blocks:
        block.module.forward = torch.compile(
            block.module.forward, fullgraph=True, dynamic=False, backend=count
        )
    compiled, others = run()
    # Seven between and around the stages; two depths of the network, the first one shifted and not.
    # A second step has the embeddings anew, whose input is then differentiable; further ones none.
    assert len(graphs) == expected
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-6)
    # The mask is a constant: nothing in the graphs fills one.
    assert not any("setitem" in str(node.target) for g in graphs for node in g.graph.nodes)


def test_new_variables_alone_can_be_trained(make_adapter: Any, build: Any) -> None:
    task = build(make_adapter(surf_vars={"tp": {"location": 0.0, "scale": 0.01}}))
    apply_method(task, FinetuneConfig(method="heads"))
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert trained == set(task.heads)

    task = build(make_adapter())
    assert task.heads == ["decoder.surf_heads", "decoder.atmos_heads"]


def test_upstreams_lora_is_there_and_freezes_nothing(make_adapter: Any, build: Any) -> None:
    task = build(make_adapter(arguments={"use_lora": True}))
    names = [name for name, p in task.model.named_parameters() if ".lora_" in name]
    assert names
    apply_method(task, FinetuneConfig())
    assert all(p.requires_grad for p in task.model.parameters())


def test_upstreams_lora_alone_can_be_trained(
    make_adapter: Any, build: Any, make_samples: Any
) -> None:
    new = {"tp": {"location": 0.0, "scale": 0.01}}
    adapter = make_adapter(surf_vars=new, arguments={"use_lora": True})
    task = build(adapter)
    plain = build(make_adapter(surf_vars=new)).model.state_dict()
    report = load_weights(
        task.model,
        Weights(Path("plain"), "torch", plain),
        ModelConfig(adapter="aurora"),
        {},
        task.low_rank,
    )
    # The checkpoint has no low-rank updates; all else must match.
    assert set(report.new) == set(task.low_rank)
    assert (report.missing, report.unexpected, report.coverage) == ((), (), 1.0)

    heads = {"decoder.surf_heads.tp": NewHead()}
    apply_method(task, FinetuneConfig(method="lora", new_heads=heads))
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    added = {f"decoder.surf_heads.tp.{part}" for part in ("weight", "bias")}
    # Two linear maps of each of six blocks, two matrices each.
    assert trained - added == {n for n, _ in task.model.named_parameters() if ".lora_" in n}
    assert len(trained - added) == 24
    loss = task.loss(task.model, Batch(adapter.collate(make_samples(adapter)), 2))
    loss.total.backward()
    assert all(p.grad is None for n, p in task.model.named_parameters() if n not in trained)

    config = FinetuneConfig(method="lora", lora=LoraConfig(rank=2, dropout=0.1))
    with pytest.raises(ConfigError) as error:
        apply_method(task, config)
    assert error.value.problems == (
        "finetune.lora: must be absent where the model brings low-rank updates of its own; got"
        " rank, dropout; remove it, or switch the model's off",
    )


def test_updates_that_one_step_does_not_train_are_said(
    make_adapter: Any, build: Any, make_samples: Any
) -> None:
    updates = {"use_lora": True, "lora_mode": "from_second"}
    for steps, trains in ((1, False), (2, True)):
        adapter = make_adapter(rollout_steps=steps, arguments=updates)
        task = build(adapter)
        assert len(task.notes) == (0 if trains else 1)
        task.loss(task.model, Batch(adapter.collate(make_samples(adapter)), 2)).total.backward()
        assert {task.model.get_parameter(n).grad is not None for n in task.low_rank} == {trains}
    assert not build(make_adapter(arguments={"use_lora": True})).notes
    # That class has them by default.
    assert build(make_adapter(model_class="AuroraWave")).notes


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'aurora'", name="aurora")

    monkeypatch.setattr(registry.importlib, "import_module", fail)
    with pytest.raises(
        AdapterError, match=r"'aurora' needs the package aurora; install fastft\[auro"
    ):
        registry._load("aurora")
