"""Faults that every process has which a test of a module starts after asking for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from io_faults import IoFaults, NoCompiler

from lmpipe.failpoints import VARIABLE, Control


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IoFaults]:
    """Calls on files and clocks that fail."""
    try:
        faults = IoFaults(tmp_path_factory.mktemp("faults"))
    except NoCompiler as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in faults.environment.items():
            patch.setenv(name, value)
        yield faults


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    """Rules for failpoints."""
    control = Control(tmp_path_factory.mktemp("rules") / "rules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(control.path))
        yield control
