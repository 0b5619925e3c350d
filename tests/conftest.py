"""What all tests share: threads, the kernels' interpreter, and no GPU tests without a GPU."""

import gc
import os

import pytest

# One thread in each process of tests, and in those that tests start; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton reads it when it is first imported, which any test that compiles does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# As the command line sets it; read when torch first allocates.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@pytest.fixture(autouse=True, scope="module")
def young_heap() -> None:
    """What earlier tests left is not searched for garbage again. Measuring searches often, which
    took most of the time of its tests; one search for each module took a sixth of the suite's."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` starts: two processes; none where there is a GPU, as tests want its memory."""
    return 0 if torch.cuda.is_available() else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
