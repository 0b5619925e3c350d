"""Numbers that kernels read from the host."""

import gc

import torch
from fastft_kernels.tensor_table import HostNumbers

CPU = torch.device("cpu")


def test_what_was_written_stays_while_kernels_may_read_it():
    numbers = HostNumbers(3, CPU)
    found = []
    for i in range(100):
        found.append(numbers.write([i, 0.5, -i]))
        # Half of the slots at the least.
        for earlier in range(max(0, i - 15), i + 1):
            assert found[earlier].tolist() == [earlier, 0.5, -earlier]
    assert len({x.data_ptr() for x in found}) == 32


def test_memory_is_used_again_and_never_given_back():
    # As many as no other test takes.
    first = HostNumbers(1001, CPU)
    before = {first.write([0.0] * 1001).data_ptr() for _ in range(32)}
    assert HostNumbers(1001, CPU).write([0.0] * 1001).data_ptr() not in before
    del first
    gc.collect()
    assert HostNumbers(1001, CPU).write([0.0] * 1001).data_ptr() in before


def test_a_default_device_changes_nothing():
    with torch.device("meta"):
        assert HostNumbers(77, CPU).write([2.0] * 77).tolist() == [2.0] * 77
