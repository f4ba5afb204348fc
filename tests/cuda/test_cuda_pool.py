"""Transfers between pages and the host: every cut, every order that streams allow, encoded or not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from deferred_lanes import DeferredDevice
from engine_pages import layouts, numbers, source_of

from lmpipe.codecs import CODECS
from lmpipe.codecs.header import HEADER_BYTES
from lmpipe.cuda.coding import ON_DEVICE, Coder
from lmpipe.cuda.lanes import Lane, lane_of
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.pieces import cut
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.transfers import Transfers
from lmpipe.errors import CannotEncode
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

POOL_PAGES, CHUNKS, PAGES = 12, 5, 2
KINDS = layouts("bfloat16")
LAYOUT = KVLayout.paged(2, 1, 32, "bfloat16", 4)
SEEDS = range(2)
LANES = ["at once", *SEEDS]
"""As `lane_of` makes them (on a GPU streams), or deferred, by seed."""

Lanes = Callable[[torch.device, int], Lane]


def lanes_of(which: str | int) -> Lanes:
    """One of LANES."""
    return lane_of if which == "at once" else DeferredDevice(int(which)).lane


class Engine:
    """Pages on a device, the same on the host, and memory for chunks."""

    def __init__(
        self, layout: KVLayout, device: torch.device, lanes: Lanes = lane_of, content: bytes = b"", **sizes: int
    ) -> None:
        if device.type == "cuda" and lanes is not lane_of:
            pytest.skip("deferred lanes are of the host")
        self.layout, self.device = layout, device
        self.page_ids = np.random.default_rng(1).permutation(POOL_PAGES)[: CHUNKS * PAGES].astype(np.int32)
        self.page_ids = self.page_ids.reshape(CHUNKS, PAGES)
        self.nbytes = layout.plane_count * PAGES * layout.page_bytes
        shape = (layout.plane_count, POOL_PAGES, layout.page_bytes)
        host = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        if content:
            for chunk in range(CHUNKS):
                payload = np.frombuffer(content[chunk * self.nbytes : (chunk + 1) * self.nbytes], np.uint8)
                host[:, self.page_ids[chunk]] = payload.reshape(layout.plane_count, PAGES, -1)
        self.memory = torch.from_numpy(host).to(device)
        self.transfers = Transfers(device, programs=3, lanes=lanes, **sizes)
        self.pool = DevicePool(DevicePages.of(layout, list(self.memory)), self.transfers)

    def payload(self, chunk: int) -> bytes:
        """What the chunk's pages hold now."""
        return self.memory[:, self.page_ids[chunk].tolist()].cpu().numpy().tobytes()

    def settle(self) -> None:
        """Wait for what the test itself did to the pages: a pool's lanes do not, unless they are told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def hosts(self, nbytes: int = 0) -> list[torch.Tensor]:
        """Memory for every chunk."""
        pinned = self.device.type == "cuda"
        size = nbytes or self.nbytes
        return [torch.full((size,), 0xA5, dtype=torch.uint8, pin_memory=pinned) for _ in range(CHUNKS)]


def fill(engine: Engine, value: int) -> None:
    """Every byte of the pages."""
    engine.memory.fill_(value)


def contents(hosts: list[torch.Tensor]) -> list[bytes]:
    """Of chunks on the host."""
    return [host.numpy().tobytes() for host in hosts]


@pytest.mark.parametrize("limit", [64, 100, 192, 500, 6 * 64, 2 * 6 * 64 + 1, 10_000])
@pytest.mark.parametrize("planes", [range(2), range(1, 2), range(3)])
def test_pieces_cover_everything_once_and_fit(limit: int, planes: range) -> None:
    covered = np.zeros((CHUNKS, 3, PAGES, 64), np.uint8)
    for piece in cut(CHUNKS, planes, PAGES, 64, limit):
        assert 0 < piece.nbytes * len(piece.chunks) <= limit
        for chunk in piece.chunks:
            part = covered[chunk].reshape(-1)[piece.at : piece.at + piece.nbytes]
            part += 1
        whole = covered[np.ix_(piece.chunks, piece.planes, piece.pages)]
        assert whole.shape[1] * whole.shape[2] * 64 == piece.nbytes and (whole == 1).all()
    assert (covered[:, planes.start : planes.stop] == 1).all()
    assert covered.sum() == CHUNKS * len(planes) * PAGES * 64


def test_a_page_that_fits_no_piece() -> None:
    with pytest.raises(ValueError, match="65 bytes does not fit"):
        list(cut(1, range(1), 1, 65, 64))


@pytest.mark.parametrize(
    ("kind", "pages_of_a_piece", "lanes"),
    [*((kind, pages, "at once") for kind in KINDS for pages in (4, 1000)), *(("NHD", 1, seed) for seed in SEEDS)],
)
def test_saved_and_loaded(kind: str, pages_of_a_piece: int, lanes: str | int, device: torch.device) -> None:
    layout = KINDS[kind]
    piece_bytes = pages_of_a_piece * layout.page_bytes
    engine = Engine(layout, device, lanes_of(lanes), piece_bytes=piece_bytes, staging_bytes=piece_bytes)
    before, hosts = [engine.payload(chunk) for chunk in range(CHUNKS)], engine.hosts()
    engine.pool.save_into(engine.page_ids, hosts).synchronize()
    assert contents(hosts) == before
    turned = hosts[::-1]
    engine.pool.load_from(engine.page_ids, turned).synchronize()
    assert [engine.payload(chunk) for chunk in range(CHUNKS)] == before[::-1]
    engine.transfers.close()


@pytest.mark.parametrize("lanes", LANES)
def test_pages_that_are_not_there(lanes: str | int, device: torch.device) -> None:
    engine = Engine(LAYOUT, device, lanes_of(lanes), piece_bytes=2 * LAYOUT.page_bytes)
    ids, before, hosts = engine.page_ids.copy(), engine.memory.clone(), engine.hosts()
    ids[0, 0] = ids[-1, -1] = -1
    engine.settle()
    engine.pool.save_into(ids, hosts).synchronize()
    pages = [host.view(LAYOUT.plane_count, PAGES, -1) for host in hosts]
    assert not pages[0][:, 0].any() and not pages[-1][:, -1].any()
    for host in hosts:
        host.fill_(7)
    engine.pool.load_from(ids, hosts).synchronize()
    loaded = ids[ids >= 0].tolist()
    others = np.setdiff1d(np.arange(POOL_PAGES), loaded).tolist()
    assert bool((engine.memory[:, loaded] == 7).all()) and torch.equal(engine.memory[:, others], before[:, others])


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("kind", ["K and V in one page", "all in one page"])
def test_layer_by_layer(kind: str, lanes: str | int, device: torch.device) -> None:
    """When a layer's event has come its pages are there; those of later ones need not be."""
    layout = KINDS[kind]
    engine = Engine(layout, device, lanes_of(lanes), piece_bytes=2 * layout.page_bytes)
    hosts = engine.hosts()
    engine.pool.save_into(engine.page_ids, hosts).synchronize()
    wanted = engine.memory.clone()
    engine.memory.zero_()
    engine.settle()
    events = engine.pool.load_layers(engine.page_ids, hosts)
    assert len(events) == layout.layer_pieces
    taken, each = engine.page_ids.ravel().tolist(), layout.plane_count // layout.layer_pieces
    for layer, event in enumerate(events):
        event.synchronize()
        there = engine.memory[: (layer + 1) * each, taken]
        assert torch.equal(there, wanted[: (layer + 1) * each, taken])


def test_in_and_out_of_inference_mode(device: torch.device) -> None:
    """Engines run in it; their other threads, which save and load, do not."""
    with torch.inference_mode():
        engine = Engine(LAYOUT, device)
        hosts = engine.hosts()
        engine.pool.save_into(engine.page_ids, hosts).synchronize()
    before, more = contents(hosts), [memoryview(bytearray(engine.nbytes)) for _ in hosts]
    engine.pool.load_from(engine.page_ids, hosts).synchronize()
    engine.pool.save_into(engine.page_ids, more).synchronize()
    assert [bytes(host) for host in more] == before
    engine.transfers.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_begins_before_the_event_it_is_to_wait_for(seed: int, device: torch.device) -> None:
    """The engine computes pages, they are saved, it computes others there, and what was saved is loaded again."""
    gpu = DeferredDevice(seed)
    engine = Engine(LAYOUT, device, gpu.lane, piece_bytes=2 * LAYOUT.page_bytes)
    computing, hosts = gpu.lane(device, 0), engine.hosts()
    computing.run(lambda: fill(engine, 1))
    saved = engine.pool.save_into(engine.page_ids, hosts, computing.record())
    computing.wait(saved)
    computing.run(lambda: fill(engine, 2))
    loaded = engine.pool.load_from(engine.page_ids, hosts, computing.record())
    assert not loaded.query() and engine.memory.max() > 2, "nothing was done yet"
    loaded.synchronize()
    assert all(bool((host == 1).all()) for host in hosts)
    taken = engine.page_ids.ravel().tolist()
    assert bool((engine.memory[:, taken] == 1).all())
    assert {lane.priority for lane in gpu.lanes} == {0, -1}


def test_streams_wait_for_the_engine_s(device: torch.device) -> None:
    """The same on CUDA's own streams, the engine being slow."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    engine = Engine(LAYOUT, device, piece_bytes=2 * LAYOUT.page_bytes)
    hosts, computed, overwritten = engine.hosts(), torch.cuda.Event(), torch.cuda.Event()
    engine.settle()
    torch.cuda._sleep(100_000_000)
    fill(engine, 1)
    computed.record()
    saved = engine.pool.save_into(engine.page_ids, hosts, computed)
    assert isinstance(saved, torch.cuda.Event) and not saved.query()
    torch.cuda.current_stream().wait_event(saved)
    fill(engine, 2)
    overwritten.record()
    engine.pool.load_from(engine.page_ids, hosts, overwritten).synchronize()
    assert all(bool((host == 1).all()) for host in hosts)
    assert bool((engine.memory[:, engine.page_ids.ravel().tolist()] == 1).all())


def test_staging_memory_is_bounded_and_used_again(device: torch.device) -> None:
    gpu = DeferredDevice(0)
    piece_bytes = 4 * LAYOUT.page_bytes
    engine = Engine(LAYOUT, device, gpu.lane, piece_bytes=piece_bytes)
    for _ in range(3):
        engine.pool.save_into(engine.page_ids, engine.hosts()).synchronize()
        engine.pool.load_from(engine.page_ids, engine.hosts()).synchronize()
    other = DevicePool(DevicePages.of(LAYOUT, list(engine.memory.clone())), engine.transfers)
    hosts = engine.hosts()
    other.save_into(engine.page_ids, hosts).synchronize()
    assert contents(hosts) == [engine.payload(chunk) for chunk in range(CHUNKS)]
    assert gpu.asked == [piece_bytes] * 4
    engine.transfers.close()


@pytest.mark.parametrize("lanes", LANES)
def test_both_directions_at_once(lanes: str | int, device: torch.device) -> None:
    engine = Engine(LAYOUT, device, lanes_of(lanes), piece_bytes=LAYOUT.page_bytes)
    before, out, into = engine.payload(0) + engine.payload(1), engine.hosts()[:2], engine.hosts()[:2]
    both = [engine.pool.save_into(engine.page_ids[:2], out), engine.pool.load_from(engine.page_ids[2:4], into)]
    for event in both:
        event.synchronize()
    assert b"".join(contents(out)) == before
    assert engine.payload(2) == engine.payload(3) == b"\xa5" * engine.nbytes


def coder_of(codec: Codec, layout: KVLayout) -> Coder:
    """As the host's codecs are by default; `adaptive` with a table."""
    table = bytes([3, 4, 8] * layout.layers * layout.kv * layout.kv_heads)[
        : layout.layers * layout.kv * layout.kv_heads
    ]
    return Coder(codec, table=table if codec == Codec.ADAPTIVE else b"")


def model_numbers(layout: KVLayout) -> bytes:
    """Of all chunks, as models have them."""
    return b"".join(numbers(layout, PAGES, seed) for seed in range(CHUNKS))


def encoded(layout: KVLayout) -> list[bytes]:
    """All chunks of `model_numbers`, by the host's `split`."""
    chunks = []
    for seed in range(CHUNKS):
        raw = numbers(layout, PAGES, seed)
        dst = memoryview(bytearray(CODECS[Codec.SPLIT].bound(len(raw))))
        chunks.append(bytes(dst[: CODECS[Codec.SPLIT].encode(memoryview(raw), dst, source_of(layout, PAGES))]))
    return chunks


@pytest.mark.parametrize("lanes", ["at once", 0])
@pytest.mark.parametrize("codec", sorted(ON_DEVICE))
def test_encoded_and_decoded(codec: Codec, lanes: str | int, device: torch.device) -> None:
    """As the host encodes them, and back to what the host decodes."""
    content = model_numbers(LAYOUT)
    engine = Engine(LAYOUT, device, lanes_of(lanes), content, piece_bytes=2 * 6 * LAYOUT.page_bytes)
    hosts = engine.hosts()
    lengths = engine.pool.encode_into(coder_of(codec, LAYOUT), engine.page_ids, hosts, range(CHUNKS)).lengths()
    stored = [content[:length] for content, length in zip(contents(hosts), lengths, strict=True)]
    decoded = []
    for chunk, one in enumerate(stored):
        raw = content[chunk * engine.nbytes : (chunk + 1) * engine.nbytes]
        if codec != Codec.ADAPTIVE:
            dst = memoryview(bytearray(CODECS[codec].bound(len(raw))))
            expected = bytes(dst[: CODECS[codec].encode(memoryview(raw), dst, source_of(LAYOUT, PAGES, chunk))])
            assert one == expected
        back = memoryview(bytearray(len(raw)))
        CODECS[codec].decode(memoryview(one), back)
        decoded.append(bytes(back))
    engine.memory.zero_()
    engine.settle()
    sources = [host[:length] for host, length in zip(hosts, lengths, strict=True)]
    assert engine.pool.decode_from(engine.page_ids, sources, [codec] * CHUNKS).failed() == {}
    assert [engine.payload(chunk) for chunk in range(CHUNKS)] == decoded
    engine.transfers.close()


@pytest.mark.parametrize("codec", sorted(ON_DEVICE - {Codec.SPLIT}))
def test_a_chunk_that_cannot_be_encoded_is_said(codec: Codec, device: torch.device) -> None:
    content = bytearray(model_numbers(LAYOUT))
    size = LAYOUT.plane_count * PAGES * LAYOUT.page_bytes
    content[2 * size : 2 * size + 2] = b"\xc0\x7f"  # NaN
    engine = Engine(LAYOUT, device, content=bytes(content))
    coder = coder_of(codec, LAYOUT)
    lengths = engine.pool.encode_into(coder, engine.page_ids, engine.hosts(), [7] * CHUNKS).lengths()
    assert [bool(length) for length in lengths] == [True, True, False, True, True]


def test_noise_does_not_get_smaller(device: torch.device) -> None:
    engine = Engine(LAYOUT, device)
    lengths = engine.pool.encode_into(Coder(Codec.SPLIT), engine.page_ids, engine.hosts(), [0] * CHUNKS).lengths()
    assert lengths == [0] * CHUNKS


def test_short_vectors_do_not_get_smaller(device: torch.device) -> None:
    layout = KVLayout.paged(1, 1, 1, "bfloat16", 4)
    engine = Engine(layout, device, content=model_numbers(layout))
    coder, ids = Coder(Codec.INT4H), engine.page_ids
    assert engine.pool.encode_into(coder, ids, engine.hosts(1000), [0] * CHUNKS).lengths() == [0] * CHUNKS


@pytest.mark.parametrize("lanes", ["at once", 0])
def test_damaged_chunks_are_said_and_the_others_arrive(lanes: str | int, device: torch.device) -> None:
    content = model_numbers(LAYOUT)
    engine = Engine(LAYOUT, device, lanes_of(lanes), content)
    hosts, ids = engine.hosts(), engine.page_ids
    lengths = engine.pool.encode_into(Coder(Codec.SPLIT), ids, hosts, [0] * CHUNKS).lengths()
    sources = [host[:length] for host, length in zip(hosts, lengths, strict=True)]
    sources[0][0] ^= 1  # magic
    sources[1][HEADER_BYTES] ^= 1  # the first block's offset
    sources[2] = sources[2][:-1]
    engine.memory.zero_()
    engine.settle()
    codecs = [Codec.SPLIT, Codec.SPLIT, Codec.SPLIT, Codec.ZSTD, Codec.SPLIT]
    failed = engine.pool.decode_from(ids, sources, codecs).failed()
    assert set(failed) == {0, 1, 2, 3}
    assert "magic" in failed[0] and "damaged" in failed[1] and "payload_bytes" in failed[2] and "zstd" in failed[3]
    assert engine.payload(4) == content[4 * engine.nbytes :]


def test_what_does_not_fit_is_refused_before_anything_is_done(device: torch.device) -> None:
    gpu = DeferredDevice(0)
    engine = Engine(LAYOUT, device, gpu.lane)
    ids, hosts, pool = engine.page_ids, engine.hosts(), engine.pool
    bad = ids.copy()
    bad[1, 1] = POOL_PAGES
    coder = Coder(Codec.INT4H)
    for move in (pool.save_into, pool.load_from, pool.load_layers):
        with pytest.raises(ValueError, match="page ids must be"):
            move(bad, hosts)
        with pytest.raises(ValueError, match="for 4 chunks"):
            move(ids, hosts[1:])
        with pytest.raises(ValueError, match="for 5 chunks"):
            move(ids.ravel(), hosts)
        with pytest.raises(ValueError, match="chunk 4 has 10 bytes"):
            move(ids, [*hosts[:-1], memoryview(bytearray(10))])
        with pytest.raises(ValueError, match="cannot be written"):
            move(ids, [*hosts[:-1], memoryview(bytes(engine.nbytes))])
        with pytest.raises(ValueError, match=r"uint8 \[n\]"):
            move(ids, [*hosts[:-1], torch.zeros(engine.nbytes, dtype=torch.int8)])
    with pytest.raises(ValueError, match="4 positions of 5"):
        pool.encode_into(coder, ids, hosts, range(4))
    with pytest.raises(ValueError, match="on the host"):
        pool.encode_into(coder, ids, [host[:100] for host in hosts], range(5))
    with pytest.raises(ValueError, match="1 codecs of 5"):
        pool.decode_from(ids, hosts, [Codec.SPLIT])
    assert not any(lane.steps for lane in gpu.lanes)


@pytest.mark.parametrize("launches", [0, 1, 2, 5])
def test_what_had_begun_is_over_when_a_failure_is_said(launches: int, device: torch.device) -> None:
    """Else the memory would be given to others while copies write there."""
    gpu = DeferredDevice(0, launches=launches)
    engine = Engine(LAYOUT, device, gpu.lane, piece_bytes=LAYOUT.page_bytes, content=model_numbers(LAYOUT))
    ids, hosts, pool = engine.page_ids, engine.hosts(), engine.pool
    sources = [torch.frombuffer(bytearray(host), dtype=torch.uint8) for host in encoded(LAYOUT)]
    transfers = {
        "save": lambda: pool.save_into(ids, hosts),
        "load": lambda: pool.load_layers(ids, hosts),
        "encode": lambda: pool.encode_into(Coder(Codec.SPLIT), ids, hosts, [0] * CHUNKS),
        "decode": lambda: pool.decode_from(ids, sources, [Codec.SPLIT] * CHUNKS),
    }
    for transfer in transfers.values():
        gpu.launches = launches
        with pytest.raises(RuntimeError, match="out of memory"):
            transfer()
        assert not any(lane.steps for lane in gpu.lanes)
    gpu.launches = 1000
    for transfer in transfers.values():
        transfer()  # the turn was given back
    engine.transfers.close()
    assert not any(lane.steps for lane in gpu.lanes)


def test_sizes_that_cannot_be(device: torch.device) -> None:
    pages = LAYOUT.page_bytes
    for sizes in ({"piece_bytes": pages - 1}, {"piece_bytes": 2 * pages, "staging_bytes": pages}):
        with pytest.raises(ValueError, match="must fit"):
            Engine(LAYOUT, device, **sizes)
    engine = Engine(LAYOUT, device, piece_bytes=pages, staging_bytes=2 * pages)
    with pytest.raises(ValueError, match="of staging"):
        engine.pool.encode_into(Coder(Codec.SPLIT), engine.page_ids, engine.hosts(), [0] * CHUNKS)
    elsewhere = [torch.empty(POOL_PAGES, LAYOUT.page_bytes, dtype=torch.uint8, device="meta")] * LAYOUT.plane_count
    with pytest.raises(ValueError, match="the pages lie on meta"):
        DevicePool(DevicePages.at(LAYOUT, [0] * LAYOUT.plane_count, pages, POOL_PAGES, elsewhere), engine.transfers)
    opaque = KVLayout(1, 1, 1, "uint8", 1, ("layer", "kv"), ("opaque",), opaque_page_bytes=64)
    with pytest.raises(CannotEncode, match="side by side"):
        engine = Engine(opaque, device)
        engine.pool.encode_into(Coder(Codec.FP8), engine.page_ids, engine.hosts(), [0] * CHUNKS)


def test_nothing_to_do(device: torch.device) -> None:
    engine = Engine(LAYOUT, device)
    none = engine.page_ids[:0]
    engine.pool.save_into(none, []).synchronize()
    assert all(event.query() or device.type == "cuda" for event in engine.pool.load_layers(none, []))
    assert engine.pool.encode_into(Coder(Codec.FP8), none, [], []).lengths() == []
    assert engine.pool.decode_from(none, [], []).failed() == {}
    engine.transfers.close()
