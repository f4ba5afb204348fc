"""A node for a file of tests, and engines on it; the engines are those of the tests with real processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "multiproc"))

from rig import DRAM_ONLY, Engine

from lmpipe.testing import Node


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """DRAM only; shared by a file's tests, which use prompts and tenants of their own."""
    with Node(DRAM_ONLY) as node:
        yield node


@pytest.fixture(params=["private", "mapped"])
def mapped(request: pytest.FixtureRequest) -> bool:
    """Whether the engine's pages are its own, or in a segment that gather reads."""
    return request.param == "mapped"


@pytest.fixture
def make_engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """Makes engines, each test's under a tenant of its own, and closes them."""
    made: list[Engine] = []

    def make(*, mapped: bool = False, **options: Any) -> Engine:
        options = {"tenant": request.node.nodeid, **options}
        made.append(Engine(node.run_dir, pages_in=node.directory if mapped else None, **options))
        assert made[-1].producer.state == "ready" or options.get("wait_s") == 0, made[-1].producer.reason
        return made[-1]

    yield make
    for engine in made:
        engine.close()
