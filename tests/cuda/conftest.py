"""The kernels run in Triton's interpreter on CPU tensors, or with `--gpu` (make test-gpu) on the card."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "multiproc"))  # the rig


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the kernels on a GPU, not in Triton's interpreter")


def _on_gpu(config: pytest.Config) -> bool:
    return bool(config.getoption("--gpu", default=False))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where pages lie."""
    if not _on_gpu(request.config):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here, or torch is built without CUDA")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def arithmetic_as_on_a_gpu() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of what IEEE 754 allows."""
    with np.errstate(all="ignore"):
        yield


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads it when it is imported, which the tests here are the first to do.
    if not _on_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"
