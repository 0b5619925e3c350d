"""What a user can get wrong, and the one message that says so.

Every case starts from the good project of `conftest.py`, breaks one thing and runs one command.
"""

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        problems: every message, whole; '...' stands for anything.
        before: breaks a file first.
        begun: whether training has begun, so that the run folder may hold logs.
    """

    what: str
    command: str
    problems: tuple[str, ...]
    before: Callable[[], object] | None
    begun: bool


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


def write(file: str, content: bytes) -> Callable[[], object]:
    return lambda: Path(file).write_bytes(content)


def truncate(file: str) -> Callable[[], object]:
    def change() -> None:
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[: len(content) // 2])

    return change


def arrays(**changed: np.ndarray | None) -> Callable[[], object]:
    """Rewrites train.npz with other arrays, or without one."""

    def change() -> None:
        found = {**np.load("train.npz"), **changed}
        np.savez("train.npz", **{name: a for name, a in found.items() if a is not None})

    return change


def value(name: str, sample: int, wrong: float) -> Callable[[], object]:
    """Rewrites train.npz with one wrong value."""

    def change() -> None:
        found = dict(np.load("train.npz"))
        found[name][sample] = wrong
        np.savez("train.npz", **found)

    return change


def weights(*, prefix: str = "", classes: int = 3) -> Callable[[], object]:
    """Writes weights.safetensors for the project's model."""

    def change() -> None:
        shapes = {
            "stem.weight": (8, 4),
            "stem.bias": (8,),
            "blocks.0.linear.weight": (8, 8),
            "blocks.0.linear.bias": (8,),
            "blocks.1.linear.weight": (8, 8),
            "blocks.1.linear.bias": (8,),
            "head.weight": (classes, 8),
            "head.bias": (classes,),
        }
        tensors = {prefix + name: torch.ones(shape) for name, shape in shapes.items()}
        safetensors.torch.save_file(tensors, "weights.safetensors")

    return change


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("code-was-run",)


def save_with_code() -> None:
    torch.save({"stem.weight": torch.ones(8, 4), "hook": Malicious()}, "weights.pt")


def pickle_code() -> None:
    Path("weights.pt").write_bytes(pickle.dumps(Malicious()))


def train() -> None:
    assert main(["train", "run.toml"]) == 0


def each(*changes: Callable[[], object]) -> Callable[[], object]:
    return lambda: [change() for change in changes]


TRAIN = "train run.toml"
PRETRAINED = "train run.toml model.checkpoint=weights.safetensors"
TIMM = "train run.toml model.adapter=timm model.options="
ONE_BLOCK = replace("model.py", "Block(width), Block(width)", "Block(width)")
THREE_CLASSES = append(
    "model.py",
    "\n\nfrom fastft.task import FieldSpec\nfields = {'targets': FieldSpec(classes=3)}\n",
)
NAMES = ", ".join(
    f"'{name}'"
    for name in (
        "stem.weight",
        "stem.bias",
        "blocks.0.linear.weight",
        "blocks.0.linear.bias",
        "blocks.1.linear.weight",
        "blocks.1.linear.bias",
        "head.weight",
        "head.bias",
    )
)

RUN_FILE = [
    case(
        "no run file",
        "train absent.toml",
        "absent.toml: must be a readable file; got No such file or directory; check the path",
    ),
    case(
        "not TOML",
        TRAIN,
        "run.toml: must be TOML; got an error: Expected ']' at the end of a table declaration"
        " (at line 26, column 6); correct it",
        before=append("run.toml", "\n[step\n"),
    ),
    case(
        "not text",
        TRAIN,
        "run.toml: must be TOML; got an error: 'utf-8' codec can't decode byte 0xff in position 0:"
        " invalid start byte; correct it",
        before=write("run.toml", b"\xff\xfe"),
    ),
    case(
        "unknown key",
        TRAIN,
        "run.toml: data.batchsize: unknown key; did you mean 'batch_size'?",
        before=replace("run.toml", "batch_size", "batchsize"),
    ),
    case(
        "unknown section",
        "train run.toml optimiser.lr=1",
        "run.toml: optimiser: unknown key; did you mean 'optim'?",
    ),
    case(
        "missing key",
        TRAIN,
        "run.toml: optim.lr: must be set; got nothing; add it",
        before=replace("run.toml", "lr = 1e-2", ""),
    ),
    case(
        "wrong type",
        "train run.toml run.steps=many",
        'run.toml: run.steps: must be an integer; got "many"',
    ),
    case(
        "a value where a list belongs",
        "train run.toml finetune.freeze=stem.*",
        'run.toml: finetune.freeze: must be an array; got "stem.*"',
    ),
    case(
        "out of range",
        "train run.toml optim.lr=-1e-4",
        "run.toml: optim.lr: must be greater than 0; got -0.0001",
    ),
    case(
        "unknown choice",
        "train run.toml optim.schedule.name=cosin",
        "run.toml: optim.schedule.name: must be a known value; got 'cosin'; did you mean 'cosine'?",
    ),
    case(
        "unknown loss",
        "train run.toml loss.terms.0.name=mes",
        "run.toml: loss.terms.0.name: must be a known value; got 'mes'; did you mean 'mse'?",
    ),
    case(
        "another loss's key",
        "train run.toml loss.terms.0.delta=0.1",
        "run.toml: loss.terms.0.delta: unknown key; ...",
    ),
    case(
        "no such device name",
        "train run.toml run.device=gpu",
        "run.toml: run.device: must be 'auto', 'cpu', 'cuda' or 'cuda:N'; got \"gpu\"",
    ),
    case(
        "no training data named",
        "train run.toml data.train=[]",
        "run.toml: data.train: must hold at least one entry; got none; add one",
    ),
    case(
        "several at once",
        "train run.toml run.stepps=1 optim.lr=0 optim step.precision=fp8",
        "override 'optim': must read section.key=value, as optim.lr=1e-4",
        "run.toml: run.stepps: unknown key; did you mean 'steps'?",
        "run.toml: optim.lr: must be greater than 0; got 0",
        "run.toml: step.precision: must be a known value; got 'fp8'; choose from 'auto', 'fp32',"
        " 'tf32', 'bf16', 'fp16'",
    ),
    case(
        "override without a value",
        "train run.toml optim.lr",
        "override 'optim.lr': must read section.key=value, as optim.lr=1e-4",
    ),
    case(
        "override inside a value",
        "train run.toml run.steps.lr=1",
        "override 'run.steps.lr=1': 'run.steps' must be a section; got the value 2",
    ),
    case(
        "override of an entry that is not there",
        "train run.toml data.train.3.path=a.npz",
        "override 'data.train.3.path=a.npz': must name an entry that exists, 'data.train' has the"
        " entries 0 to 0; got '3'",
    ),
    case(
        "override whose quotes the shell took",
        "train run.toml finetune.freeze=[stem.*]",
        "override 'finetune.freeze=[stem.*]': must be TOML after '='; got an error: Invalid value"
        " (at line 1, column 10); put the whole override into single quotes, so that the shell"
        " leaves double quotes in it",
    ),
]

MODEL = [
    case(
        "unknown adapter",
        "train run.toml model.adapter=tim",
        "model.adapter: must be a known adapter; got 'tim'; did you mean 'timm'?",
    ),
    case(
        "unknown model option",
        "train run.toml model.options.argument=1",
        "model.options.argument: unknown key; did you mean 'arguments'?",
    ),
    case(
        "no model file",
        "train run.toml model.options.file=mode.py",
        "model.options.file: mode.py must be a .py file; got no such file; correct the path",
    ),
    case(
        "model file with a syntax error",
        TRAIN,
        "model.options.file: .../model.py, line 26: must be valid Python; got invalid syntax;"
        " correct it",
        before=append("model.py", "def (:\n"),
    ),
    case(
        "model file without build",
        TRAIN,
        "model.py: must define a function build() or a class Adapter; got neither; define one that"
        " returns the model",
        before=replace("model.py", "def build", "def make"),
    ),
    case(
        "build returns no model",
        TRAIN,
        "model.py: build() must return an nn.Module, (nn.Module, loss function) or a Task; got int;"
        " correct what it returns",
        before=replace("model.py", "return Net(width, classes)", "return width"),
    ),
    case(
        "build returns too much",
        TRAIN,
        "model.py: build() must return an nn.Module, (nn.Module, loss function) or a Task; got"
        " (Net, str, int); correct what it returns",
        before=replace("model.py", "return Net(width, classes)", "return Net(8, 3), 'mse', 1"),
    ),
    case(
        "unknown argument of build",
        "train run.toml model.options.arguments.widht=4",
        "model.options.arguments: must fit build(width=8, classes=3) in model.py; got"
        " {\"widht\": 4}: got an unexpected keyword argument 'widht'",
    ),
    case(
        "no loss",
        "train run.toml loss.terms=[]",
        "loss.terms: build() returned no loss, so the run file needs one; got none; add a"
        " [[loss.terms]] section, or return (model, loss)",
    ),
    case(
        "unknown timm model",
        TIMM + '{name="resnet81",num_classes=3}',
        "model.options.name: must be a model of timm ...; got 'resnet81'; did you mean 'resnet18'?",
    ),
    case(
        "unknown timm option",
        TIMM + '{name="resnet18",num_classes=3,image_size=32}',
        "model.options.image_size: unknown key; did you mean 'img_size'?",
    ),
    case(
        "unknown argument of a timm model",
        TIMM + '{name="resnet18",num_classes=3,arguments={depth=3}}',
        "model.options: timm must be able to make 'resnet18' with {'num_classes': 3, 'depth': 3};"
        " got TypeError: ResNet.__init__() got an unexpected keyword argument 'depth'; correct the"
        " options",
    ),
    case(
        "timm statistics",
        TIMM + '{name="resnet18",num_classes=3,mean=[0.5],std=[0,1,1]}',
        "model.options.mean: must hold one value for each of the 3 channels; got 1; add or remove"
        " some",
        "model.options.std: must be above 0; got [0.0, 1.0, 1.0]; drop channels that never vary",
    ),
]

DATA = [
    case(
        "no data file",
        "train run.toml data.train.0.path=absent.npz",
        "absent.npz: must exist; got no such file or folder; correct `path` (relative paths start"
        " at ...)",
    ),
    case(
        "truncated npz",
        TRAIN,
        "train.npz: must be a whole .npz file; got BadZipFile: File is not a zip file; write it"
        " again with numpy.savez, without object arrays",
        before=truncate("train.npz"),
    ),
    case(
        "arrays of unequal length",
        TRAIN,
        "train.npz: arrays must be equally long along their first axis, one entry per sample; got"
        " inputs (40, 4), targets (39,); correct or remove the odd ones",
        before=arrays(targets=np.zeros(39, int)),
    ),
    case(
        "NaN",
        TRAIN,
        "train.npz (train): inputs: values must be finite; got 4 NaN or infinite ones, as sample 3:"
        " nan; mask, fill or remove them (or add 'non-finite' to data.checks.ignore)",
        before=value("inputs", 3, np.nan),
    ),
    case(
        "labels out of range",
        TRAIN,
        "train.npz (train): targets: class indices must be integers from 0 to 2; got 1 other"
        " values, as sample 3: 7; correct the labels, or the model's number of classes (or add"
        " 'labels' to data.checks.ignore)",
        before=each(THREE_CLASSES, value("targets", 3, 7)),
    ),
    case(
        "two errors in the data",
        "check run.toml",
        "train.npz (train): inputs: values must be finite; ...",
        "train.npz (train): targets: class indices must be integers from 0 to 2; ...",
        before=each(THREE_CLASSES, value("targets", 3, 7), value("inputs", 5, np.inf)),
    ),
    case(
        "validation data that is training data",
        "train run.toml data.validation.0.path=train.npz",
        "train.npz (validation): evaluation data must not be in the training data; got 40 of 40"
        " samples (100.0%) that are, as sample 0 is sample 0 of train.npz (train); split the data"
        " anew, by place, time or molecule (or add 'leakage' to data.checks.ignore)",
    ),
    case(
        "unknown data check",
        "train run.toml data.checks.ignore=['leak']",
        "data.checks.ignore: must name checks; got 'leak'; did you mean 'leakage'?",
    ),
    case(
        "no array of that name",
        "train run.toml data.train.0.fields={targets='target'}",
        "train.npz: fields: arrays must be in the file; got 'target'; did you mean 'targets'?",
    ),
    case(
        "no field to compare with",
        TRAIN,
        "loss 'cross_entropy': the batch must have the field 'targets'; got none; did you mean"
        " 'target'?",
        before=arrays(targets=None, target=np.arange(40) % 3),
        begun=True,
    ),
    case(
        "batch larger than the data",
        "train run.toml data.batch_size=64",
        "data.batch_size: must not exceed the 40 training samples; got 64; lower it or add data",
    ),
    case(
        "data that no adapter reads",
        "train run.toml data.train.0.path=.",
        ".: must be an .npz file or an image folder, or model.py must define dataset(source,"
        " split); neither holds",
    ),
    case(
        "channels that the model does not take",
        TIMM + '{name="resnet18",num_classes=3,img_size=32} data.validation=[]',
        "train.npz (train): samples must be readable; got 40 that are not, as train.npz: sample 0:"
        " inputs: must be [3, height, width], as model.options.in_chans says; got [1, 8, 8]; repair"
        " or remove them (or add 'unreadable' to data.checks.ignore)",
        before=arrays(inputs=np.ones((40, 1, 8, 8), np.float32)),
    ),
]

CHECKPOINT = [
    case(
        "no checkpoint",
        PRETRAINED,
        "weights.safetensors: must be a checkpoint; got no such file; check the path",
    ),
    case(
        "text",
        PRETRAINED,
        "weights.safetensors: must be a safetensors file or one written by torch.save; got neither"
        " (it begins with b'no weights here,'); give the file that holds the weights",
        before=write("weights.safetensors", b"no weights here, but text"),
    ),
    case(
        "truncated safetensors",
        PRETRAINED,
        "weights.safetensors: must be a whole safetensors file; got a truncated or damaged one (718"
        " bytes: Error while deserializing header: incomplete metadata, file not fully covered);"
        " fetch or save it again",
        before=each(weights(), truncate("weights.safetensors")),
    ),
    case(
        "torch file with code",
        "train run.toml model.checkpoint=weights.pt",
        "weights.pt: must hold tensors and plain data only; got 'posix.mkdir', that is code, which"
        " was not run; re-save its state_dict as safetensors with the tool that made it",
        before=save_with_code,
    ),
    case(
        "pickle with code",
        "train run.toml model.checkpoint=weights.pt",
        "weights.pt: must hold tensors and plain data only; got a Python pickle that torch.save did"
        " not write, that is code, which was not run; re-save its state_dict as safetensors with"
        " the tool that made it",
        before=pickle_code,
    ),
    case(
        "unknown prefix",
        PRETRAINED,
        "weights.safetensors: every tensor of model and checkpoint must match (model.strict); got 0"
        " that match and these that do not:\n"
        "  8 missing in the checkpoint: stem.weight [8, 4], stem.bias [8], ... and 5 more\n"
        "  8 unexpected in the checkpoint: my/blocks.0.linear.bias [8], ... and 5 more\n"
        "  do: set model.strict = false to load what fits, or give a checkpoint of this very model;"
        " nearest names: 'my/stem.weight' for 'stem.weight', ...",
        before=weights(prefix="my/"),
    ),
    case(
        "unknown prefix, not strict",
        PRETRAINED + " model.strict=false",
        "weights.safetensors: at least 50% of the model's values must load (model.min_coverage);"
        " got 0.0%, as of a wrongly prefixed file or another model's; nearest names:"
        " 'my/stem.weight' for 'stem.weight', ...; give a matching checkpoint, or lower"
        " model.min_coverage if so little is meant to load",
        before=weights(prefix="my/"),
    ),
    case(
        "head of another shape",
        PRETRAINED,
        "weights.safetensors: every tensor of model and checkpoint must match (model.strict); got 6"
        " that match and these that do not:\n"
        "  2 mismatched: head.weight [3, 8], in the checkpoint [5, 8], head.bias [3], in the"
        " checkpoint [5]\n"
        "  do: name replaced heads in finetune.new_heads (head?), set model.strict = false to load"
        " what fits, or give a checkpoint of this very model",
        before=weights(classes=5),
    ),
    case(
        "new head that the model lacks",
        PRETRAINED + " finetune.new_heads.haed={}",
        "finetune.new_heads.haed: must name a module of the model; got none; did you mean 'head'?",
        before=weights(),
    ),
    case(
        "inheriting from nothing",
        PRETRAINED + " finetune.new_heads.head={init='inherit',source='old_head'}",
        "finetune.new_heads.head.source: must be a module of the checkpoint with the head's shapes;"
        " got no module 'old_head'; name one that fits: head",
        before=weights(),
    ),
    case(
        "new heads that need a checkpoint",
        "train run.toml finetune.new_heads.head={init='zero'}",
        "finetune.new_heads: without model.checkpoint every head is new and 'random'; got another"
        " init; set model.checkpoint",
    ),
]

TRAINED_PARAMETERS = [
    case(
        "freeze matches nothing",
        "train run.toml finetune.freeze=['encoder.*','head.wieght']",
        "finetune.freeze: 'encoder.*' must match a parameter; it matches none; choose from "
        + NAMES,
        "finetune.freeze: 'head.wieght' must match a parameter; it matches none; did you mean"
        " 'head.weight'?",
    ),
    case(
        "no module of that class",
        "train run.toml finetune.freeze_types=['Linaer']",
        "finetune.freeze_types: 'Linaer' must be the class of a module; it is none; did you mean"
        " 'Linear'?",
    ),
    case(
        "stage matches nothing",
        "train run.toml finetune.unfreeze=[{at_step=1,match=['encoder.*']}]",
        "finetune.unfreeze.0.match: 'encoder.*' must match a parameter; it matches none; choose"
        " from " + NAMES,
    ),
    case(
        "everything frozen",
        "train run.toml finetune.freeze=['*']",
        "finetune: must leave something to train; method 'full' with these heads and freezes leaves"
        " nothing; name a head or freeze less",
    ),
    case(
        "heads without heads",
        "train run.toml finetune.method=heads",
        "finetune: must leave something to train; method 'heads' with these heads and freezes"
        " leaves nothing; name a head or freeze less",
    ),
    case(
        "no such head",
        "train run.toml finetune.method=heads finetune.heads=['haed']",
        "finetune.heads: 'haed' must be a module of the model; it is not; did you mean 'head'?",
    ),
    case(
        "nothing to adapt",
        "train run.toml finetune.method=lora finetune.lora.targets=['attention.*']",
        "finetune.lora.targets: 'attention.*' must match a linear or convolution; it matches none;"
        " choose from 'stem', 'blocks.0.linear', 'blocks.1.linear', 'head'",
    ),
    case(
        "rule matches nothing",
        "train run.toml optim.groups=[{match=['encoder.*'],lr=1}]",
        "optim.groups.0.match: 'encoder.*' must match a parameter; none does; choose from " + NAMES,
    ),
    case(
        "rule shadowed by an earlier one",
        "train run.toml optim.groups=[{match=['*'],lr=1},{match=['head.*'],lr=1}]",
        "optim.groups.1.match: 'head.*' ... only what earlier rules took; move it up",
    ),
    case(
        "rule for what is frozen",
        "train run.toml finetune.freeze=['stem.*'] optim.groups=[{match=['stem.*'],lr=1}]",
        "optim.groups.0.match: 'stem.*' ... only frozen parameters; unfreeze or drop it",
    ),
    case(
        "penalty on nothing",
        "train run.toml loss.penalties=[{kind='l2',match=['weight'],weight=1}]",
        "loss.penalties.0.match: 'weight' must match a parameter; it matches none; did you mean"
        " 'stem.weight'?",
    ),
    case(
        "layer decay without layers",
        "train run.toml optim.layer_decay=0.5",
        "optim.layer_decay: needs a model with layers; the adapter names no blocks; drop it",
        before=ONE_BLOCK,
    ),
]

LOSS = [
    case(
        "key of a plain prediction",
        "train run.toml loss.terms.0.prediction=logits",
        "loss 'cross_entropy': the model must return a mapping with the key 'logits'; got Tensor;"
        " remove `prediction`",
        begun=True,
    ),
    case(
        "key that the prediction lacks",
        "train run.toml loss.terms.0.prediction=logit",
        "loss 'cross_entropy': `prediction` must name an output of the model; got 'logit'; did you"
        " mean 'logits'?",
        before=replace(
            "model.py",
            "return self.head(self.blocks(self.stem(x)))",
            "return {'logits': self.head(self.blocks(self.stem(x)))}",
        ),
        begun=True,
    ),
    case(
        "class weights of another length",
        "train run.toml loss.terms.0.class_weights=[1,2]",
        "loss 'cross_entropy': class_weights must have one factor for each of the 3 classes; got 2;"
        " add or remove some",
        begun=True,
    ),
    case(
        "predictions and targets of two shapes",
        "train run.toml loss.terms.0.name=mse",
        "loss 'mse': prediction and target must have one shape; got [8, 3] and [8]; reshape one of"
        " them",
        begun=True,
    ),
    case(
        "no such loss function",
        "train run.toml loss.terms=[{name='python',file='model.py',function='biuld'}]",
        "loss 'python': model.py must define the function 'biuld'; got none; did you mean 'build'?",
    ),
]

WHERE = [
    case(
        "run folder that cannot be made",
        "train run.toml run.folder=model.py/run",
        "run.folder: must be writable; got 'model.py/run': Not a directory; choose another folder",
    ),
    case(
        "run folder that holds a run",
        TRAIN,
        "run.folder: 'run' holds a run at step 2; go on with it with --resume, or choose another"
        " folder",
        before=train,
    ),
    case(
        "run that is finished",
        "train run.toml --resume",
        "run.steps: 'run' is at step 2 already, of 2 asked for; raise run.steps or choose another"
        " folder",
        before=train,
    ),
    case(
        "resuming with other settings",
        "train run.toml --resume run.steps=4 optim.lr=1e-3 data.batch_size=4",
        "run/run.toml: data.batch_size: must stay as the run began; it was 8, now 4; change it back"
        " or start a new run",
        "run/run.toml: optim.lr: must stay as the run began; it was 0.01, now 0.001; change it back"
        " or start a new run",
        before=train,
    ),
    case(
        "no GPU",
        "train run.toml run.device=cuda",
        "run.device: must be a device of this machine; got 'cuda' with 0 GPUs; use 'auto' or 'cpu'",
    ),
    case(
        "TF32 on a CPU",
        "train run.toml step.precision=tf32",
        "step.precision: 'tf32' needs a GPU; got a CPU; use 'fp32' or 'auto'",
    ),
    case(
        "no blocks to compile",
        "train run.toml step.compile=blocks",
        "step.compile: 'blocks' needs a model with repeated blocks; the adapter names none; use"
        " 'model' or 'off'",
        before=ONE_BLOCK,
    ),
]

OTHER_COMMANDS = [
    case(
        "nothing to evaluate on",
        "evaluate run.toml data.validation=[]",
        "data.validation: must name a data set to evaluate on; got none; add [[data.validation]]",
        before=train,
    ),
    case(
        "nothing trained to evaluate",
        "evaluate run.toml",
        "run: must hold a run's checkpoint; it holds none; train first, or name one with"
        " --checkpoint",
    ),
    case(
        "no checkpoint to evaluate",
        "evaluate run.toml --checkpoint absent.pt",
        "absent.pt: must be a checkpoint; got no such file; check the path",
        before=train,
    ),
    case(
        "another model's run",
        "evaluate run.toml model.options.arguments.width=16",
        "run/checkpoints/step-00000002: must hold the run file's model; got size mismatch for"
        " stem.weight: copying a param with shape torch.Size([8, 4]) from checkpoint, the shape in"
        " current model is torch.Size([16, 4]); give the run file that it was trained with",
        before=train,
    ),
    case(
        "export that cannot be written",
        "export run.toml --to model.py/out.safetensors",
        "model.py/out.safetensors: must be written whole; got ...; free space or choose a folder"
        " that can be written; what was saved before is untouched",
        before=train,
    ),
    case(
        "nothing to show",
        "show absent.pt",
        "absent.pt: must be a checkpoint; got no such file; check the path",
    ),
]

CASES = [
    *RUN_FILE,
    *MODEL,
    *DATA,
    *CHECKPOINT,
    *TRAINED_PARAMETERS,
    *LOSS,
    *WHERE,
    *OTHER_COMMANDS,
]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("wrong", CASES, ids=lambda wrong: wrong.what)
def test_bad_input(
    wrong: Case, fastft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if wrong.before is not None:
        wrong.before()
    files = read_files()
    outcome = fastft(*wrong.command.split())
    assert outcome.code == 2
    assert "Traceback" not in outcome.errors
    assert len(outcome.problems) == len(wrong.problems), outcome.errors
    for found, expected in zip(outcome.problems, wrong.problems, strict=True):
        assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), found), found
    assert not Path("code-was-run").exists()
    if wrong.begun:
        assert not list(Path("run").rglob("*.safetensors"))
    else:
        assert read_files() == files


def read_files() -> dict[Path, bytes]:
    """Everything in the project but what Python caches."""
    files = (file for file in Path().rglob("*") if file.is_file())
    return {file: file.read_bytes() for file in files if "__pycache__" not in file.parts}


@pytest.mark.usefixtures("project")
def test_the_good_project_trains(fastft: Callable[..., Any]) -> None:
    outcome = fastft("train", "run.toml")
    assert (outcome.code, outcome.errors) == (0, "")
    assert Path("run/checkpoints/step-00000002/model.safetensors").is_file()


@pytest.mark.usefixtures("project")
def test_the_malicious_files_are_malicious() -> None:
    pickle_code()
    with Path("weights.pt").open("rb") as file:
        pickle.load(file)
    assert Path("code-was-run").is_dir()
    Path("code-was-run").rmdir()
    save_with_code()
    torch.load("weights.pt", weights_only=False)
    assert Path("code-was-run").is_dir()
