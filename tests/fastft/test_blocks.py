"""Ways to run a block: the same numbers from each, what each computes again, and graphs shared."""

from collections import Counter
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.blocks import COMPILED, EAGER, KEEP, RECOMPUTE, BlockForwards, Way, ways
from fastft.precision import make_precision
from fastft.task import Batch, Block, Loss, Task, repeated_blocks

CPU = torch.device("cpu")
FRUGAL = EAGER[1:]
WIDTH = 16


class Attention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = 0.1 if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(heads=2)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))).sin())


class Convolutions(nn.Module):
    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.norm(self.first(x))))


def mean_square(model: nn.Module, batch: Batch) -> Loss:
    return Loss(model(batch["inputs"]).float().square().mean())


def transformer() -> Task:
    model = nn.Sequential(nn.Linear(6, WIDTH), PreNorm(), PreNorm(), nn.Linear(WIDTH, 2))
    return Task(model, mean_square, repeated_blocks(model))


def vit() -> Task:
    """Its attention has no dropout, so that the CPU computes it by one fused operator."""
    model = VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=3,
        proj_drop_rate=0.1,
        drop_path_rate=0.1,
    )
    return Task(model, mean_square, repeated_blocks(model))


def convolutions(*, inplace: bool) -> Task:
    blocks = [Convolutions(inplace=inplace) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    return Task(model, mean_square, repeated_blocks(model))


INPUTS = {transformer: (3, 5, 6), vit: (2, 3, 16, 16)}


def make(build: Any, mode: str = "off", precision: str = "fp32", **options: Any):
    torch.manual_seed(0)
    task = build(**options)
    return task, BlockForwards(task, mode, make_precision(precision, CPU))


def loss_of(task: Task, shape: tuple[int, ...], precision: str = "fp32") -> Tensor:
    """The loss of one batch, with the same dropout at each call."""
    generator = torch.Generator().manual_seed(1)
    batch = Batch({"inputs": torch.randn(shape, generator=generator)}, shape[0])
    torch.manual_seed(2)
    with make_precision(precision, CPU).autocast():
        return task.loss(task.model, batch).total


def gradients(task: Task, shape: tuple[int, ...], precision: str = "fp32") -> dict[str, Tensor]:
    """Every parameter's gradient, and the loss."""
    task.model.zero_grad()
    loss = loss_of(task, shape, precision)
    loss.backward()
    found = {name: p.grad for name, p in task.model.named_parameters() if p.requires_grad}
    return {"": loss.detach(), **{n: g.clone() for n, g in found.items() if g is not None}}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("way", FRUGAL, ids=lambda way: way.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [transformer, vit])
def test_every_way_has_the_bits_of_keeping_all(build: Any, precision: str, way: Way) -> None:
    task, forwards = make(build, precision=precision)
    expected = gradients(task, INPUTS[build], precision)
    forwards.use_everywhere(way)
    assert_same_bits(gradients(task, INPUTS[build], precision), expected)
    state = torch.get_rng_state()
    forwards.use_everywhere(KEEP)
    assert_same_bits(gradients(task, INPUTS[build], precision), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_block_may_go_its_own_way() -> None:
    task, forwards = make(transformer)
    expected = gradients(task, INPUTS[transformer])
    forwards.use({"1": "keep matmuls", "2": "recompute pointwise"})
    assert forwards.chosen == {"1": "keep matmuls", "2": "recompute pointwise"}
    forwards.use({"2": "recompute all"})
    assert forwards.chosen == {"1": "keep matmuls", "2": "recompute all"}
    assert_same_bits(gradients(task, INPUTS[transformer]), expected)


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def run_again(build: Any, way: Way) -> set[str]:
    """The operators that a backward runs more often than one whose forward kept everything."""
    counts = []
    for chosen in (way, KEEP):
        task, forwards = make(build)
        forwards.use_everywhere(chosen)
        loss = loss_of(task, INPUTS[build])
        with Operators() as operators:
            loss.backward()
        counts.append(operators.count)
    return set(counts[0] - counts[1])


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("build", "way", "again", "kept"),
    [
        (
            vit,
            "recompute pointwise",
            {"gelu", "bernoulli_"},
            {"addmm", ATTENTION, "native_layer_norm"},
        ),
        (
            vit,
            "recompute pointwise, attention",
            {"gelu", ATTENTION},
            {"addmm", "native_layer_norm"},
        ),
        (vit, "keep matmuls", {"gelu", ATTENTION, "native_layer_norm"}, {"addmm"}),
        (vit, "recompute all", {"gelu", ATTENTION, "native_layer_norm", "addmm"}, set()),
        (
            transformer,
            "recompute pointwise",
            {"gelu", "bernoulli_"},
            {"addmm", "bmm", "native_layer_norm", "_safe_softmax"},
        ),
        (
            transformer,
            "keep matmuls",
            {"gelu", "native_layer_norm", "_safe_softmax"},
            {"addmm", "bmm", "mm"},
        ),
        (transformer, "recompute all", {"gelu", "native_layer_norm", "addmm", "bmm"}, set()),
    ],
    ids=lambda value: getattr(value, "__name__", value) if not isinstance(value, set) else "",
)
def test_what_is_computed_again(build: Any, way: str, again: set[str], kept: set[str]) -> None:
    found = run_again(build, next(w for w in EAGER if w.name == way))
    assert again - found == set()
    assert kept & found == set()


def test_keeping_all_is_the_forward_that_was_there() -> None:
    task, forwards = make(transformer)
    before = [block.module.forward for block in task.blocks]
    forwards.use_everywhere(RECOMPUTE)
    forwards.use_everywhere(KEEP)
    assert [block.module.forward for block in task.blocks] == before
    assert run_again(transformer, KEEP) == set()


@pytest.mark.parametrize("mode", ["off", "blocks"])
def test_names_stay_and_forwards_are_made_once(mode: str) -> None:
    task, forwards = make(transformer, mode)
    names = [name for name, _ in task.model.named_parameters()]
    keys = list(task.model.state_dict())
    made = {}
    for way in ways(mode):
        forwards.use_everywhere(way)
        made[way] = [block.module.forward for block in task.blocks]
        assert [name for name, _ in task.model.named_parameters()] == names
        assert list(task.model.state_dict()) == keys
    for way in reversed(ways(mode)):
        forwards.use_everywhere(way)
        assert [block.module.forward for block in task.blocks] == made[way]
    assert len({str(id(forward)) for found in made.values() for forward in found}) == 2 * len(made)


class Talkative(nn.Module):
    """Takes and returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[Any] = []

    def forward(self, x, shape, *, mask=None, scale=1.0, deep=None):
        self.seen.append((torch.is_grad_enabled(), self.training, shape, mask is None, scale))
        y = self.linear(x).tanh() * scale
        if mask is not None:
            y = y.masked_fill(mask, 0)
        if deep is not None:
            y = y + deep["more"][0]
        return {"y": y.reshape(shape), "shape": shape}, y.mean()


def talkative(way: Way) -> tuple[Talkative, BlockForwards]:
    torch.manual_seed(0)
    module = Talkative()
    task = Task(nn.Sequential(module), mean_square, (Block("0", module),))
    forwards = BlockForwards(task, "off", make_precision("fp32", CPU))
    forwards.use_everywhere(way)
    return module, forwards


@pytest.mark.parametrize("way", EAGER, ids=lambda way: way.name)
def test_arguments_and_results_of_every_kind(way: Way) -> None:
    results = []
    for chosen in (KEEP, way):
        module, _ = talkative(chosen)
        x, deep = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
        mask = torch.rand(2, 4) < 0.3
        found, mean = module(x, (4, 2), mask=mask, scale=2.0, deep={"more": [deep, None]})
        (found["y"].sum() + mean).backward()
        results.append([found["y"], mean, x.grad, deep.grad, module.linear.weight.grad])
        assert found["shape"] == (4, 2)
        assert module.seen[0] == (True, True, (4, 2), False, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("way", EAGER, ids=lambda way: way.name)
def test_without_gradients_and_in_eval_mode(way: Way) -> None:
    module, _ = talkative(way)
    module.eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        found, mean = module(x, (8,))
    assert module.seen == [(False, False, (8,), True, 1.0)]
    assert not found["y"].requires_grad
    assert not mean.requires_grad
    torch.testing.assert_close(found["y"], module.linear(x).tanh().flatten())
    found, _ = module(x, (8,))
    found["y"].sum().backward()
    # Nothing is run again in training mode by a backward of evaluation mode.
    assert not any(training for _, training, *_ in module.seen)


def statistics_after_a_step(way: Way, *, inplace: bool) -> dict[str, Tensor]:
    task, forwards = make(convolutions, inplace=inplace)
    forwards.use_everywhere(way)
    gradients(task, (4, 3, 8, 8))
    return dict(task.model.named_buffers())


@pytest.mark.parametrize("way", FRUGAL, ids=lambda way: way.name)
def test_running_statistics_move_once(way: Way) -> None:
    expected = statistics_after_a_step(KEEP, inplace=False)
    assert_same_bits(statistics_after_a_step(way, inplace=False), expected)


IN_PLACE = pytest.mark.xfail(strict=True, reason="torch refuses to reuse a norm changed in place")


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[IN_PLACE] if "pointwise" in way.name else [], id=way.name)
        for way in FRUGAL
    ],
)
def test_blocks_that_work_in_place(way: Way) -> None:
    task, forwards = make(convolutions, inplace=True)
    expected = gradients(task, (4, 3, 8, 8))
    forwards.use_everywhere(way)
    assert_same_bits(gradients(task, (4, 3, 8, 8)), expected)


def mlps() -> Task:
    """Three alike, and one of another width, trained; then one that is frozen."""
    blocks = [Mlp(8), Mlp(8), Mlp(8), nn.Linear(8, 6), Mlp(6), Mlp(6).requires_grad_(False)]
    model = nn.Sequential(nn.Linear(4, 8), *blocks, nn.Linear(6, 1))
    return Task(model, mean_square, repeated_blocks(model))


def graphs() -> int:
    """Graphs that Dynamo has made so far."""
    return counters["stats"]["unique_graphs"]


def kept_bytes(task: Task, shape: tuple[int, ...]) -> int:
    """Of the tensors that a forward saves for its backward, without parameters."""
    storages: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in task.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(task, shape)
    assert loss.requires_grad
    return sum(storages.values())


def test_compiled_ways() -> None:
    """In one test, since each graph takes Inductor a second or more on a CPU."""
    shape = (32, 4)
    torch._dynamo.reset()
    counters.clear()
    task, _ = make(mlps)
    eager = gradients(task, shape)
    task, forwards = make(mlps, "blocks")
    kept = {}
    for number, way in enumerate((KEEP, COMPILED[3])):
        forwards.use_everywhere(way)
        torch.testing.assert_close(gradients(task, shape), eager)
        # A graph for each distinct block, and a way's graphs are its own.
        assert graphs() == 3 * (number + 1)
        kept[way] = kept_bytes(task, shape)
    assert kept[COMPILED[3]] < 0.8 * kept[KEEP]
    for way in (RECOMPUTE, KEEP, COMPILED[3], RECOMPUTE):
        forwards.use_everywhere(way)
        torch.testing.assert_close(gradients(task, shape), eager)
        assert graphs() == 6
