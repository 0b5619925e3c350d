"""Encoder and decoder in chunks of patches: what they give whole, in one graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft.adapters.aurora.patches import chunk_count, in_chunks
from fastft.blocks import KEEP, RECOMPUTE, BlockForwards
from fastft.precision import make_precision
from fastft.task import Batch, Task

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "levels": {"arguments": {"level_condition": [500, 850], "separate_perceiver": ["q"]}},
}


@pytest.mark.parametrize(
    ("patches", "most", "count"),
    [
        (64800, 4096, 16),
        (45000, 4096, 12),
        (32, 4096, 1),
        (32, 32, 1),
        (32, 31, 2),
        (9797, 4096, 3),
    ],
)
def test_numbers_of_chunks(patches: int, most: int, count: int) -> None:
    assert chunk_count(patches, most) == count
    assert -(-patches // count) <= most


@pytest.mark.parametrize(("patches", "lengths"), [(6, [3, 3]), (7, [3, 3, 3]), (3, [3])])
def test_chunks_are_equally_long(patches: int, lengths: list[int]) -> None:
    seen: list[int] = []

    def run(part: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(part.shape[2])
        return 2 * part, part[:, :1].square()

    x = torch.arange(2.0 * 5 * patches * 4).view(2, 5, patches, 4).requires_grad_()
    doubled, squares = in_chunks(run, x, 6)
    assert seen == lengths
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(squares, x[:, :1].square())
    doubled.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))  # type: ignore[arg-type]


def outcome(task: Task, batch: Batch) -> dict[str, Any]:
    """Loss, predictions and gradients."""
    task.model.zero_grad()
    with torch.no_grad():
        predictions = task.loss(task.model, batch).predictions
    loss = task.loss(task.model, batch).total
    loss.backward()
    gradients = {f"gradient of {n}": p.grad for n, p in task.model.named_parameters()}
    return {"loss": loss.detach(), **predictions, **gradients}


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, expected in theirs.items():
        # A product of fewer rows may be summed in another order.
        error = (ours[name] - expected).norm()
        assert error <= 1e-5 * expected.norm() + 1e-9, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_give_what_the_whole_gives(
    variant: str, make_adapter: Any, build: Any, make_samples: Any
) -> None:
    found = []
    # 35 patches of each of two samples: one chunk, and two, with a patch too many.
    for most in (70, 36):
        adapter = make_adapter(**VARIANTS[variant], chunk_patches=most)
        task, sizes = build(adapter), []
        for module in (task.model.encoder.level_agg, task.model.decoder.patches):
            module.register_forward_pre_hook(
                lambda module, inputs, sizes=sizes: sizes.append(inputs[0].shape)
            )
        samples = make_samples(adapter, grid=(20, 28))
        found.append(outcome(task, Batch(adapter.collate(samples), 2)))
        assert len(sizes) == (4 if most == 70 else 8)
        assert len(set(sizes)) == 2
    assert_close(found[1], found[0])


def test_compiled_chunks(make_adapter: Any, build: Any, make_samples: Any) -> None:
    adapter = make_adapter(chunk_patches=16)
    batch = Batch(adapter.collate(make_samples(adapter)), 2)
    expected = outcome(build(adapter), batch)
    task = build(adapter)
    forwards = BlockForwards(task, "blocks", make_precision("fp32", torch.device("cpu")))
    torch._dynamo.reset()
    for way in (KEEP, RECOMPUTE):
        forwards.use(dict.fromkeys(("encoder.level_agg", "decoder"), way.name))
        assert_close(outcome(task, batch), expected)


def captured(module: nn.Module, *inputs: Any) -> tuple[Any, list[int]]:
    """What a compiled module gives, and how many rows of samples its linear maps take."""
    rows: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        called = [n for n in graph.graph.nodes if n.target is nn.functional.linear]
        rows.extend(len(node.args[0].meta["example_value"]) for node in called)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)(*inputs), rows


@pytest.mark.parametrize("history", [1, 2])
def test_a_patch_embedding_is_one_product(history: int, make_adapter: Any, build: Any) -> None:
    embedding = build(make_adapter()).model.encoder.atmos_token_embeds
    x, names = torch.randn(3, 2, history, 8, 16), ("q", "t")
    found, rows = captured(embedding, x, names)
    assert rows == [3]
    torch.testing.assert_close(found, embedding(x, names))


def test_queries_are_computed_for_one_patch(make_adapter: Any, build: Any) -> None:
    perceiver = build(make_adapter()).model.encoder.level_agg
    x, latents = torch.randn(5, 2, 16), torch.randn(3, 16).expand(5, -1, -1)
    found, rows = captured(perceiver, latents, x)
    assert min(rows) == rows[0] == 1
    torch.testing.assert_close(found, perceiver(latents, x))
    assert captured(perceiver, latents.contiguous(), x)[1][0] == 5


def test_so_they_are_in_the_decoder(make_adapter: Any, build: Any) -> None:
    decoder = build(make_adapter()).model.decoder.patches
    inputs = torch.randn(2, 4, 5, 32), torch.randn(2, 32), ("2t",), ("t", "q"), (500, 850)
    found, rows = captured(decoder, *inputs)
    # Head of the surface, levels, queries, keys and values, and so on; two samples of five patches.
    assert rows[:4] == [2, 2, 1, 10]
    for ours, theirs in zip(found, decoder(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
