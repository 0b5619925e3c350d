"""What a user can get wrong, and the one message that says so.

Every case starts from the good project of `conftest.py`, breaks one thing and runs one command.
"""

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fastft.cli import main


@dataclass(frozen=True)
class Case:
    """One thing that is wrong.

    Attributes:
        what: the case's name.
        command: what is typed after `fastft`.
        problems: every message, '...' for anything; '<here>' is the current folder.
        before: breaks a file first.
        begun: whether training had begun, and the run folder may hold logs.
    """

    what: str
    command: str
    problems: tuple[str, ...]
    before: Callable[[], object] | None = None
    begun: bool = False

    def matches(self, found: list[str]) -> bool:
        patterns = [re.escape(p).replace(r"\.\.\.", ".*") for p in self.problems]
        return len(found) == len(patterns) and all(
            re.fullmatch(pattern, text, re.DOTALL)
            for pattern, text in zip(patterns, found, strict=True)
        )


def case(
    what: str,
    command: str,
    *problems: str,
    before: Callable[[], object] | None = None,
    begun: bool = False,
) -> Case:
    return Case(what, command, problems, before, begun)


def replace(file: str, old: str, new: str) -> Callable[[], object]:
    def change() -> None:
        text = Path(file).read_text()
        assert old in text
        Path(file).write_text(text.replace(old, new))

    return change


def append(file: str, text: str) -> Callable[[], object]:
    return lambda: Path(file).write_text(Path(file).read_text() + text)


def write(file: str, content: str | bytes) -> Callable[[], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(file).write_bytes(data)


def truncate(file: str, share: float = 0.5) -> Callable[[], object]:
    return lambda: Path(file).write_bytes(
        Path(file).read_bytes()[: int(share * Path(file).stat().st_size)]
    )


def arrays(**changed: np.ndarray) -> Callable[[], object]:
    """Rewrites train.npz with other arrays; one that is empty is left out."""

    def change() -> None:
        kept = {**np.load("train.npz"), **changed}
        np.savez("train.npz", **{name: array for name, array in kept.items() if array.size})

    return change


def with_values(name: str, **places: float) -> Callable[[], object]:
    """Rewrites train.npz with a value at a place: `i3=nan` is sample 3."""

    def change() -> None:
        kept = dict(np.load("train.npz"))
        for place, value in places.items():
            kept[name][int(place[1:])] = value
        np.savez("train.npz", **kept)

    return change


def checkpoint(
    file: str = "weights.safetensors", *, prefix: str = "", classes: int = 3, width: int = 8
) -> Callable[[], object]:
    """Weights of the project's model."""

    def change() -> None:
        shapes = {"stem.weight": (width, 4), "stem.bias": (width,)}
        for block in range(2):
            shapes[f"blocks.{block}.linear.weight"] = (width, width)
            shapes[f"blocks.{block}.linear.bias"] = (width,)
        shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
        tensors = {prefix + name: torch.ones(shape) for name, shape in shapes.items()}
        safetensors.torch.save_file(tensors, file)

    return change


def trained() -> None:
    assert main(["train", "run.toml"]) == 0


class _Malicious:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("code-was-run",)


def pickled() -> None:
    torch.save({"stem.weight": _Malicious()}, "weights.pt")


def plain_pickle() -> None:
    Path("weights.pt").write_bytes(pickle.dumps(_Malicious()))


def both(*changes: Callable[[], object]) -> Callable[[], object]:
    return lambda: [change() for change in changes]


CHECKPOINT = "train run.toml model.checkpoint=weights.safetensors"

CASES = [
    # The run file.
    case("no such run file", "train absent.toml", "?"),
    case("not TOML", "train run.toml", "?", before=append("run.toml", "[log\n")),
    case("not text", "train run.toml", "?", before=write("run.toml", b"\xff\xfe\x00")),
    case("unknown key", "train run.toml", "?", before=replace("run.toml", "steps", "stepps")),
    case("unknown section", "train run.toml optimm.lr=1", "?"),
    case("missing key", "train run.toml", "?", before=replace("run.toml", "lr = 1e-2", "")),
    case("wrong type", "train run.toml run.steps=many", "?"),
    case("bool for number", "train run.toml optim.lr=true", "?"),
    case("out of range", "train run.toml optim.lr=-1e-4", "?"),
    case("unknown choice", "train run.toml optim.schedule.name=cosin", "?"),
    case("unknown loss", "train run.toml loss.terms.0.name=mes", "?"),
    case("unknown key loss", "train run.toml loss.terms.0.smoothing=0.1", "?"),
    case("several", "train run.toml run.stepps=1 optim.lr=0 step.precision=fp8", "?"),
    case("override without value", "train run.toml optim.lr", "?"),
    case("override into value", "train run.toml run.steps.lr=1", "?"),
    case("override index", "train run.toml data.train.3.path=a.npz", "?"),
    case("device name", "train run.toml run.device=gpu", "?"),
    # The model.
    case("unknown adapter", "train run.toml model.adapter=tim", "?"),
    case("unknown model option", "train run.toml model.options.fiel=model.py", "?"),
    case("model file missing", "train run.toml model.options.file=mode.py", "?"),
    case("not python", "train run.toml model.options.file=train.npz", "?"),
    case("syntax error", "train run.toml", "?", before=append("model.py", "def (:\n")),
    case("no build", "train run.toml", "?", before=replace("model.py", "def build", "def make")),
    case("build returns", "train run.toml", "?", before=replace("model.py", "return Net(width, classes)", "return width")),
    case("build returns three", "train run.toml", "?", before=replace("model.py", "return Net(width, classes)", "return Net(8, 3), None, None")),
    case("build loss", "train run.toml", "?", before=replace("model.py", "return Net(width, classes)", "return Net(8, 3), 'mse'")),
    case("arguments", "train run.toml model.options.arguments.widht=4", "?"),
    case("no loss", "train run.toml loss.terms=[]", "?"),
    case("unknown timm model", "train run.toml model.adapter=timm model.options={name='resnet81',num_classes=3}", "?"),
    case("unknown timm option", "train run.toml model.adapter=timm model.options={name='resnet18',classes=3}", "?"),
    case("timm arguments", "train run.toml model.adapter=timm model.options={name='resnet18',num_classes=3,arguments={depth=3}}", "?"),
    case("timm channels", "train run.toml model.adapter=timm model.options={name='resnet18',num_classes=3}", "?"),
    # Data.
    case("missing data", "train run.toml data.train.0.path=absent.npz", "?"),
    case("missing validation", "train run.toml data.validation.0.path=absent.npz", "?"),
    case("corrupt npz", "train run.toml", "?", before=truncate("train.npz")),
    case("text npz", "train run.toml", "?", before=write("train.npz", "not an archive")),
    case("unequal", "train run.toml", "?", before=arrays(targets=np.zeros(39, int))),
    case("nan", "train run.toml", "?", before=with_values("inputs", i3=np.nan)),
    case("labels", "train run.toml", "?", before=with_values("targets", i3=7)),
    case("missing field", "train run.toml", "?", before=arrays(targets=np.zeros(0), target=np.zeros(40, int))),
    case("fields", "train run.toml data.train.0.fields={targets='label'}", "?"),
    case("batch", "train run.toml data.batch_size=64", "?"),
    case("leak", "train run.toml data.validation.0.path=train.npz", "?"),
    case("ignore", "train run.toml data.checks.ignore=['leak']", "?"),
    case("adapter format", "train run.toml data.train.0.path=.", "?"),
    # Checkpoints.
    case("missing checkpoint", CHECKPOINT, "?"),
    case("text checkpoint", CHECKPOINT, "?", before=write("weights.safetensors", "some text, no weights")),
    case("truncated", CHECKPOINT, "?", before=both(checkpoint(), truncate("weights.safetensors"))),
    case("truncated header", CHECKPOINT, "?", before=both(checkpoint(), truncate("weights.safetensors", 0.1))),
    case("pickle", "train run.toml model.checkpoint=weights.pt", "?", before=pickled),
    case("plain pickle", "train run.toml model.checkpoint=weights.pt", "?", before=plain_pickle),
    case("prefix", CHECKPOINT, "?", before=checkpoint(prefix="encoder/")),
    case("prefix loose", CHECKPOINT + " model.strict=false", "?", before=checkpoint(prefix="encoder/")),
    case("head shape", CHECKPOINT, "?", before=checkpoint(classes=5)),
    case("other model", CHECKPOINT, "?", before=checkpoint(width=16)),
    case("new heads", CHECKPOINT + " finetune.new_heads.haed={}", "?", before=checkpoint()),
    case("new heads without", "train run.toml finetune.new_heads.head={}", "?"),
    case("inherit", CHECKPOINT + " finetune.new_heads.head={init='inherit',source='old_head'}", "?", before=checkpoint()),
    # What is trained.
    case("freeze", "train run.toml finetune.freeze=['stemm.*']", "?"),
    case("freeze type", "train run.toml finetune.freeze_types=['Linaer']", "?"),
    case("freeze all", "train run.toml finetune.freeze=['*']", "?"),
    case("unfreeze", "train run.toml finetune.unfreeze=[{at_step=1,match=['block.*']}]", "?"),
    case("heads", "train run.toml finetune.method=heads", "?"),
    case("probe", "train run.toml finetune.method=probe", "?"),
    case("heads name", "train run.toml finetune.method=heads finetune.heads=['haed']", "?"),
    case("lora", "train run.toml finetune.method=lora finetune.lora.targets=['attn.*']", "?"),
    case("rule", "train run.toml optim.groups=[{match=['haed.*'],lr=1}]", "?"),
    case("shadowed", "train run.toml optim.groups=[{match=['*'],lr=1},{match=['head.*'],lr=1}]", "?"),
    case("frozen rule", "train run.toml finetune.freeze=['stem.*'] optim.groups=[{match=['stem.*'],lr=1}]", "?"),
    case("penalties", "train run.toml loss.penalties=[{kind='l2',match=['weight'],weight=1}]", "?"),
    case("layer decay", "train run.toml optim.layer_decay=0.5", "?", before=replace("model.py", "Block(width), Block(width)", "Block(width)")),
    case("nesterov", "train run.toml optim.name=sgd optim.nesterov=true optim.momentum=0", "?"),
    # Loss.
    case("prediction", "train run.toml loss.terms.0.prediction=logits", "?", begun=True),
    case("prediction of mapping", "train run.toml loss.terms.0.prediction=logit", "?", begun=True, before=replace("model.py", "return self.head(self.blocks(self.stem(x)))", "return {'logits': self.head(self.blocks(self.stem(x)))}")),
    case("target", "train run.toml loss.terms.0.target=label", "?", begun=True),
    case("weights", "train run.toml loss.terms.0.class_weights=[1,2]", "?", begun=True),
    case("mse", "train run.toml loss.terms.0.name=mse", "?", begun=True),
    case("loss file", "train run.toml loss.terms=[{name='python',file='loss.py'}]", "?"),
    case("loss function", "train run.toml loss.terms=[{name='python',file='model.py',function='los'}]", "?"),
    case("monitor", "train run.toml checkpoint.monitor=accuracy", "?"),
    case("metric key", "train run.toml evaluate.metrics=[{name='accuracy',prediction='x'}]", "?", begun=True),
    # Where it runs.
    case("folder", "train run.toml run.folder=model.py/run", "?"),
    case("folder file", "train run.toml run.folder=model.py", "?"),
    case("holds a run", "train run.toml", "?", before=trained),
    case("finished", "train run.toml --resume", "?", before=trained),
    case("changed", "train run.toml --resume run.steps=4 optim.lr=1e-3 data.batch_size=4", "?", before=trained),
    case("cuda", "train run.toml run.device=cuda", "?"),
    case("tf32", "train run.toml step.precision=tf32", "?"),
    case("compile", "train run.toml step.compile=blocks", "?", before=replace("model.py", "Block(width), Block(width)", "Block(width)")),
    # Other commands.
    case("evaluate nothing", "evaluate run.toml data.validation=[]", "?", before=trained),
    case("evaluate test", "evaluate run.toml --split test", "?", before=trained),
    case("evaluate untrained", "evaluate run.toml", "?"),
    case("evaluate absent", "evaluate run.toml --checkpoint absent.pt", "?", before=trained),
    case("evaluate other model", "evaluate run.toml model.options.arguments.width=16", "?", before=trained),
    case("evaluate damaged", "evaluate run.toml", "?", before=both(trained, truncate("run/checkpoints/step-00000002/model.safetensors"))),
    case("export unwritable", "export run.toml --to model.py/out.safetensors", "?", before=trained),
    case("export folder", "export run.toml --to run", "?", before=trained),
    case("show absent", "show absent.pt", "?"),
    case("check nan", "check run.toml", "?", before=with_values("inputs", i3=np.nan)),
]
