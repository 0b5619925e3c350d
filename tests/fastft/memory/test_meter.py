"""Times on a GPU."""

import time

import pytest
import torch

from fastft.memory.meter import DeviceMeter

pytestmark = pytest.mark.gpu


def test_a_call_takes_what_its_device_takes_where_the_host_is_ahead() -> None:
    device = torch.device("cuda", 0)
    x = torch.ones(1 << 20, device=device)

    def call() -> None:
        # The host takes 20 ms, the device some microseconds.
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            pass
        x.add_(1)

    meter = DeviceMeter(device)
    call()
    assert meter.seconds(call, 3, host_ahead=True) < meter.seconds(call, 3) / 2
