import pytest
import torch
from fastft_kernels.row_schedule import (
    adaptive_schedule,
    backward_schedule,
    forward_schedule,
    programs_per_sample,
)

KIB = 1024


@pytest.mark.parametrize("samples", [1, 2, 16, 100, 133, 200, 256, 5000])
def test_programs_keep_the_gpu_busy(samples):
    at_once, tiles = 132, 4000
    count = programs_per_sample(at_once, samples, tiles)
    waves = -(-samples * count // at_once)
    busy = samples * tiles / at_once / (waves * -(-tiles // count))
    assert busy >= 0.9
    assert samples * count <= 17 * at_once or count == 1


def test_programs_never_outnumber_tiles():
    assert programs_per_sample(132, 16, 3) <= 3
    assert programs_per_sample(132, 7, 0) == 1


def test_long_rows_have_schedules_of_the_card(monkeypatch):
    def chosen(columns: int, weight_bytes: int = 4, *, alone: bool = True) -> tuple[int, ...]:
        cpu = torch.device("cpu")
        found = forward_schedule(columns, 10**6, weight_bytes, cpu, alone=alone)
        return found.rows, found.warps, found.chunk

    assert [chosen(n) for n in (8192, 16384)] == [(1, 8, 2048)] * 2
    assert chosen(8192, alone=False) == (1, 8, 2048)
    assert [chosen(n, 2) for n in (8192, 12288, 16384)] == [(2, 8, 0)] + [(1, 16, 0)] * 2
    monkeypatch.setattr("fastft_kernels.row_schedule.memory_bandwidth", lambda device: 3.4e12)
    assert [chosen(n) for n in (5000, 8192, 16384)] == [(1, 16, 2048)] * 2 + [(1, 16, 4096)]
    assert [chosen(n, alone=False) for n in (8192, 16384)] == [(1, 8, 0), (1, 16, 0)]
    assert [chosen(n, 2) for n in (8192, 12288, 16384)] == [(1, 8, 0), (1, 16, 0), (2, 16, 0)]


def test_long_rows_with_a_wide_modulation_share_it():
    def chosen(columns: int, modulation_bytes: int) -> int:
        cpu = torch.device("cpu")
        return adaptive_schedule(columns, 10**6, modulation_bytes, 4, cpu).programs_per_sm

    assert [chosen(4096, 4), chosen(5000, 4), chosen(5000, 2)] == [0, 16, 0]


# Of an H100, of an A100, and of smaller GPUs.
@pytest.mark.parametrize("shared", [227 * KIB, 163 * KIB, 99 * KIB, 64 * KIB])
@pytest.mark.parametrize("bytes_each", [4, 6, 8, 12])
def test_prefetch_fits_into_shared_memory(shared, bytes_each, monkeypatch):
    """Rows of one element too, where mean and rstd take as much as two float32 tiles."""
    monkeypatch.setattr("fastft_kernels.row_schedule.shared_memory_bytes", lambda device: shared)
    for columns in (2**n for n in range(15)):
        schedule = backward_schedule(columns, bytes_each, torch.device("cpu"))
        tile = schedule.rows * (columns * bytes_each + 4 + 4)
        assert (schedule.stages - 1) * tile * schedule.programs_per_sm <= shared
