"""One node for all tests of verbs that look at one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lmpipe.cli import main
from lmpipe.testing import Node

Lmpipe = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node({"tiers": {"ssd": None}}) as node:
        yield node


@pytest.fixture
def lmpipe(capsys: pytest.CaptureFixture[str]) -> Lmpipe:
    """Runs a command in this process: exit status, stdout, stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return run
