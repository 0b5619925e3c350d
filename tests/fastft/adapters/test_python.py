"""A user's own file: what build may return, and which functions it may define beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from fastft.assemble import assemble
from fastft.portable import write_portable
from fastft.runfile import read_run_file
from fastft.task import Task

TENSOR_LOSS = """
    def loss(model, batch):
        return functional.cross_entropy(model(batch["inputs"]), batch["targets"])
"""
LOSS_WITH_PARTS = """
    def loss(model, batch):
        logits = model(batch["inputs"])
        value = functional.cross_entropy(logits, batch["targets"])
        return Loss(value, {"entropy": value.detach()}, logits.detach())
"""
RETURNS = {
    "model": "return Net(8, 3)",
    "model and loss that returns a tensor": TENSOR_LOSS + "    return Net(8, 3), loss",
    "model and loss with parts": LOSS_WITH_PARTS + "    return Net(8, 3), loss",
    "task": LOSS_WITH_PARTS
    + "    fields = {'targets': FieldSpec(classes=3)}\n"
    + "    return Task(Net(8, 3), loss, heads=('head',), fields=fields)",
}
IMPORTS = """

from torch.nn import functional
from fastft.task import FieldSpec, Loss, Task
"""


def write_build(body: str) -> None:
    text = Path("model.py").read_text().partition("def build")[0]
    Path("model.py").write_text(f"{text}{IMPORTS}\n\ndef build():\n    {body}\n")


def read_records(folder: str = "run") -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("project")
def test_whatever_build_returns_trains_alike(fastft: Callable[..., Any]) -> None:
    losses = []
    for returns, body in RETURNS.items():
        folder = returns.replace(" ", "_")
        write_build(body)
        terms = () if returns == "model" else ("loss.terms=[]",)
        command = ("train", "run.toml", f"run.folder={folder}", "log.every_steps=1", *terms)
        outcome = fastft(*command)
        assert (outcome.code, outcome.errors) == (0, "")
        first, _, validation = read_records(folder)
        losses.append((first["train/loss"], validation["validation/loss"]))
        if body.startswith(LOSS_WITH_PARTS):
            assert first["train/entropy"] == first["train/loss"]
        # The core's cross entropy is spelled out, so that it rounds otherwise.
        assert losses[-1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.usefixtures("project")
def test_a_tasks_heads_are_what_heads_trains(fastft: Callable[..., Any]) -> None:
    write_build(RETURNS["task"])
    dry = fastft("train", "run.toml", "--dry-run", "finetune.method=heads", "loss.terms=[]")
    rows = [line.split() for line in dry.output.splitlines()]
    assert ["│", "default", "│", "2", "│", "27", "│", "0.01", "│", "0", "│"] in rows
    assert ["│", "frozen", "│", "6", "│", "184", "│", "-", "│", "-", "│"] in rows


ADAPTER = """

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch.utils.data import default_collate
from fastft.task import Loss, Task


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Options:
    width: int = 4


class Adapter:
    Options = Options
    checks = ()

    def __init__(self, options):
        self.options = options

    def build(self, criterion, *, device, checkpoint, pretrained):
        model = Net(self.options.width, 3).to(device)
        return Task(model, lambda model, batch: criterion(model(batch["inputs"]), batch.data))

    def weights(self, path):
        return None

    def dataset(self, source, split):
        raise NotImplementedError

    def transform(self, sample, split):
        return sample

    def collate(self, samples):
        return default_collate(samples)

    def prepare(self, task, loader):
        pass

    def save(self, task, path):
        path.write_text(str(sorted(task.model.state_dict())))

    def describe(self, path):
        return None
"""


@pytest.mark.usefixtures("project")
def test_a_class_adapter(fastft: Callable[..., Any]) -> None:
    Path("model.py").write_text(Path("model.py").read_text() + ADAPTER)
    wrong = fastft("train", "run.toml", "model.options.arguments.widht=6")
    assert wrong.code == 2
    assert wrong.problems == ["model.options.arguments.widht: unknown key; did you mean 'width'?"]
    width = "model.options.arguments.width=6"
    assert fastft("train", "run.toml", width).code == 0
    state = safetensors.torch.load_file("run/checkpoints/step-00000002/model.safetensors")
    assert state["stem.weight"].shape == (6, 4)
    assert fastft("export", "run.toml", width, "--to", "out.txt").code == 0
    assert Path("out.txt").read_text() == str(sorted(state))


FUNCTIONS = """

from pathlib import Path
import torch
from torch.utils.data import default_collate
from fastft.task import Description, Finding


def note(call):
    with open("calls.txt", "a") as file:
        print(call, file=file)


def weights(path):
    note("weights")
    return {name.removeprefix("odd:"): value for name, value in torch.load(path).items()}


def dataset(source, split):
    count = source.options["count"]
    note(f"dataset {split} {count}")
    generator = torch.Generator().manual_seed(count)
    return [{"x": torch.randn(4, generator=generator), "y": n % 3} for n in range(count)]


def transform(sample, split):
    note(f"transform {split}")
    return {"inputs": sample["x"], "targets": sample["y"]}


def collate(samples):
    note("collate")
    return default_collate(samples)


def prepare(task, loader):
    note(f"prepare {type(task.model).__name__} {loader.example().size}")


def save(task, path):
    note("save")
    path.write_text("mine")


def describe(path):
    note("describe")
    return Description("my checkpoint", [("size", str(path.stat().st_size))])


def check_sums(data):
    note("check")
    yield Finding("sums", "warning", "here", "sums must be 0; got 1", 1, "sample 0", "subtract")


checks = [check_sums]
"""

OWN_DATA = (
    "data.train.0.path=.",
    "data.train.0.options.count=24",
    "data.validation.0.path=.",
    "data.validation.0.name=held_out",
    "data.validation.0.options.count=9",
)


@pytest.mark.usefixtures("project")
def test_every_function_beside_build_is_used(fastft: Callable[..., Any]) -> None:
    assert fastft("train", "run.toml", "run.folder=plain").code == 0
    state = safetensors.torch.load_file("plain/checkpoints/step-00000002/model.safetensors")
    torch.save({f"odd:{name}": value for name, value in state.items()}, "weights.pt")
    Path("model.py").write_text(Path("model.py").read_text() + FUNCTIONS)

    outcome = fastft("train", "run.toml", "model.checkpoint=weights.pt", *OWN_DATA)
    assert (outcome.code, outcome.errors) == (0, "")
    assert "100.00% of the values" in outcome.output
    assert "subtract" in outcome.output
    calls = dict.fromkeys(Path("calls.txt").read_text().splitlines())
    assert list(calls) == [
        "weights",
        "dataset train 24",
        "dataset validation 9",
        "transform train",
        "transform validation",
        "check",
        "collate",
        "prepare Net 8",
    ]
    assert fastft("export", "run.toml", *OWN_DATA, "--to", "out.txt").code == 0
    assert Path("out.txt").read_text() == "mine"
    assert "my checkpoint" in fastft("show", "out.txt", "--run", "run.toml").output


@pytest.mark.usefixtures("project")
def test_penalties_are_part_of_the_loss(fastft: Callable[..., Any]) -> None:
    penalties = "loss.penalties=[{kind='l2',match=['head.*'],weight=0.5}]"
    assert fastft("train", "run.toml", "run.steps=1", "run.folder=plain").code == 0
    assert fastft("train", "run.toml", "run.steps=1", penalties).code == 0
    plain, penalised = read_records("plain")[0], read_records()[0]
    penalty = penalised["train/penalty"]
    assert penalty > 0
    assert penalised["train/loss"] == pytest.approx(plain["train/loss"] + penalty)
    assert penalised["gradients/layer/head"] != plain["gradients/layer/head"]
    assert penalised["gradients/layer/stem"] == plain["gradients/layer/stem"]


@pytest.mark.usefixtures("project")
def test_tied_weights_are_exported_under_both_names(fastft: Callable[..., Any]) -> None:
    first, second = (f"model.blocks[{block}].linear.weight" for block in range(2))
    tied = f"model = Net(width, classes)\n    {second} = {first}\n    return model"
    text = Path("model.py").read_text()
    Path("model.py").write_text(text.replace("return Net(width, classes)", tied))
    assert fastft("train", "run.toml").code == 0
    assert fastft("export", "run.toml", "--to", "out.safetensors").code == 0
    state = safetensors.torch.load_file("out.safetensors")
    assert torch.equal(state["blocks.0.linear.weight"], state["blocks.1.linear.weight"])
    evaluated = fastft("evaluate", "run.toml", "--checkpoint", "out.safetensors")
    assert (evaluated.code, evaluated.errors) == (0, "")


PRETRAINED = """

def build({arguments}):
    net = Net(8, 3)
    for parameter in net.parameters() if {condition} else ():
        parameter.data.fill_(7)
    return {returns}
"""
HEADS = "finetune.new_heads={head={},stem={init='zero'}}"


def assembled(
    arguments: str, *overrides: str, returns: str = "net", pretrained: bool = True
) -> tuple[Task, list[str], str]:
    """The task, names of the tensors that are not of `build`'s weights, and what was said."""
    condition = "pretrained" if "pretrained" in arguments else "True"
    text = Path("model.py").read_text().partition("def build")[0]
    text += IMPORTS + PRETRAINED.format(arguments=arguments, condition=condition, returns=returns)
    Path("model.py").write_text(text)
    console = Console(record=True, width=300)
    config = read_run_file(Path("run.toml"), [HEADS, *overrides])
    task, _ = assemble(config, torch.device("cpu"), console, pretrained=pretrained)
    others = [name for name, p in task.model.named_parameters() if not (p == 7).all()]
    return task, others, console.export_text()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("returns", "overrides"),
    [
        ("net", ()),
        ("net, lambda model, batch: model(batch['inputs']).sum()", ["loss.terms=[]"]),
        ("Task(net, lambda model, batch: None)", ["loss.terms=[]"]),
    ],
)
def test_new_heads_are_not_those_that_build_loads(returns: str, overrides: Any) -> None:
    task, others, said = assembled("pretrained=True", *overrides, returns=returns)
    assert others == ["stem.weight", "stem.bias", "head.weight", "head.bias"]
    assert task.model.get_parameter("head.weight").std() > 0
    assert "the weights are the adapter's, pretrained" in said
    assert "build()" not in said


@pytest.mark.usefixtures("project")
def test_what_build_is_told_of_pretrained_weights() -> None:
    option = "model.options.arguments={pretrained=false}"
    assert len(assembled("pretrained=True", option)[1]) == 8
    task, others, _ = assembled("pretrained=True", pretrained=False)
    assert len(others) == 8
    write_portable(task.model, Path("weights.safetensors"))
    checkpoint = "model.checkpoint=weights.safetensors"
    unused = "model.options.arguments.pretrained is not used"
    _, others, said = assembled("pretrained=True", checkpoint)
    assert len(others) == 8
    assert unused in said
    assert unused not in assembled("pretrained=False", checkpoint)[2]
    assert unused not in assembled("pretrained=True", checkpoint, "model.strict=false")[2]


@pytest.mark.usefixtures("project")
def test_heads_that_may_not_be_at_random_are_named() -> None:
    _, others, said = assembled("")
    assert others == ["stem.weight", "stem.bias"]
    assert "finetune.new_heads: head as build() in model.py makes them; if it loads" in said
    assert "build()" not in assembled("", "finetune.new_heads={head={init='zero'}}")[2]
