"""What each method trains, freezing, low-rank adaptation, train and eval modes."""

import pytest
import torch
from torch import nn

from fastft.config import FinetuneConfig, LoraConfig, NewHead, Unfreeze
from fastft.errors import ConfigError
from fastft.finetune import apply_method, merge_lora, set_train_mode, staged_names, unfreeze
from fastft.names import load_state_dict, named_parameters, state_dict
from fastft.task import Batch, Loss, Task


def no_loss(model: nn.Module, batch: Batch) -> Loss:
    raise NotImplementedError


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        # A name that peft uses too.
        self.base_layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.base_layer(self.drop(self.bn(self.conv(x))).mean((2, 3)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(4, 2)
        self.old_head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


def make_task() -> Task:
    torch.manual_seed(0)
    return Task(model=Net(), loss=no_loss, heads=("head",))


def encoder_of(task: Task) -> Encoder:
    assert isinstance(task.model, Net)
    return task.model.encoder


def frozen(*patterns: str) -> FinetuneConfig:
    return FinetuneConfig(freeze=patterns)


def staged(*patterns: str) -> FinetuneConfig:
    return FinetuneConfig(unfreeze=(Unfreeze(at_step=3, match=patterns),))


def of_types(kind: str) -> FinetuneConfig:
    return FinetuneConfig(freeze_types=(kind,))


def trained(task: Task) -> set[str]:
    return {name for name, p in named_parameters(task.model) if p.requires_grad}


ALL = {name for name, _ in named_parameters(make_task().model)}
HEAD = {"head.weight", "head.bias"}
OLD_HEAD = {"old_head.weight", "old_head.bias"}
CONV = {"encoder.conv.weight", "encoder.conv.bias"}
BN = {"encoder.bn.weight", "encoder.bn.bias"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FinetuneConfig(), ALL),
        (frozen("encoder.conv.*"), ALL - CONV),
        (of_types("BatchNorm2d"), ALL - BN),
        (of_types("_BatchNorm"), ALL - BN),
        (of_types("Encoder"), HEAD | OLD_HEAD),
        (FinetuneConfig(method="heads", heads=("old_head",)), OLD_HEAD),
        (FinetuneConfig(method="heads"), HEAD),
        (FinetuneConfig(method="probe"), HEAD),
        (FinetuneConfig(method="probe", new_heads={"head": NewHead()}), HEAD),
        (staged("encoder.*"), HEAD | OLD_HEAD),
    ],
)
def test_what_is_trained(config: FinetuneConfig, expected: set[str]) -> None:
    task = make_task()
    apply_method(task, config)
    assert trained(task) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (frozen("encodr.*"), "finetune.freeze: 'encodr.*' must match a parameter"),
        (of_types("BatchNorm1d"), "did you mean 'BatchNorm2d'"),
        (FinetuneConfig(method="heads", heads=("haed",)), "finetune.heads: 'haed' .*'head'"),
        (frozen("*"), "must leave something to train"),
        (staged("x"), "finetune.unfreeze.0.match"),
        (
            FinetuneConfig(method="lora", lora=LoraConfig(targets=("attn*",))),
            "finetune.lora.targets",
        ),
    ],
)
def test_names_that_are_not_there(config: FinetuneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_method(make_task(), config)


def test_globs_that_match_nothing_are_listed_together() -> None:
    config = FinetuneConfig(freeze=("a", "b"), unfreeze=(Unfreeze(at_step=1, match=("c",)),))
    with pytest.raises(ConfigError) as caught:
        apply_method(make_task(), config)
    assert len(caught.value.problems) == 3


def test_stages_unfreeze_when_their_step_comes() -> None:
    task = make_task()
    stages = (
        Unfreeze(at_step=5, match=("encoder.*",)),
        Unfreeze(at_step=2, match=("encoder.bn.*",)),
    )
    config = FinetuneConfig(unfreeze=stages)
    apply_method(task, config)
    staged = staged_names(task.model, config)
    assert unfreeze(task.model, staged, 1) == []
    assert set(unfreeze(task.model, staged, 2)) == BN
    assert unfreeze(task.model, staged, 4) == []
    assert len(unfreeze(task.model, staged, 5)) == 4
    assert trained(task) == ALL


def test_frozen_batch_norm_stands_still_and_trained_batch_norm_moves() -> None:
    images = torch.randn(8, 1, 5, 5)
    for config, moves in ((of_types("BatchNorm2d"), False), (FinetuneConfig(), True)):
        task = make_task()
        apply_method(task, config)
        set_train_mode(task.model, config.method)
        mean = encoder_of(task).bn.running_mean
        assert mean is not None
        before = mean.clone()
        task.model(images)
        assert torch.equal(before, mean) is not moves


def test_a_probed_encoder_drops_nothing() -> None:
    task = make_task()
    apply_method(task, FinetuneConfig(method="probe"))
    set_train_mode(task.model, "probe")
    assert not encoder_of(task).drop.training
    assert task.model.get_submodule("head").training


def test_a_batch_norm_without_parameters_follows_the_module_that_holds_it() -> None:
    linear, norm = nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)
    model = nn.Sequential(nn.Sequential(linear, norm), nn.Linear(2, 2))
    linear.requires_grad_(False)
    set_train_mode(model, "full")
    assert not norm.training
    linear.requires_grad_(True)
    set_train_mode(model, "full")
    assert norm.training


def test_lora_starts_as_the_identity_trains_little_and_merges() -> None:
    images = torch.randn(4, 1, 5, 5)
    plain = make_task().model.eval()
    expected = plain(images)
    task = make_task()
    apply_method(
        task,
        FinetuneConfig(method="lora", new_heads={"head": NewHead()}, lora=LoraConfig(rank=2)),
    )
    model = task.model.eval()
    torch.testing.assert_close(model(images), expected)
    assert {n for n in trained(task) if "lora_" not in n} == HEAD
    assert "encoder.conv.weight" in state_dict(model)
    assert "encoder.base_layer.weight" in state_dict(model)
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            if "lora_B" in name:
                parameter.normal_()
    adapted = model(images)
    assert not torch.allclose(adapted, expected)
    merge_lora(model)
    torch.testing.assert_close(model(images), adapted, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_state_of_an_adapted_model_round_trips_by_clean_names() -> None:
    config = FinetuneConfig(method="lora", lora=LoraConfig(targets=("encoder.base_layer",)))
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        task = Task(model=Net(), loss=no_loss)
        apply_method(task, config)
        models.append(task.model)
    load_state_dict(models[1], state_dict(models[0]), where="test")
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_probed_encoder_drops_nothing_at_the_root_either() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    set_train_mode(model, "probe")
    assert not model[1].training
    assert model[2].training
    set_train_mode(model, "full")
    assert model[1].training


def test_lora_leaves_out_what_attention_would_not_call() -> None:
    """Trained, evaluated and exported, the model is one function."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    task = Task(model=nn.Sequential(layer, nn.Linear(8, 2)), loss=no_loss)
    apply_method(task, FinetuneConfig(method="lora", lora=LoraConfig(rank=2)))
    names = [name for name, p in named_parameters(task.model) if p.requires_grad]
    assert any("linear1.lora_A" in name for name in names)
    assert not any("out_proj" in name for name in names)
    with torch.no_grad():
        for name, parameter in named_parameters(task.model):
            if "lora_B" in name:
                parameter.normal_()
    inputs = torch.randn(3, 5, 8)
    trained = task.model.train()(inputs)
    with torch.no_grad():
        torch.testing.assert_close(task.model.eval()(inputs), trained)
        merge_lora(task.model)
        torch.testing.assert_close(task.model.eval()(inputs), trained, rtol=1e-4, atol=1e-5)


def test_complex_parameters_are_not_frozen_in_silence() -> None:
    model = nn.Linear(2, 2)
    model.spectral = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
    task = Task(model=model, loss=no_loss)
    with pytest.raises(ConfigError, match=r"cannot train complex parameters; got 'spectral'"):
        apply_method(task, FinetuneConfig())
    apply_method(task, frozen("spectral"))
    assert trained(task) == {"weight", "bias"}


def test_only_low_rank_updates_are_trained_whatever_the_names() -> None:
    model = nn.ModuleDict({"flora_embed": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    lora = LoraConfig(targets=("body",))
    task = Task(model=model, loss=no_loss)
    apply_method(task, FinetuneConfig(method="lora", lora=lora))
    assert {n.split(".")[0] for n, p in named_parameters(model) if p.requires_grad} == {"body"}
