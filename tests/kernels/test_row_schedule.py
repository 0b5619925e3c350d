import pytest
from fastft_kernels.row_schedule import programs_per_sample


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
