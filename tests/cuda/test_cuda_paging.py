"""Raw pages to payloads and back, against the native copier, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_pages import Engine, layouts, on_host

from lmpipe import native
from lmpipe.cuda import paging
from lmpipe.cuda.pages import DevicePages
from lmpipe.layout import KVLayout

POOL_PAGES, CHUNKS, PAGES = 11, 3, 3
ODD = {
    f"{nbytes} bytes": KVLayout(2, 1, 1, "uint8", 1, ("layer", "kv"), ("opaque",), opaque_page_bytes=nbytes)
    for nbytes in (1, 2, 3, 4, 6, 7, 8, 16, 48, 250, 4096, 16_388, 20_000)
}
LAYOUTS = {
    **layouts("bfloat16"),
    **ODD,
    "MLA": KVLayout(3, 1, 576, "bfloat16", 4, ("layer",), ("kv", "token", "head", "dim"), kv=1),
    "K and V in one page, HND": KVLayout(2, 2, 40, "float8_e4m3fn", 4, ("layer",), ("kv", "head", "token", "dim")),
    "all in one page, layers first": KVLayout(3, 2, 24, "float32", 2, (), ("layer", "kv", "token", "head", "dim")),
    "kv outermost": KVLayout(3, 2, 16, "float16", 4, ("kv", "layer"), ("token", "head", "dim")),
}


class Pool:
    """An engine's pages on a device, and the same bytes on the host."""

    def __init__(self, layout: KVLayout, device: torch.device, *, gap: int = 0) -> None:
        shape = (layout.plane_count, POOL_PAGES, layout.page_bytes + gap)
        self.host = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        self.memory = torch.from_numpy(self.host.copy()).to(device)
        self.pages = DevicePages.of(layout, [plane[:, : layout.page_bytes] for plane in self.memory])
        self.page_bytes = layout.page_bytes

    def expected(self, page_ids: np.ndarray, planes: range) -> np.ndarray:
        """Payloads `[chunks, bytes]` of the host's pages; zeros where there is none."""
        chunks = self.host[planes.start : planes.stop, page_ids, : self.page_bytes]
        chunks[:, page_ids < 0] = 0
        size = len(planes) * page_ids.shape[1] * self.page_bytes
        return chunks.transpose(1, 0, 2, 3).reshape(len(page_ids), size)

    def written(self, page_ids: np.ndarray, planes: range, payloads: np.ndarray) -> np.ndarray:
        """All memory after a scatter."""
        after = self.host.copy()
        rows = payloads.reshape(len(page_ids), len(planes), page_ids.shape[1], self.page_bytes)
        for chunk, page in zip(*np.nonzero(page_ids >= 0), strict=True):
            after[planes.start : planes.stop, page_ids[chunk, page], : self.page_bytes] = rows[chunk, :, page]
        return after


def some_ids(chunks: int = CHUNKS, pages: int = PAGES) -> np.ndarray:
    """Of distinct pages, in random order."""
    order = np.random.default_rng(1).permutation(POOL_PAGES)[: chunks * pages]
    return order.astype(np.int32).reshape(chunks, pages)


def check(pool: Pool, page_ids: np.ndarray, planes: range, programs: int = 5, *, offset: int = 0, gap: int = 0) -> None:
    """Both ways. The payloads lie `offset` bytes after an aligned address, `gap` bytes between them."""
    device, nbytes = pool.pages.device, len(planes) * page_ids.shape[1] * pool.page_bytes
    memory = torch.full((offset + len(page_ids) * (nbytes + gap),), 0xA5, dtype=torch.uint8, device=device)
    whole = memory[offset:].view(len(page_ids), nbytes + gap)
    ids = pool.pages.ids(page_ids)
    paging.gather(pool.pages, ids, whole[:, :nbytes], planes=planes, programs=programs)
    assert np.array_equal(whole[:, :nbytes].cpu().numpy(), pool.expected(page_ids, planes))
    assert bool((whole[:, nbytes:] == 0xA5).all()) and bool((memory[:offset] == 0xA5).all())
    payloads = np.random.default_rng(2).integers(0, 256, (len(page_ids), nbytes), np.uint8)
    whole[:, :nbytes].copy_(torch.from_numpy(payloads))
    paging.scatter(pool.pages, ids, whole[:, :nbytes], planes=planes, programs=programs)
    assert np.array_equal(pool.memory.cpu().numpy(), pool.written(page_ids, planes, payloads))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_all_layouts(kind: str, device: torch.device) -> None:
    layout = LAYOUTS[kind]
    check(Pool(layout, device), some_ids(), range(layout.plane_count))


@pytest.mark.parametrize("kind", ["NHD", "MLA", "250 bytes"])
def test_pages_that_are_not_there(kind: str, device: torch.device) -> None:
    """Of a chunk that begins in the middle, of the last one of a prompt, of one that is not wanted at all."""
    page_ids = some_ids()
    page_ids[0, 0] = page_ids[1, 2] = -1
    page_ids[2] = -1
    check(Pool(LAYOUTS[kind], device), page_ids, range(LAYOUTS[kind].plane_count))


@pytest.mark.parametrize("kind", ["dense", "MLA", "K and V in one page", "7 bytes"])
def test_one_layer_at_a_time(kind: str, device: torch.device) -> None:
    layout = LAYOUTS[kind]
    assert layout.layer_pieces > 1
    for layer in range(layout.layers):
        pool = Pool(layout, device)
        check(pool, some_ids(), pool.pages.layer(layer))


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("gap", [0, 3, 16])
def test_payloads_anywhere(offset: int, gap: int, device: torch.device) -> None:
    check(Pool(LAYOUTS["48 bytes"], device), some_ids(), range(4), offset=offset, gap=gap)


@pytest.mark.parametrize("gap", [1, 2, 4, 8])
def test_pages_with_gaps_between_them(gap: int, device: torch.device) -> None:
    check(Pool(LAYOUTS["NHD"], device, gap=gap), some_ids(), range(2))


@pytest.mark.parametrize("programs", [1, 2, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 11), (11, 1), (0, 3), (3, 0)])
def test_the_number_of_programs_and_pages_does_not_matter(
    programs: int, shape: tuple[int, int], device: torch.device
) -> None:
    check(Pool(LAYOUTS["HND"], device), some_ids(*shape), range(2), programs)


def test_the_native_copier_writes_the_same(device: torch.device) -> None:
    layout = LAYOUTS["K and V in one page"]
    pool, page_ids = Pool(layout, device), some_ids()
    planes = np.arange(layout.plane_count)
    on_cpu = native.PagePool(
        [native.Region(pool.host.reshape(-1).data)],
        np.zeros(len(planes), np.uint32),
        (planes * POOL_PAGES * layout.page_bytes).astype(np.uint64),
        np.full(len(planes), layout.page_bytes, np.uint64),
        np.full(len(planes), layout.page_bytes, np.uint64),
        POOL_PAGES,
    )
    size = layout.plane_count * PAGES * layout.page_bytes
    host = np.zeros((CHUNKS, size), np.uint8)
    offsets = (np.arange(CHUNKS) * size).astype(np.uint64)
    native.Copier(1).gather(on_cpu, page_ids, native.Region(host.reshape(-1).data), offsets)
    payloads = torch.zeros((CHUNKS, size), dtype=torch.uint8, device=device)
    paging.gather(pool.pages, pool.pages.ids(page_ids), payloads, programs=3)
    assert np.array_equal(payloads.cpu().numpy(), host)


def test_it_is_what_codecs_read(device: torch.device) -> None:
    """The payload that is gathered is the one that the engine's pages were filled with."""
    layout = LAYOUTS["HND"]
    size = layout.plane_count * PAGES * layout.page_bytes
    payload = np.random.default_rng(3).bytes(size)
    engine = Engine.of(layout, PAGES, device, payload)
    payloads = engine.buffer(size)
    paging.gather(engine.pages, engine.ids[None], payloads[None], programs=4)
    assert on_host(payloads) == payload


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    pool = Pool(LAYOUTS["dense"], device)
    ids, size = pool.pages.ids(some_ids()), 8 * PAGES * pool.page_bytes
    for shape in ((CHUNKS, size - 1), (CHUNKS + 1, size)):
        with pytest.raises(ValueError, match="payloads must be 3 rows"):
            paging.gather(pool.pages, ids, torch.zeros(shape, dtype=torch.uint8, device=device), programs=1)
    with pytest.raises(ValueError, match="payloads must be"):
        apart = torch.zeros((CHUNKS, 2 * size), dtype=torch.uint8, device=device)[:, ::2]
        paging.scatter(pool.pages, ids, apart, programs=1)
    for planes in (range(1, 9), range(0, 16, 2)):
        with pytest.raises(ValueError, match="consecutive ones of 8"):
            paging.scatter(
                pool.pages,
                ids,
                torch.zeros((CHUNKS, size), dtype=torch.uint8, device=device),
                planes=planes,
                programs=1,
            )
    for bad in (POOL_PAGES, -2):
        page_ids = some_ids()
        page_ids[1, 1] = bad
        with pytest.raises(ValueError, match="page ids must be -1 to 10"):
            pool.pages.ids(page_ids)
