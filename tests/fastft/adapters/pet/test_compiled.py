"""Energy and derivatives as one compiled block: the numbers and names of the eager one.

On a CPU, Inductor generates no code, which would take minutes: what Dynamo ('eager') or AOTAutograd
('aot_eager') has traced runs in torch's own operators.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from backpropagated import backpropagated
from waits import Waits

from fastft import blocks, compiling
from fastft.adapters.pet import PetAdapter
from fastft.adapters.pet.baseline import fit_baseline
from fastft.adapters.pet.fused import use_kernels
from fastft.config import DataSource, FinetuneConfig
from fastft.errors import ConfigError
from fastft.finetune import apply_method, set_train_mode
from fastft.precision import make_precision
from fastft.profiling.compiled import graph_count
from fastft.task import Batch, Task

CPU = torch.device("cpu")
ONE_LAYER = {"num_gnn_layers": 1}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Another backend than Inductor."""

    def use(name: Any) -> None:
        def compiled(*arguments: Any, **settings: Any) -> Any:
            return compiling.compiled(*arguments, **{**settings, "backend": name})

        monkeypatch.setattr(blocks, "compiled", compiled)

    return use


@pytest.fixture
def fitted(make_adapter: Any, build: Any, atoms_file: Path) -> Callable[..., Any]:
    """An adapter, its task with a fitted baseline, and batches of the file's structures."""

    def make(method: str = "full", **options: Any) -> tuple[PetAdapter, Task, list[Batch]]:
        hypers = {**ONE_LAYER, **options.pop("hypers", {})}
        adapter = make_adapter(dtype="float64", hypers=hypers, **options)
        task = build(adapter)
        data = adapter.dataset(DataSource(path=atoms_file, name="atoms"), "train")
        fit_baseline(task.model, "energy", data.samples)
        apply_method(task, FinetuneConfig(method=method))  # type: ignore[arg-type]
        set_train_mode(task.model, method)
        parts = (data.samples, data.samples[::2], data.samples[3:9])
        return adapter, task, [make_batch(adapter, part) for part in parts]

    return make


def make_batch(adapter: PetAdapter, samples: Any) -> Batch:
    made = [adapter.transform(sample, "validation") for sample in samples]
    return Batch(adapter.collate(made), len(made))


def outcome(task: Task, batch: Batch) -> dict[str, torch.Tensor]:
    loss, gradients = backpropagated(task, batch)
    return {"loss": loss.total.detach(), **loss.predictions, **gradients}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        largest = expected[name].nan_to_num().abs().max().item()
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=1e-8 * largest + 1e-14, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("backend", ["off", "eager"])
def test_attention_on_the_kernel_is_as_upstreams(
    fitted: Any, use_backend: Any, backend: str
) -> None:
    hypers = {"d_pet": 32, "d_node": 32, "num_attention_layers": 2}
    _, task, batches = fitted(stress=True, hypers=hypers)
    expected = [outcome(task, batch) for batch in batches]
    use_kernels(task.model)
    if backend != "off":
        use_backend(backend)
        blocks.compile_task(task, "blocks", make_precision("fp32", CPU))
    for batch, wanted in zip(batches, expected, strict=True):
        found = outcome(task, batch)
        # The path was taken.
        assert not torch.equal(found["forces"], wanted["forces"])
        assert_same(found, wanted)


@pytest.mark.parametrize(
    ("backend", "method", "options"),
    [
        ("aot_eager", "full", {"stress": True}),
        ("eager", "heads", {}),
        ("eager", "lora", {}),
        ("eager", "full", {"hypers": {"num_neighbors_adaptive": 4, "cutoff": 4.0}}),
    ],
    ids=["full", "heads", "lora", "adaptive"],
)
def test_one_graph_is_as_eager(
    fitted: Any, use_backend: Any, backend: str, method: str, options: dict[str, Any]
) -> None:
    """Losses, predictions and gradients for all sizes, in training and evaluation."""
    _, task, batches = fitted(method, **options)
    names = list(task.model.state_dict())
    expected = [outcome(task, batch) for batch in batches]
    use_backend(backend)
    settings = torch._dynamo.config.get_config_copy()
    blocks.compile_task(task, "blocks", make_precision("fp32", CPU))
    before = graph_count()
    for batch, wanted in zip(batches, expected, strict=True):
        assert_same(outcome(task, batch), wanted)
    task.model.eval()
    with torch.no_grad(), Waits() as waits:
        evaluated = task.loss(task.model, batches[0])
    assert waits.found == []
    assert not evaluated.total.requires_grad
    wanted = {name: expected[0][name] for name in evaluated.predictions}
    assert_same(dict(evaluated.predictions), wanted)
    assert graph_count() - before == 1
    assert list(task.model.state_dict()) == names
    # What PET's block needs of Dynamo, no other model in this process gets.
    for name in ("trace_autograd_ops", "specialize_float"):
        assert getattr(torch._dynamo.config, name) == settings[name]


def test_what_is_compiled_is_for_any_size_and_waits_for_nothing(
    fitted: Any, use_backend: Any
) -> None:
    """On a GPU torch's norm has a derivative for one number of atoms, and setting items one that
    copies from the host; on a CPU neither shows."""
    _, task, (batch, *_) = fitted(hypers={"normalization": "RMSNorm"})
    called: list[str] = []

    def backend(graph: Any, inputs: Any, **_: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    use_backend(backend)
    blocks.compile_task(task, "blocks", make_precision("fp32", CPU))
    outcome(task, batch)
    assert any("rsqrt" in name for name in called)
    assert not any(part in name for name in called for part in ("rms_norm", "setitem"))


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_graphs_of_an_epoch_of_mixed_sizes(
    make_adapter: Any, build: Any, use_backend: Any, tmp_path: Path, kernels: str
) -> None:
    """Molecules and crystals, 1 to 60 atoms with up to 58 neighbours, at random in batches of 8."""
    frames = [make_frame(seed) for seed in range(96)]
    ase.io.write(tmp_path / "mixed.xyz", frames, format="extxyz")
    adapter = make_adapter(hypers={**ONE_LAYER, "d_pet": 32, "d_node": 32})
    task = build(adapter)
    if kernels == "auto":
        use_kernels(task.model)
    data = adapter.dataset(DataSource(path=tmp_path / "mixed.xyz", name="mixed"), "train")
    fit_baseline(task.model, "energy", data.samples)
    use_backend("eager")
    blocks.compile_task(task, "blocks", make_precision("fp32", CPU))
    before, shapes = graph_count(), set()
    order = np.random.default_rng(0).permutation(96).reshape(-1, 8)
    for chosen in order:
        batch = make_batch(adapter, [data.samples[i] for i in chosen])
        shapes.add(tuple(batch["grid"].shape))
        outcome(task, batch)
    assert len(shapes) > 8
    assert graph_count() - before == len({width for _, width in shapes}) <= 6


def make_frame(seed: int) -> ase.Atoms:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 61))
    length = (count / random.uniform(0.05, 0.15)) ** (1 / 3)
    numbers, positions = random.choice([1, 6, 8], count), random.uniform(0, length, (count, 3))
    periodic = bool(seed % 2)
    frame = ase.Atoms(numbers, positions, cell=[length] * 3 if periodic else None, pbc=periodic)
    frame.info["energy"] = random.normal() * count
    frame.arrays["forces"] = random.normal(size=(count, 3))
    return frame


def test_a_run(fastft: Any, pet_run: str, use_backend: Any) -> None:
    """The command line's way through training, evaluation and export."""
    use_backend("eager")
    losses = {}
    for mode in ("off", "blocks"):
        settings = (f"run.folder={mode}", f"step.compile={mode}", "model.options.stress=false")
        outcome = fastft("train", pet_run, *settings)
        assert (outcome.errors, outcome.code) == ("", 0)
        assert fastft("evaluate", pet_run, *settings).code == 0
        lines = Path(mode, "metrics.jsonl").read_text().splitlines()
        losses[mode] = [
            float(line.split('"train/loss": ')[1].split(",")[0])
            for line in lines
            if "train/loss" in line
        ]
    assert losses["blocks"] == pytest.approx(losses["off"], rel=1e-5)


def test_the_model_as_a_whole_is_not_compiled(fitted: Any) -> None:
    _, task, _ = fitted()
    with pytest.raises(
        ConfigError, match=r"step\.compile: must be 'off' or 'blocks', since the loss"
    ):
        blocks.compile_task(task, "model", make_precision("fp32", CPU))


def test_more_places_change_nothing(fitted: Any, make_adapter: Any) -> None:
    """A structure beside one with many neighbours is as alone."""
    adapter, task, _ = fitted(stress=True)
    small, large = make_sample(3, 2.0), make_sample(40, 0.5)
    alone, beside = make_batch(adapter, [small]), make_batch(adapter, [small, large])
    assert alone["grid"].shape[1] < beside["grid"].shape[1]
    with torch.no_grad():
        wanted, found = (task.loss(task.model, batch).predictions for batch in (alone, beside))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name][: len(value)], value, rtol=1e-11, atol=1e-11)


def make_sample(count: int, spacing: float) -> dict[str, Any]:
    random = np.random.default_rng(count)
    cell = np.eye(3) * 8.0
    structure = {
        "species": random.choice([1, 6, 8], count),
        "positions": random.uniform(0, spacing * count ** (1 / 3) + 1, (count, 3)),
        "cell": cell,
        "pbc": np.ones(3, dtype=bool),
        "target": 0,
    }
    return {"structure": structure}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "heads", "lora"])
def test_a_gpu_compiles_it_and_waits_for_nothing(fitted: Any, method: str) -> None:
    _, task, batches = fitted(method, stress=True)
    device = torch.device("cuda")
    task.model.to(device)
    batches = [batch.to(device) for batch in batches]
    expected = [outcome(task, batch) for batch in batches]
    blocks.compile_task(task, "blocks", make_precision("fp32", device))
    outcome(task, batches[0])
    before = graph_count()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [outcome(task, batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Of all sizes.
    assert graph_count() == before
    for made, wanted in zip(found, expected, strict=True):
        assert_same(made, wanted)
