"""The commands, as they are typed: what they print, write and return."""

import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from fastft import __version__
from fastft.cli import main

pytestmark = pytest.mark.usefixtures("project")

LAST = Path("run/checkpoints/step-00000002")


def files() -> set[str]:
    return {str(f) for f in Path().rglob("*") if f.is_file() and "__pycache__" not in f.parts}


def evaluation() -> dict[str, float]:
    return json.loads(Path("run/evaluation-validation.json").read_text())["values"]


def test_dry_run_shows_the_tables_and_writes_nothing(fastft: Callable[..., Any]) -> None:
    assert fastft("train", "run.toml", "run.folder=first").code == 0
    weights = "model.checkpoint=first/checkpoints/step-00000002/model.safetensors"
    before = files()
    dry = fastft("train", "run.toml", "--dry-run", weights, "finetune.freeze=['stem.*']")
    assert (dry.code, dry.errors) == (0, "")
    assert "100.00% of the values" in dry.output
    rows = [re.findall(r"[^\s│]+", line) for line in dry.output.splitlines()]
    assert ["default", "6", "171", "0.01", "0"] in rows
    assert ["frozen", "2", "40", "-", "-"] in rows
    assert "step 1" not in dry.output
    assert files() == before


def test_train_evaluate_export_show(fastft: Callable[..., Any]) -> None:
    trained = fastft("train", "run.toml", "log.tensorboard=true", "log.every_steps=1")
    assert (trained.code, trained.errors) == (0, "")
    lines = trained.output.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    number = r"[\d.e+-]+"
    values = rf"loss {number}  grad {number}  [\d,]+ samples/s  {number} GiB  eta 0:00:00"
    assert re.fullmatch(rf"step 1/2  {values}", steps[0])
    assert re.fullmatch(rf"step 2/2  {values}", steps[1])
    assert re.fullmatch(rf"step 2: validation  loss {number}", steps[2])
    assert lines[-3:] == [
        f"checkpoint: {LAST}",
        f"best checkpoint: {LAST}",
        "logs: tensorboard --logdir run",
    ]
    assert list(Path("run/tensorboard").glob("events*"))

    evaluated = fastft("evaluate", "run.toml", "evaluate.metrics=[{name='accuracy'}]")
    assert (evaluated.code, evaluated.errors) == (0, "")
    assert evaluated.output.startswith("step-00000002 on validation data (16 samples)\n")
    assert 0 <= evaluation()["accuracy"] <= 1
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert evaluation()["loss"] == records[-1]["validation/loss"]

    exported = fastft("export", "run.toml", "--to", "out/weights.safetensors")
    assert (exported.code, exported.errors) == (0, "")
    assert exported.output == "step-00000002 -> out/weights.safetensors\n"
    again = fastft("evaluate", "run.toml", "--checkpoint", "out/weights.safetensors")
    assert again.output.count("out/weights.safetensors on validation data") == 1
    assert evaluation() == {"loss": records[-1]["validation/loss"]}

    for path, text in (("out/weights.safetensors", "safetensors"), ("run", "metric loss")):
        shown = fastft("show", path)
        assert (shown.code, shown.errors) == (0, "")
        assert shown.output.startswith(f"{path}\n")
        assert text in shown.output
        assert re.search(r"parameters +│ 211 ", shown.output)


def test_output_that_is_no_terminal_is_plain_lines(fastft: Callable[..., Any]) -> None:
    output = fastft("train", "run.toml", "run.steps=20").output
    output += fastft("evaluate", "run.toml").output
    assert not re.search(r"[\x1b\r\b]", output)
    assert len([line for line in output.splitlines() if line.startswith("step 10/20  ")]) == 1


def test_evaluate_names_a_split_and_a_checkpoint(fastft: Callable[..., Any]) -> None:
    settings = ("data.test=[{path='train.npz'}]", "checkpoint.every_steps=1", "run.steps=2")
    assert fastft("train", "run.toml", *settings).code == 0
    outcome = fastft("evaluate", "run.toml", *settings, "--split", "test", "--checkpoint", "latest")
    assert "step-00000002 on test data (40 samples)" in outcome.output
    record = json.loads(Path("run/evaluation-test.json").read_text())
    assert (record["checkpoint"], record["samples"]) == ("step-00000002", 40)
    first = "run/checkpoints/step-00000001"
    assert "step-00000001" in fastft("evaluate", "run.toml", "--checkpoint", first).output


def test_check_counts_the_samples_and_shows_warnings(fastft: Callable[..., Any]) -> None:
    outcome = fastft("check", "run.toml")
    assert outcome.output.splitlines() == [
        "train.npz (train): 40 samples",
        "validation.npz (validation): 16 samples",
    ]
    arrays = dict(np.load("train.npz"))
    arrays["inputs"][3] = 0
    np.savez("train.npz", **arrays)
    outcome = fastft("check", "run.toml")
    assert (outcome.code, outcome.errors) == (0, "")
    assert "constant" in outcome.output
    assert not Path("run").exists()


def test_schema_is_json(fastft: Callable[..., Any]) -> None:
    outcome = fastft("schema")
    assert (outcome.code, outcome.errors) == (0, "")
    assert set(json.loads(outcome.output)["required"]) == {"run", "model", "data", "optim"}


def test_overrides_may_follow_options(fastft: Callable[..., Any]) -> None:
    assert fastft("train", "run.toml", "run.steps=1", "--dry-run", "optim.lr=0.5").code == 0
    steps = ("run.steps=1", "loss.terms.0.label_smoothing=0.1", "data.train.0.name=mine")
    assert fastft("train", "run.toml", *steps).code == 0
    assert fastft("train", "run.toml", *steps[1:], "--resume", "run.steps=3").code == 0
    resolved = tomllib.loads(Path("run/run.toml").read_text())
    assert resolved["loss"]["terms"][0]["label_smoothing"] == 0.1
    assert resolved["data"]["train"][0]["name"] == "mine"
    assert resolved["run"]["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "the following arguments are required: RUN.toml\n"),
        (["train", "run.toml", "--dryrun"], "unrecognized arguments: --dryrun"),
        (["show", "a.pt", "b.pt"], "unrecognized arguments: b.pt"),
        (["export", "run.toml"], "the following arguments are required: --to"),
        (["trian", "run.toml"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, text in (("--version", __version__), ("--help", "exit codes:")):
        with pytest.raises(SystemExit) as caught:
            main([option])
        assert caught.value.code == 0
        assert text in capsys.readouterr().out


def test_code_of_the_users_own_that_fails_keeps_its_traceback() -> None:
    Path("model.py").write_text("def build():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        main(["train", "run.toml"])


def test_training_stops_by_its_own_policy(fastft: Callable[..., Any]) -> None:
    text = Path("model.py").read_text()
    Path("model.py").write_text(
        text.replace("return self.head(", "return (x.sum() * 0 + float('nan')) * self.head(")
    )
    settings = ("run.steps=50", "gradients.stop_after=3", "log.every_steps=1")
    outcome = fastft("train", "run.toml", *settings)
    assert outcome.code == 3
    assert "gradients.stop_after" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert "step 3/50" in outcome.output
    assert "step 5/50" not in outcome.output


def test_ctrl_c_before_training_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, fastft: Callable[..., Any]
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastft.cli.read_run_file", interrupted)
    outcome = fastft("train", "run.toml")
    assert (outcome.code, outcome.errors) == (130, "fastft: interrupted\n")


def test_a_signal_finishes_the_step_and_resume_finishes_the_run(
    fastft: Callable[..., Any],
) -> None:
    text = Path("model.py").read_text()
    slow = text.replace(
        "def forward(self, x):\n        return self",
        "def forward(self, x):\n        time.sleep(0.05)\n        return self",
    )
    assert slow != text
    Path("model.py").write_text("import time\n\n" + slow)
    settings = ("run.steps=100", "log.every_steps=1", "data.validation=[]")
    command = [sys.executable, "-m", "fastft.cli", "train", "run.toml", *settings]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 2/100"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    found = re.fullmatch(
        r"fastft: SIGTERM: stopped after step (\d+) of 100 and saved it; the same command with"
        r" --resume goes on from there\n",
        errors,
    )
    assert found, errors
    done = int(found[1])
    assert Path(f"run/checkpoints/step-{done:08d}/meta.json").is_file()

    Path("model.py").write_text(text)
    outcome = fastft("train", "run.toml", *settings, "--resume")
    assert (outcome.code, outcome.errors) == (0, "")
    assert Path("run/checkpoints/step-00000100").is_dir()
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 101))


VIT = {"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
TIMM = (
    "model.adapter=timm",
    "model.options={name='vit_tiny_patch16_224',num_classes=3,img_size=16,in_chans=1}",
    *(f"model.options.arguments.{name}={value}" for name, value in VIT.items()),
    "data.train.0.path=images.npz",
    "data.validation.0.path=more_images.npz",
)


def write_images() -> None:
    random = np.random.default_rng(0)
    for name in ("images.npz", "more_images.npz"):
        inputs = random.normal(size=(16, 1, 16, 16)).astype(np.float32)
        np.savez(name, inputs=inputs, targets=np.arange(16) % 3)


def open_with_timm(path: str = "") -> torch.nn.Module:
    arguments: dict[str, Any] = {"num_classes": 3, "img_size": 16, "in_chans": 1, **VIT}
    return timm.create_model("vit_tiny_patch16_224", checkpoint_path=path, **arguments).eval()


@pytest.mark.parametrize("added", [(), ("ema.decay=0.5",), ("step.layer_norm=fused",)], ids=str)
def test_timm_opens_what_was_exported(added: tuple[str, ...], fastft: Callable[..., Any]) -> None:
    write_images()
    settings = (*TIMM, *added)
    trained = fastft("train", "run.toml", *settings)
    assert (trained.code, trained.errors) == (0, "")
    said = "fused layer norm: 5 swapped, 0 kept" in trained.output.splitlines()
    assert said == ("step.layer_norm=fused" in added)
    assert fastft("export", "run.toml", *settings, "--to", "out.safetensors").code == 0

    expected = open_with_timm()
    saved = LAST / ("ema.safetensors" if "ema.decay=0.5" in added else "model.safetensors")
    expected.load_state_dict(safetensors.torch.load_file(saved))
    images = torch.from_numpy(np.load("images.npz")["inputs"])
    with torch.no_grad():
        assert torch.equal(open_with_timm("out.safetensors")(images), expected(images))


def test_evaluate_computes_as_training_did(fastft: Callable[..., Any]) -> None:
    write_images()
    settings = (*TIMM, "step.layer_norm=fused")
    assert fastft("train", "run.toml", *settings).code == 0
    assert fastft("evaluate", "run.toml", *settings).code == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert evaluation()["loss"] == records[-1]["validation/loss"]


def test_low_rank_updates_are_merged_into_the_export(fastft: Callable[..., Any]) -> None:
    write_images()
    settings = (*TIMM, "finetune.method=lora", "finetune.lora.targets=['*.qkv']", "run.steps=5")
    assert fastft("train", "run.toml", *settings).code == 0
    assert fastft("evaluate", "run.toml", *settings).code == 0
    loss = evaluation()["loss"]
    assert fastft("export", "run.toml", *settings, "--to", "out.safetensors").code == 0
    open_with_timm("out.safetensors")
    merged = fastft("evaluate", "run.toml", *settings, "--checkpoint", "out.safetensors")
    assert (merged.code, merged.errors) == (0, "")
    assert evaluation()["loss"] == pytest.approx(loss, rel=1e-5)


def test_new_heads_start_anew_without_a_checkpoint_too(fastft: Callable[..., Any]) -> None:
    heads = "finetune.new_heads={head={init='zero'}}"
    assert fastft("train", "run.toml", "run.steps=1", "optim.lr=1e-30", heads).code == 0
    state = safetensors.torch.load_file("run/checkpoints/step-00000001/model.safetensors")
    assert not state["head.weight"].round(decimals=6).any()
    assert state["stem.weight"].any()


def test_weights_in_another_memory_order_are_exported(fastft: Callable[..., Any]) -> None:
    text = Path("model.py").read_text()
    Path("model.py").write_text(
        text.replace("return Net(width, classes)", "net = Net(width, classes)\n    ")
        + "    net.stem.weight.data = net.stem.weight.data.T.contiguous().T\n    return net\n"
    )
    assert fastft("train", "run.toml").code == 0
    outcome = fastft("export", "run.toml", "--to", "out.safetensors")
    assert (outcome.code, outcome.errors) == (0, "")
    assert safetensors.torch.load_file("out.safetensors")["stem.weight"].shape == (8, 4)
    outcome = fastft("export", "run.toml", "--to", "out.pt")
    assert outcome.code == 2
    assert "--to: must end in .safetensors" in outcome.errors
    assert not Path("out.pt").exists()


def test_a_file_to_evaluate_must_hold_the_whole_model(fastft: Callable[..., Any]) -> None:
    assert fastft("train", "run.toml").code == 0
    state = safetensors.torch.load_file("run/checkpoints/step-00000002/model.safetensors")
    part = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    safetensors.torch.save_file(part, "part.safetensors")
    arguments = ["evaluate", "run.toml", "model.strict=false", "--checkpoint", "part.safetensors"]
    outcome = fastft(*arguments)
    assert outcome.code == 2
    assert "missing" in outcome.errors
