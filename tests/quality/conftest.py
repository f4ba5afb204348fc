"""The tiny model in memory and as a directory, and a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import TEXT_BYTES, tiny

from lmpipe.quality.subject import Subject


@pytest.fixture(scope="session")
def subject() -> Subject:
    return Subject.of("tiny", tiny(), torch.bfloat16)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(256, (TEXT_BYTES,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as Hugging Face keeps it, in bfloat16, without a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny().bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, ids: torch.Tensor) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.bin"
    path.write_bytes(bytes(ids.tolist()))
    return path
