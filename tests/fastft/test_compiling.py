"""What varies within one compiled function."""

import importlib
from typing import Any, cast

import torch

from fastft.compiling import compiled
from fastft.precision import make_precision
from fastft.profiling.compiled import graph_count


def test_first_axes_vary_and_others_do_not() -> None:
    torch._dynamo.reset()

    def forward(pairs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (pairs["a"] * pairs["b"]).sum(0)

    function = compiled(
        forward, make_precision("fp32", torch.device("cpu")), "first", backend="eager"
    )
    before = graph_count()
    for rows, columns, graphs in ((5, 4, 1), (7, 4, 1), (9, 3, 2), (6, 3, 2), (8, 4, 2)):
        pairs = {name: torch.ones(rows, columns) for name in "ab"}
        assert function(pairs).tolist() == [rows] * columns
        assert graph_count() - before == graphs


def test_no_graph_for_large_sizes_alone() -> None:
    config = cast(Any, importlib.import_module("torch._inductor.config"))
    fuses = []

    def backend(graph: Any, inputs: Any) -> Any:
        fuses.append(config.triton.mix_order_reduction)
        return graph

    before = config.triton.mix_order_reduction
    for dynamic in ("first", True):
        torch._dynamo.reset()
        function = compiled(
            torch.sin, make_precision("fp32", torch.device("cpu")), dynamic, backend=backend
        )
        function(torch.ones(3, 2))
    assert fuses == [False, before]
    assert config.triton.mix_order_reduction == before
