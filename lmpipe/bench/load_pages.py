"""The pages of the built-in load (engine_load.py), wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np

from lmpipe.engines.paged import PagedEngine
from lmpipe.layout import KVLayout
from lmpipe.messages import DeviceSource
from lmpipe.producer.pools import Pool
from lmpipe.spans import Spans


@dataclass(frozen=True, slots=True)
class LoadPages:
    """The engine's pages, all free, and with numbers in them."""

    loads: Pool
    """What loads are copied to."""
    saves: Pool | None
    """What saves are copied from; None: gather reads them."""
    source: DeviceSource | None = None
    mark: Callable[[], object] = lambda: None
    """Called before a save."""


PagesOf = Callable[[KVLayout, int, Spans], AbstractContextManager[LoadPages]]
"""Makes so many pages."""


@contextmanager
def host_pages(layout: KVLayout, pages: int, _: Spans) -> Generator[LoadPages]:
    """In memory of this process."""
    with PagedEngine(layout, pages) as engine:
        engine.memory[:] = np.random.default_rng(9).integers(0, 255, engine.memory.shape[-1], np.uint8)
        yield LoadPages(engine.pool, engine.pool)
