"""timm's families through the command line, image folders, and what the adapter refuses."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from fastft.adapters.timm import TimmAdapter, TimmOptions
from fastft.assemble import assemble
from fastft.config import OptimConfig
from fastft.errors import AdapterError, ConfigError, DataError
from fastft.optim import make_groups
from fastft.portable import write_portable
from fastft.runfile import read_run_file
from fastft.task import Loss

# Name, input size, class of the repeated blocks, how many, and the last layer for layer-wise decay.
FAMILIES = [
    ("mobilenetv3_small_100", 32, "InvertedResidual", 10, 13),
    ("resnet18", 32, "BasicBlock", 8, 9),
    ("vit_tiny_patch16_224", 32, "Block", 12, 13),
    ("swin_tiny_patch4_window7_224", 32, "SwinTransformerBlock", 12, 13),
    ("convnext_atto", 32, "ConvNeXtBlock", 12, 13),
    ("efficientnet_b0", 32, "InvertedResidual", 15, 17),
    ("vit_small_patch14_dinov2", 28, "Block", 12, 13),
    ("mobilenetv4_conv_small", 32, "UniversalInvertedResidual", 12, 18),
]

CPU = torch.device("cpu")

# A vision transformer of four thousand parameters.
SMALL = {
    "name": "vit_tiny_patch16_224",
    "num_classes": 2,
    "img_size": 16,
    "arguments": {"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2},
}


def make_adapter(**options: Any) -> TimmAdapter:
    return TimmAdapter(TimmOptions(**{"num_classes": 3, **options}))


def build(adapter: TimmAdapter) -> Any:
    return adapter.build(
        lambda predictions, fields: Loss(predictions.mean()),
        device=CPU,
        checkpoint=None,
        pretrained=True,
    )


def timm_overrides(**options: Any) -> list[str]:
    arguments = options.pop("arguments", {})
    return [
        "model.adapter=timm",
        "model.options={}",
        *(f"model.options.{name}={json.dumps(value)}" for name, value in options.items()),
        *(f"model.options.arguments.{name}={value}" for name, value in arguments.items()),
    ]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("name", "size", "block", "count", "last"), FAMILIES, ids=lambda value: str(value)
)
def test_family(
    name: str,
    size: int,
    block: str,
    count: int,
    last: int,
    fastft: Callable[..., Any],
) -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(6, 3, size, size)).astype(np.float32)
    np.savez("images.npz", inputs=inputs, targets=np.arange(6) % 3)
    command = [
        "train",
        "run.toml",
        *timm_overrides(name=name, num_classes=3, img_size=size),
        "data.train.0.path=images.npz",
        "data.validation=[]",
        "data.batch_size=2",
        "log.every_steps=1",
        # Keeps the least state: the checkpoint is written too.
        "optim.name=sgd",
        "optim.lr=0.01",
        "optim.layer_decay=0.5",
    ]

    dry = fastft(*command, "--dry-run")
    assert (dry.code, dry.errors) == (0, "")
    assert "layer 0" in dry.output
    assert f"layer {last}" in dry.output
    assert not Path("run").exists()

    outcome = fastft(*command)
    assert (outcome.code, outcome.errors) == (0, "")
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(math.isfinite(record["train/loss"]) for record in records)
    # Some families write a hundred megabytes.
    shutil.rmtree("run")

    task = build(make_adapter(name=name, img_size=size))
    modules = [found.module for found in task.blocks]
    assert len({type(module) for module in modules}) == 1
    assert (type(modules[0]).__name__, len(modules)) == (block, count)
    groups = make_groups(task, OptimConfig(lr=1.0, layer_decay=0.5), {})
    rates = {n: group.lr for group in groups for n in group.parameters}
    assert rates[f"{task.heads[0]}.weight"] == 1.0
    assert min(rates.values()) == 0.5**last


def write_images(folder: Path, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for shade, kind in ((40, "dark"), (200, "light")):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(random.normal(shade, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")


@pytest.mark.usefixtures("project")
def test_folders_of_images_train(fastft: Callable[..., Any]) -> None:
    write_images(Path("pictures/train"), 8, 0)
    write_images(Path("pictures/validation"), 4, 1)
    outcome = fastft(
        "train",
        "run.toml",
        *timm_overrides(**SMALL),
        "data.train.0.path=pictures/train",
        "data.validation.0.path=pictures/validation",
        "run.steps=30",
        "optim.lr=0.02",
        "evaluate.metrics=[{name='accuracy'}]",
    )
    assert (outcome.code, outcome.errors) == (0, "")
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation/accuracy"] == 1.0


def test_images_get_the_models_size_and_normalisation() -> None:
    adapter = make_adapter(**SMALL)
    build(adapter)
    grey = np.full((20, 24, 3), 128, np.uint8)
    for split in ("train", "validation"):
        image = adapter.transform({"inputs": grey, "targets": 1}, split)["inputs"]
        # This family assumes mean and deviation 0.5.
        assert image.shape == (3, 16, 16)
        assert image.unique().tolist() == pytest.approx([(128 / 255 - 0.5) / 0.5], rel=1e-4)


def test_arrays_are_normalised_and_resized() -> None:
    adapter = make_adapter(**{**SMALL, "in_chans": 1, "mean": (2.0,), "std": (4.0,)})
    task = build(adapter)
    for shape in ((8, 8), (1, 8, 8)):
        image = adapter.transform({"inputs": np.full(shape, 10.0)}, "train")["inputs"]
        assert image.shape == (1, 16, 16)
        assert image.unique().tolist() == [2.0]
    assert (task.fields["inputs"].mean, task.fields["inputs"].std) == (0.0, 1.0)
    assert task.fields["targets"].classes == 2


@pytest.mark.parametrize(
    ("options", "compared"),
    [
        ({}, True),
        ({"mean": (1.0, 2.0, 3.0), "std": (1.0, 2.0, 3.0)}, True),
        ({"in_chans": 1}, False),
        ({"in_chans": 1, "mean": (1.0,)}, False),
        ({"in_chans": 1, "mean": (1.0,), "std": (2.0,)}, True),
    ],
)
def test_what_the_data_checks_compare(options: dict[str, Any], compared: bool) -> None:
    inputs = build(make_adapter(**{**SMALL, **options})).fields["inputs"]
    expected = (0.0, 1.0, 0) if compared else (None, None, None)
    assert (inputs.mean, inputs.std, inputs.channel_axis) == expected


@pytest.mark.usefixtures("project")
def test_images_that_hardly_vary_drift_from_the_model(fastft: Callable[..., Any]) -> None:
    random = np.random.default_rng(0)
    for kind in ("one", "two"):
        Path("flat", kind).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(126, 130, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(f"flat/{kind}/{number}.png")
    settings = (*timm_overrides(**SMALL), "data.train.0.path=flat", "data.validation=[]")
    outcome = fastft("check", "run.toml", *settings, "data.batch_size=2")
    assert (outcome.code, outcome.errors) == (0, "")
    assert "warning (drift) flat (train): inputs:" in outcome.output
    assert "got channels 0, 1, 2 far" in outcome.output


def test_tied_weights_are_saved_under_all_their_names(tmp_path: Path) -> None:
    adapter = make_adapter(**SMALL)
    task = build(adapter)
    first, second = task.model.blocks
    second.mlp.fc1.weight = first.mlp.fc1.weight
    adapter.save(task, tmp_path / "model.safetensors")
    arguments = {key: value for key, value in SMALL.items() if key not in ("name", "arguments")}
    again = timm.create_model(
        SMALL["name"],
        checkpoint_path=str(tmp_path / "model.safetensors"),
        **arguments,
        **SMALL["arguments"],
    )
    state = task.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_a_size_is_only_left_out_where_the_model_takes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[dict[str, Any]] = []

    def create(name: str, **arguments: Any) -> None:
        tried.append(arguments)
        raise TypeError("Net.__init__() got an unexpected keyword argument 'depht'")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(AdapterError, match="unexpected keyword argument 'depht'"):
        build(make_adapter(name="resnet18", img_size=32, arguments={"depht": 3}))
    assert [arguments["img_size"] for arguments in tried] == [32]


@pytest.mark.parametrize("shape", [(1, 16, 16), (4, 16, 16), (16,), (2, 3, 16, 16)], ids=str)
def test_wrong_channels(shape: tuple[int, ...]) -> None:
    adapter = make_adapter(**SMALL)
    build(adapter)
    with pytest.raises(DataError, match=r"inputs: must be \[3, height, width\]"):
        adapter.transform({"inputs": np.zeros(shape, np.float32)}, "train")


def test_images_for_a_model_of_other_channels() -> None:
    adapter = make_adapter(**{**SMALL, "in_chans": 1})
    build(adapter)
    with pytest.raises(DataError, match=r"images have 3 channels; got .*in_chans = 1"):
        adapter.transform({"inputs": np.zeros((16, 16, 3), np.uint8)}, "train")


def test_what_build_refuses() -> None:
    with pytest.raises(ConfigError, match="needs a loss; got none"):
        make_adapter(**SMALL).build(None, device=CPU, checkpoint=None, pretrained=True)
    with pytest.raises(AdapterError, match="did you mean 'resnet18'"):
        build(make_adapter(name="resnet81"))
    with pytest.raises(AdapterError, match=r"ResNet.* unexpected keyword argument 'depth'"):
        build(make_adapter(name="resnet18", arguments={"depth": 3}, img_size=32))
    with pytest.raises(ConfigError, match="one value for each of the 3 channels; got 1"):
        build(make_adapter(name="resnet18", mean=(0.5,)))


def test_weights_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **keywords: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(AdapterError, match="no route to host; connect to the network"):
        build(make_adapter(name="resnet18", pretrained=True))


@pytest.mark.usefixtures("project")
def test_new_heads_are_not_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model

    def create(*arguments: Any, pretrained: bool, **keywords: Any) -> Any:
        model = make(*arguments, **keywords)
        for parameter in model.parameters() if pretrained else ():
            parameter.data.fill_(7.0)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    overrides = [*timm_overrides(**SMALL, pretrained=True), "finetune.new_heads={head={}}"]
    console = Console(record=True)
    task, _ = assemble(read_run_file(Path("run.toml"), overrides), CPU, console)
    new = [name for name, p in task.model.named_parameters() if not (p == 7).all()]
    assert new == ["head.weight", "head.bias"]
    assert "the weights are the adapter's, pretrained" in console.export_text()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_hub_beside_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    make, fetched = timm.create_model, []

    def create(*arguments: Any, pretrained: bool, **keywords: Any) -> Any:
        fetched.append(pretrained)
        return make(*arguments, **keywords)

    monkeypatch.setattr(timm, "create_model", create)
    write_portable(build(make_adapter(**SMALL)).model, Path("other.safetensors"))
    overrides = [*timm_overrides(**SMALL, pretrained=True), "model.checkpoint=other.safetensors"]
    config = read_run_file(Path("run.toml"), [*overrides, f"model.strict={str(strict).lower()}"])
    for pretrained in (True, False):
        fetched.clear()
        console = Console(record=True, width=200)
        assemble(config, CPU, console, pretrained=pretrained)
        assert fetched == [pretrained and not strict]
        said = "model.options.pretrained is not used: with model.strict, model.checkpoint fills"
        assert (said in console.export_text()) == (pretrained and strict)


def test_dropped_paths_are_timms_and_blocks_share_a_graph() -> None:
    arguments = {**SMALL["arguments"], "depth": 5, "drop_path_rate": 0.6}
    torch.manual_seed(0)
    plain: Any = timm.create_model(SMALL["name"], num_classes=2, img_size=16, **arguments)
    task = build(make_adapter(**{**SMALL, "arguments": arguments}))
    rates = [1 - block.drop_path1.keep.item() for block in task.model.blocks[1:]]
    assert rates == pytest.approx([block.drop_path1.drop_prob for block in plain.blocks[1:]])
    assert len(set(rates)) == 4
    assert list(task.model.state_dict()) == list(plain.state_dict())
    # A sample is dropped as a whole or scaled so that the mean stays.
    shared, ones = task.model.blocks[-1].drop_path1, torch.ones(20_000, 2, 3)
    dropped = shared(ones)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.4])
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert shared.eval()(ones) is ones
    shared.train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in task.model.blocks:
        torch.compile(block, backend="eager", fullgraph=True)(torch.zeros(2, 5, 8))
    # The first block drops nothing.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
