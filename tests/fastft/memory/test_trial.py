"""One block alone runs as its model calls it."""

import torch
from counted_blocks import CPU, WIDTH, make_batch, step_over
from torch import Tensor, nn

from fastft.blocks import KEEP, BlockForwards
from fastft.memory.measure import capture_calls
from fastft.memory.trial import Trial
from fastft.precision import make_precision


class States(nn.Module):
    """A block that notes autocast around it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.seen: list[tuple[bool, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return self.linear(x)


def test_a_block_alone_has_autocast_as_its_model_calls_it() -> None:
    """A compiled one would be compiled for each."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = States(), States(), States()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            with torch.autocast("cpu", torch.float16):
                x = self.second(x.float())
            with torch.autocast("cpu", enabled=False):
                return self.third(x.float())

    step = step_over(Around(), "first", "second", "third")
    step.precision = make_precision("bf16", CPU)
    forwards = BlockForwards(step.task, "off", step.precision)
    for name, call in capture_calls(step, make_batch()).items():
        block = forwards.blocks[name]
        Trial(forwards, block, KEEP.name, call).run_forward()
        assert isinstance(block.module, States)
        in_model, alone = block.module.seen
        assert in_model == alone, name
