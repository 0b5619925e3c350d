"""What `fastft show` says of a checkpoint."""

from pathlib import Path

import torch
from torch import nn

from fastft.checkpoint import describe_checkpoint, save_checkpoint


def model() -> nn.Module:
    blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)))
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(4, 3)})


def test_a_foreign_file(tmp_path: Path):
    state = {f"module.{name}": t.bfloat16() for name, t in model().state_dict().items()}
    state["module.count"] = torch.tensor(3)
    torch.save({"state_dict": state, "ema": state}, tmp_path / "x.pt")
    description = describe_checkpoint(tmp_path / "x.pt")
    rows = dict(description.rows)
    assert description.title == str(tmp_path / "x.pt")
    assert rows["format"] == "torch"
    assert rows["file size"] == f"{(tmp_path / 'x.pt').stat().st_size:,} bytes"
    assert rows["weights under"] == "state_dict"
    assert rows["also tensors under"] == "ema"
    assert rows["tensors"] == "25"
    assert rows["parameters"] == f"{11 * 20 + 15 + 1}"
    assert rows["bytes of bfloat16"] == "470"
    assert rows["bytes of int64"] == "8"
    assert rows["prefix"].startswith("module.")
    assert rows["module blocks"] == "220 parameters"
    assert rows["likely head head"] == "[3, 4]"
    assert "likely head blocks.9" not in rows


def test_what_repeated_blocks_name_like_a_head_is_none(tmp_path: Path):
    layer = nn.ModuleDict({"fc": nn.Linear(4, 4), "output": nn.ModuleDict({"d": nn.Linear(4, 4)})})
    heads = nn.ModuleDict({"energy": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))})
    net = nn.ModuleDict(
        {"blocks": nn.ModuleList([layer]), "model": nn.ModuleDict({"heads": heads})}
    )
    torch.save(net.state_dict(), tmp_path / "x.pt")
    found = [name for name, _ in describe_checkpoint(tmp_path / "x.pt").rows if "head " in name]
    assert found == ["likely head model.heads.energy.0", "likely head model.heads.energy.1"]


def test_the_last_matrix_is_the_head_where_no_name_tells(tmp_path: Path):
    torch.save(nn.Sequential(*(nn.Linear(4, 4) for _ in range(11))).state_dict(), tmp_path / "x")
    assert "likely head 10" in dict(describe_checkpoint(tmp_path / "x").rows)


def test_a_fastft_folder(tmp_path: Path):
    meta = {"metrics": {"loss": 0.25}}
    save_checkpoint(tmp_path, 7, model().state_dict(), {}, meta)
    rows = dict(describe_checkpoint(tmp_path).rows)
    assert rows["format"] == "safetensors"
    assert rows["step"] == "7"
    assert rows["metric loss"] == "0.25"
    assert rows["version of torch"] == torch.__version__
    assert rows["file"].endswith("step-00000007/model.safetensors")
