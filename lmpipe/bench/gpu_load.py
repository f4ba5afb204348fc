"""Pages of the built-in load on a GPU, as an engine has them there: gather reads them by IPC, loads are by kernels."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, contextmanager

import torch

from lmpipe.bench.load_pages import LoadPages
from lmpipe.cuda.arena import PinnedArena
from lmpipe.cuda.engine import EnginePages
from lmpipe.cuda.ipc import ExportedPages
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.runtime import Runtime, Stream
from lmpipe.cuda.transfers import Transfers
from lmpipe.layout import KVLayout
from lmpipe.spans import Spans


@contextmanager
def gpu_pages(runtime: Runtime, layout: KVLayout, pages: int, spans: Spans) -> Generator[LoadPages]:
    """In memory that torch allocates on a device.

    Raises:
        DeviceError: it cannot be exported.
    """
    there = torch.device("cuda", runtime.number)
    memory = torch.randint(256, (layout.plane_count, pages, layout.page_bytes), dtype=torch.uint8, device=there)
    with exported_pages(runtime, memory, layout, spans, lambda: torch.cuda.current_stream(there).cuda_stream) as made:
        yield made


@contextmanager
def exported_pages(
    runtime: Runtime, memory: torch.Tensor, layout: KVLayout, spans: Spans, stream: Callable[[], int]
) -> Generator[LoadPages]:
    """Pages in memory of a device that is there: uint8 `[planes, pages, page_bytes]`. `stream`: what writes them."""
    planes, page_bytes = list(memory), layout.page_bytes
    exported = ExportedPages(runtime, [plane.data_ptr() for plane in planes], page_bytes, page_bytes, memory.shape[1])
    with (
        closing(exported),
        closing(PinnedArena(runtime)) as arena,
        closing(Transfers(memory.device, spans=spans)) as transfers,
    ):
        loads = EnginePages(DevicePool(DevicePages.of(layout, planes), transfers), arena)
        yield LoadPages(loads, None, exported.source, lambda: exported.mark(Stream(stream())))
