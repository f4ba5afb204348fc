"""Tests with a real vLLM, which has an environment of its own (`make test-vllm`); elsewhere none of them is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter

from lmpipe.bench import vllm_models


def _installed() -> bool:
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None  # without an origin it is this directory


INSTALLED = _installed()
collect_ignore_glob = [] if INSTALLED else ["*.py"]


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    if not INSTALLED:
        terminalreporter.write_line("tests/vllm: not run, there is no vLLM here; `make test-vllm` runs them")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One group of KV cache."""
    return vllm_models.write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def plain(llama: Path) -> Iterator[Any]:
    """An engine without any cache, in a process of its own: what the tokens should be."""
    from processes import EngineProcess  # noqa: PLC0415  there may be no vLLM

    with EngineProcess(llama, enable_prefix_caching=False) as engine:
        yield engine


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups, whose tensors share their bytes."""
    return vllm_models.write_hybrid(tmp_path_factory.mktemp("models") / "hybrid")


@pytest.fixture(scope="session")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One latent a token."""
    return vllm_models.write_mla(tmp_path_factory.mktemp("models") / "mla")


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for `llama`."""
    return vllm_models.write_lora(tmp_path_factory.mktemp("models") / "lora")
