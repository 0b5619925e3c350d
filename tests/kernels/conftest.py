import os

import pytest
import torch

# Triton reads it when a kernel is decorated, so it must be set before fastft_kernels is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastft_kernels.device import interpret_on_cpu

ON_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not ON_GPU:
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def kernels_for_real():
    """The real kernels, on the GPU or through the interpreter, with NaN in every fresh tensor."""
    if not ON_GPU:
        interpret_on_cpu(True)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    interpret_on_cpu(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")
