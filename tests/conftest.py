"""What all tests share: the kernels' interpreter, and no GPU tests without a GPU."""

import os

import pytest
import torch

# Triton reads it when it is first imported, which any test that compiles does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# As the command line sets it; read when torch first allocates.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
