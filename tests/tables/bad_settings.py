"""Mistakes in a run file: its form, the model, what is trained, the loss."""

from cases import NAMES, ONE_BLOCK, TIMM, TRAIN, append, case, replace, write

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
        "unknown form of moments",
        "train run.toml optim.moments=4bit",
        "run.toml: optim.moments: must be a known value; got '4bit'; did you mean '8bit'?",
    ),
    case(
        "fit without a wish",
        "train run.toml data.batch_size=fit",
        "run.toml: data: batch_size 'fit' needs samples_per_step; got none; set it",
    ),
    case(
        "fit on a CPU",
        "train run.toml data.batch_size=fit data.samples_per_step=16",
        "data.batch_size: 'fit' needs a GPU to fit into; this run is on a CPU; set a number",
    ),
    case(
        "samples that do not divide",
        "train run.toml data.samples_per_step=12",
        "run.toml: data: samples_per_step must be a multiple of batch_size; got 12 and 8; change"
        " one",
    ),
    case(
        "two ways to accumulate",
        "train run.toml data.samples_per_step=16 step.accumulate=2",
        "run.toml: step.accumulate: follows from data.samples_per_step; got 2; drop one of them",
    ),
    case(
        "plan of a size that is to be fitted",
        "plan run.toml data.batch_size=fit data.samples_per_step=16",
        "data.batch_size: must be a number for a plan; got 'fit'; set it, as data.batch_size=8"
        " behind the run file",
    ),
    case(
        "moments without Adam",
        "train run.toml optim.name=sgd optim.moments=bf16",
        "run.toml: optim: moments 'bf16' need adam or adamw; got sgd; drop them",
    ),
    case(
        "moments without kernels",
        "train run.toml optim.moments=8bit step.kernels=off",
        "run.toml: step.kernels: must be 'auto' for optim.moments = '8bit'; got 'off'; drop one of"
        " them",
    ),
    case(
        "ZClip without kernels",
        "train run.toml gradients.zclip={} step.kernels=off",
        "run.toml: step.kernels: must be 'auto' for gradients.zclip; got 'off'; drop one of them",
    ),
    case(
        "a mean that never moves",
        "train run.toml gradients.zclip.decay=1",
        "run.toml: gradients.zclip.decay: must be less than 1; got 1",
    ),
    case(
        "budget without a unit",
        "train run.toml memory.budget=80",
        "run.toml: memory.budget: must be text in quotes; got 80",
    ),
    case(
        "budget of no size",
        "train run.toml memory.budget='80'",
        "run.toml: memory.budget: must be a size such as '80GB' or '22GiB'; got '80'",
    ),
    case(
        "budget of nothing",
        "train run.toml memory.budget=0GB",
        "run.toml: memory.budget: must be a size such as '80GB' or '22GiB'; got '0GB'",
    ),
    case(
        "budget in an unknown unit",
        "train run.toml memory.budget=80gb",
        "run.toml: memory.budget: must be a size such as '80GB' or '22GiB'; got '80gb'",
    ),
    case(
        "budget in words",
        "train run.toml memory.budget=lots",
        "run.toml: memory.budget: must be a size such as '80GB' or '22GiB'; got 'lots'",
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
        "kernels for float64",
        "train run.toml optim.moments=8bit gradients.zclip={}",
        "optim.moments: '8bit' needs parameters that fastft's kernels take; some are float64; drop"
        " the setting",
        "gradients.zclip: needs parameters that fastft's kernels take; some are float64; drop the"
        " setting",
        before=replace("model.py", "return Net(width, classes)", "return Net(8, 3).double()"),
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
