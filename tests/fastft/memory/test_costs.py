"""From what was measured to the costs of a step that the solver takes."""

import dataclasses

import pytest
from counted_blocks import (
    LINEAR,
    build,
)

from fastft.memory.measure import (
    Rest,
    assemble_costs,
)
from fastft.memory.solve import BlockCosts, Choice, StepCosts, peak_bytes, step_seconds

MEASURED = {
    "1": {"keep": Choice("keep", 60, 70, 30, 0.5), "redo": Choice("redo", 10, 70, 95, 0.75)},
    "2": {"keep": Choice("keep", 40, 50, 35, 0.5), "redo": Choice("redo", 20, 50, 85, 0.625)},
}
REST = Rest(
    fixed=1000,
    before=100,
    before_backward=40,
    tail=900,
    tail_gradients=LINEAR,
    other_gradients=LINEAR,
    peak=2100,
    seconds=4.0,
)


def test_the_costs_of_a_step() -> None:
    costs = assemble_costs(build().step, REST, MEASURED, 1)
    # The model's peak: 1000 and 100, 30 kept by the blocks, 900 of the tail.
    missed = 2100 - 2030
    assert costs == StepCosts(
        blocks=tuple(
            BlockCosts(name, tuple(choices.values()), LINEAR) for name, choices in MEASURED.items()
        ),
        fixed_bytes=1000 + missed,
        before_bytes=100,
        before_backward_bytes=40,
        tail_bytes=900,
        tail_gradient_bytes=LINEAR,
        update_bytes=LINEAR,
        other_seconds=4.0 - 0.75 - 0.625,
    )


def test_with_several_micro_batches_all_gradients_are_there_from_the_start() -> None:
    costs = assemble_costs(build("0").step, REST, MEASURED, 2)
    assert [block.gradient_bytes for block in costs.blocks] == [0, 0]
    assert (costs.tail_gradient_bytes, costs.update_bytes) == (0, 0)
    # Those of two blocks and the head; the stem is frozen.
    assert costs.fixed_bytes == 1000 + 3 * LINEAR + (2100 - 2030 - 3 * LINEAR)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("peak", [2100, 2030, 1900])
@pytest.mark.parametrize("frozen", [(), ("0",), ("0", "1")])
def test_the_model_agrees_with_the_rehearsal(
    micro_batches: int, peak: int, frozen: tuple[str, ...]
) -> None:
    rest = dataclasses.replace(REST, peak=peak)
    costs = assemble_costs(build(*frozen).step, rest, MEASURED, micro_batches)
    assert peak_bytes(costs, (1, 1)) == peak
    assert step_seconds(costs, (1, 1)) == pytest.approx(4.0)
    saved = micro_batches * (0.25 + 0.125)
    assert step_seconds(costs, (0, 0)) == pytest.approx(4.0 - saved)


def test_blocks_that_are_not_called_have_no_costs() -> None:
    costs = assemble_costs(build().step, REST, {"2": MEASURED["2"]}, 1)
    assert [block.name for block in costs.blocks] == ["2"]


def test_nothing_is_negative() -> None:
    rest = dataclasses.replace(REST, peak=500, seconds=0.1)
    costs = assemble_costs(build().step, rest, MEASURED, 1)
    assert costs.fixed_bytes == 0
    assert costs.other_seconds == 0


def test_what_is_behind_all_calls_but_the_last_is_there_when_the_backward_begins() -> None:
    rest = dataclasses.replace(REST, behind={"1": [50, 20], "2": [0, 0]})
    first, second = assemble_costs(build().step, rest, MEASURED, 1).blocks
    assert [choice.kept_bytes for choice in first.choices] == [60 + 70, 10 + 70]
    assert [choice.backward_bytes for choice in first.choices] == [30 - 20, 95 - 20]
    assert second.choices == tuple(MEASURED["2"].values())


def test_inputs_that_went_to_the_host_are_kept_by_other_ways() -> None:
    host = Choice("inputs on the host", 0, 70, 110, 1.0, host_bytes=10)
    measured = {**MEASURED, "1": {**MEASURED["1"], host.name: host}}
    rest = dataclasses.replace(REST, behind={"1": [-10], "2": [-5]})
    first, second = assemble_costs(build().step, rest, measured, 1).blocks
    assert [choice.kept_bytes for choice in first.choices] == [60, 10, 0]
    # Those of an earlier block are fetched while this one's backward runs; its own way counts them.
    assert [choice.backward_bytes for choice in first.choices] == [30 + 10, 95 + 10, 110]
    # There nothing waited on the host: an output that is gone.
    assert [choice.kept_bytes for choice in second.choices] == [40 - 5, 20 - 5]
