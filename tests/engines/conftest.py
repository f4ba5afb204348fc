"""One node for all engine tests, and attachments that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lmpipe.engines import Attachment, attach
from lmpipe.testing import Node
from tests.engines.tiny import CHUNK

Attach = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and wait for each other where other processes are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """A node with a DRAM tier and chunks of `CHUNK` tokens."""
    with Node({"tiers": {"ssd": None}, "chunk_tokens": CHUNK}) as started:
        yield started


@pytest.fixture
def attached(node: Node, request: pytest.FixtureRequest) -> Iterator[Attach]:
    """`attached(model, **options)`: ready, apart from every other test, detached at the end."""
    opened: list[Attachment] = []

    def make(model: Any, **options: Any) -> Attachment:
        options.setdefault("cache_salt", request.node.nodeid)
        attachment = attach(model, node.run_dir, **options)
        opened.append(attachment)
        if attachment.producer is not None:
            assert attachment.producer.wait_ready(20), attachment.producer.reason
        return attachment

    yield make
    for attachment in opened:
        attachment.detach()
