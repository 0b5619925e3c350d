import pytest
import torch
from fastft_kernels.device import interpret_on_cpu

ON_GPU = torch.cuda.is_available()


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
