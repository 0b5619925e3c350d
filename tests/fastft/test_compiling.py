"""What varies within one compiled function, and what must not happen to it."""

import importlib
from typing import Any, cast

import pytest
import torch
from torch._functorch import config as functorch_config

from fastft.compiling import allow_graphs, compiled, recompile_limit_explained
from fastft.errors import ConfigError
from fastft.precision import make_precision
from fastft.profiling.compiled import graph_count

CPU = torch.device("cpu")


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


def test_the_backward_of_what_left_autocast_leaves_it_too() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(16, 16)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ weight

    precision = make_precision("bf16", CPU)
    # Other tests may have set it already.
    with cast(Any, functorch_config).patch(backward_pass_autocast="same_as_forward"):
        function = compiled(forward, precision, backend="aot_eager")
        with precision.autocast():
            output = function(x)
        (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(1).expand(4, 16))


def test_compiling_again_and_again_is_an_error() -> None:
    torch._dynamo.reset()
    dynamo = cast(Any, importlib.import_module("torch._dynamo.config"))
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    with dynamo.patch({name: getattr(dynamo, name) for name in names}):
        dynamo.fail_on_recompile_limit_hit = False
        allow_graphs(1)
        dynamo.recompile_limit = 2
        # As a whole model, which may leave its graph.
        precision = make_precision("fp32", CPU)
        function = compiled(torch.sin, precision, fullgraph=False, backend="eager")
        for dimensions in (1, 2):
            function(torch.ones((2,) * dimensions))
        with (
            pytest.raises(ConfigError, match=r"^step.compile: .* 2 graphs .* 'off'"),
            recompile_limit_explained(),
        ):
            function(torch.ones(2, 2, 2))
    with pytest.raises(KeyError), recompile_limit_explained():
        raise KeyError
