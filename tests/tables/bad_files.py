"""Mistakes in what a run file names: data, checkpoints, folders, other commands."""

import numpy as np
from cases import (
    ONE_BLOCK,
    PRETRAINED,
    THREE_CLASSES,
    TIMM,
    TRAIN,
    arrays,
    case,
    each,
    pickle_code,
    replace,
    save_with_code,
    train,
    truncate,
    value,
    weights,
    write,
)

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
        " again with numpy.savez",
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
        " was not run; re-save its state_dict as safetensors with the tool that made it, or have an"
        " adapter that knows it read it (fastft show --run RUN.toml)",
        before=save_with_code,
    ),
    case(
        "pickle with code",
        "train run.toml model.checkpoint=weights.pt",
        "weights.pt: must hold tensors and plain data only; got a Python pickle that torch.save did"
        " not write, that is code, which was not run; re-save its state_dict as safetensors with"
        " the tool that made it, or have an adapter that knows it read it (fastft show --run"
        " RUN.toml)",
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
        "resuming with other settings",
        "train run.toml --resume run.steps=4 optim.lr=1e-3 data.batch_size=4",
        "run/run.toml: data.batch_size: must stay as the run began; it was 8, now 4; change it back"
        " or start a new run",
        "run/run.toml: optim.lr: must stay as the run began; it was 0.01, now 0.001; change it back"
        " or start a new run",
        before=train,
    ),
    case(
        "no memory plan",
        "train run.toml memory.plan=absent.json",
        "memory.plan: must be 'auto', 'off' or a plan.json that fastft wrote; there is no file"
        " 'absent.json'; correct it",
    ),
    case(
        "memory plan of other blocks",
        "train run.toml memory.plan=plan.json",
        "plan.json: must name the blocks of this model; 1 differ, the first is 'blocks.1';"
        " delete it for a new plan",
        "plan.json: 'keep mat' is no way to run the block 'blocks.0' with step.compile = 'off';"
        " did you mean 'keep matmuls'?",
        before=write("plan.json", b'{"budget_bytes": 1, "ways": {"blocks.0": "keep mat"}}'),
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
        "TF32 beside no autocast",
        "train run.toml step.precision=fp32 step.tf32=true",
        "step.tf32: needs a GPU and step.precision 'bf16' or 'fp16'; got 'fp32' on cpu; remove it,"
        " or set step.precision = 'tf32'",
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
        "no options to convert",
        "convert absent.yaml --to new.toml",
        "absent.yaml: must be an options file of metatrain, in YAML; got FileNotFoundError: ...;"
        " check the path",
    ),
    case(
        "an adapter that converts nothing",
        "convert options.yaml --to new.toml --adapter timm",
        "--adapter: must convert options files; 'timm' does not; use one that does, such as 'pet'",
    ),
    case(
        "an unknown adapter's options",
        "convert options.yaml --to new.toml --adapter pett",
        "--adapter: must be a known adapter; got 'pett'; did you mean 'pet'?",
    ),
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
        "export over a file",
        "export run.toml --to model.py",
        "--to: must be a new file; got 'model.py', which exists; name another, or remove it first",
        before=train,
    ),
    case(
        "conversion over a file",
        "convert options.yaml --to run.toml",
        "--to: must be a new file; got 'run.toml', which exists; name another, or remove it first",
    ),
    case(
        "nothing to show",
        "show absent.pt",
        "absent.pt: must be a checkpoint; got no such file; check the path",
    ),
    case(
        "plan to be measured without a GPU",
        "plan run.toml",
        "run.device: must be a GPU for plans that are measured; got a CPU; add --no-device for an"
        " estimate",
    ),
    case(
        "plan for no budget",
        "plan run.toml --no-device",
        "memory.budget: must be set where there is no device to ask; got nothing; set it, or add"
        " --budget 80GB,40GB",
    ),
    case(
        "plan for budgets that are no sizes",
        "plan run.toml --no-device --budget 80GB,40gb,",
        "--budget: must be a size such as '80GB' or '22GiB'; got '40gb'; correct it",
        "--budget: must be a size such as '80GB' or '22GiB'; got ''; correct it",
    ),
    case(
        "plan of a model without blocks",
        "plan run.toml --no-device --budget 8GB",
        "model: must have repeated blocks to choose for; the adapter names none; lower"
        " data.batch_size and raise step.accumulate to save memory",
        before=ONE_BLOCK,
    ),
    case(
        "plan of a model that is compiled whole",
        "plan run.toml --no-device --budget 8GB step.compile=model",
        "step.compile: must be 'blocks' or 'off' for a plan; got 'model', where no block is left to"
        " choose for; change it",
    ),
    case(
        "plan of a model that reads values",
        "plan run.toml --no-device --budget 8GB",
        "--no-device: model and loss must run on tensors without values; got"
        " DataDependentOutputException: aten._local_scalar_dense.default; plan on a GPU instead",
        before=replace("model.py", "return self.head(", "return x.sum().item() * self.head("),
    ),
    case(
        "plan for too little memory",
        "plan run.toml --no-device --budget 500MB",
        "500MB: memory.budget: no plan fits 0.00 GiB, even with every block recomputed; weights and"
        " gradients take 0.00 GiB, ...; the least peak is 0.00 GiB",
        "500MB: optim.moments: 'bf16' saves 0.00 GiB, '8bit' saves 0.00 GiB",
        "500MB: finetune: method = 'lora', or freezing what need not be trained, saves most",
    ),
    case(
        "a preset of an adapter without",
        "train run.toml optim.preset=guide",
        "run.toml: optim.preset: with the adapter 'python' must be absent, since it has none; got"
        " 'guide'",
    ),
    case(
        "a preset that is no text",
        "train run.toml optim.preset=3",
        "run.toml: optim.preset: must be text in quotes; got 3",
    ),
    case(
        "options of a report that there is not",
        "train run.toml evaluate.options.maps=[]",
        "evaluate.options: must be absent, since the adapter 'python' has no report; got maps;"
        " remove them",
    ),
    case(
        "statistics of a family without",
        "stats run.toml",
        "model.adapter: 'python' takes no statistics from data; use an adapter that does, such as"
        " 'aurora'",
    ),
]
