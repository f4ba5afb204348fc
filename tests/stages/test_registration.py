"""What gather says to an engine whose chunks a tier's codec cannot take, and to one that registers again."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from lmpipe import native
from lmpipe.books import LayoutBook
from lmpipe.codecs import CODECS
from lmpipe.codecs.zstd import ZstdCodec
from lmpipe.engines.paged import PagedEngine
from lmpipe.errors import LayoutError, SegmentError
from lmpipe.handles import Codec, SessionId, Tier
from lmpipe.index import IndexWriter
from lmpipe.layout import KVLayout
from lmpipe.messages import DeviceSource, PageSource, Register, Save, no_chunks
from lmpipe.rundir import RunDir
from lmpipe.shm.node import NodeWords
from lmpipe.shm.slots import SlotOwner
from lmpipe.stages.base import Peer
from lmpipe.stages.gather.pages import PageReaders
from lmpipe.stages.gather.producers import Engine, MappedSave, Producers
from lmpipe.tiers.dram import DramTier
from lmpipe.topology import Tiers, parse
from lmpipe.wire import VERSION

ME = SessionId(5)
KNOWN = KVLayout.paged(2, 2, 32, "float16", 16)
OPAQUE = replace(KNOWN, page=("opaque",), opaque_page_bytes=2048)


class Nobody:
    """No hold is taken here."""

    def held(self) -> frozenset[int]:
        return frozenset()


@pytest.fixture
def dram() -> Iterator[DramTier]:
    path = Path(f"/dev/shm/lmpipe-test-{os.getpid()}-{secrets.token_hex(4)}")
    (path / "index").mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    node = NodeWords.create(path / "node.shm")
    arena = SlotOwner.create(path / "arena.shm", 1 << 20, 64)
    index = IndexWriter(path, Tier.DRAM, 1 << 20, node)
    yield DramTier(arena, index, Nobody(), lambda: 0.0)
    index.close()
    arena.close()
    node.close()
    shutil.rmtree(path)


def tiers_of(codec: str) -> Tiers:
    text = f"name: a\ntiers: {{dram: {{capacity: 1GiB}}, ssd: {{directory: d, capacity: 2GiB, codec: {codec}}}}}"
    return parse(text, "f.yaml", Path("/base")).tiers


def registry(dram: DramTier, codec: str) -> Producers:
    absent = Path("/dev/shm/lmpipe-test-absent.pages")
    readers = PageReaders(dram.arena.region, native.Copier(1))
    return Producers(dram, lambda _: True, 4, 4, absent, readers, tiers_of(codec), LayoutBook(RunDir(absent)))


def hello_of(layout: KVLayout, pages: PageSource | None = None) -> Register:
    return Register(
        session=ME,
        versions=[VERSION],
        role="producer",
        name="engine",
        pid=1,
        layout=asdict(layout),
        chunk_tokens=16,
        shard=0,
        shards=1,
        namespace="ab" * 32,
        leases=4,
        pages=pages,
    )


class NoReader:
    """Of a device."""

    def __init__(self, source: DeviceSource, alive: Callable[[], bool]) -> None:
        self.lane, self.quantum_bytes = source.device, 1 << 20

    def gather(self, page_ids: object, offsets: object) -> None:
        """Copies nothing."""

    def close(self) -> None:
        """Has nothing."""


def test_copies_of_one_device_take_turns(dram: DramTier) -> None:
    absent = Path("/dev/shm/lmpipe-test-absent.pages")
    readers = PageReaders(dram.arena.region, native.Copier(1), NoReader)
    book = LayoutBook(RunDir(absent))
    producers = Producers(dram, lambda _: True, 4, 4, absent, readers, tiers_of("raw"), book)
    words = np.zeros(KNOWN.plane_count, np.uint64)
    sizes = words + np.uint64(KNOWN.page_bytes)
    engines: list[Engine] = []
    for session, device in ((1, "GPU-a"), (2, "GPU-a"), (3, "GPU-b")):
        source = DeviceSource(device, ["00" * 64], sizes[:1], words, words, sizes, sizes, 1, "00" * 64)
        hello = replace(hello_of(KNOWN), session=SessionId(session), pages=source)
        engines.append(producers.register(hello, Peer("save", b"x")))
        engines[-1].saves.append(MappedSave(Save(SessionId(session), 7, "pages", no_chunks()), Peer("save", b"x")))
    found = [producers.next_save(busy) for busy in (set(), {"GPU-a"}, {"GPU-b"}, {"GPU-a", "GPU-b"})]
    assert [turn and turn[0].session for turn in found] == [1, 3, 2, None]
    other = replace(hello_of(KNOWN), pages=replace(source, page_bytes=sizes + np.uint64(1)))
    with pytest.raises(LayoutError, match="the layout has 4 with pages of 2048 bytes"):
        producers.register(other, Peer("save", b"x"))
    with pytest.raises(LayoutError, match=r"the topology names no GPU: add it to engines\.devices"):
        registry(dram, "raw").register(hello, Peer("save", b"x"))


def register(dram: DramTier, layout: KVLayout, codec: str) -> Engine:
    return registry(dram, codec).register(hello_of(layout), Peer("save", b"x"))


def test_byte_codecs_take_every_layout(dram: DramTier) -> None:
    for codec in ("raw", "zstd"):
        assert register(dram, OPAQUE, codec).chunk_bytes == register(dram, KNOWN, codec).chunk_bytes


def test_a_codec_that_computes_with_numbers_takes_no_opaque_pages(
    dram: DramTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Numbers(ZstdCodec):
        numeric = True

    monkeypatch.setitem(CODECS, Codec.ZSTD, Numbers())
    with pytest.raises(LayoutError, match=r"^tiers\.ssd\.codec: zstd computes .*; choose raw or split here$"):
        register(dram, OPAQUE, "zstd")
    assert register(dram, OPAQUE, "raw").session == register(dram, KNOWN, "zstd").session == ME


def test_who_registers_again_keeps_its_leases_and_what_it_waits_for(dram: DramTier, tmp_path: Path) -> None:
    """A second Register overtakes nothing: gather was slow to answer the first one."""
    tmp_path.chmod(0o700)
    with PagedEngine(KNOWN, 4, segment=tmp_path / "pages.shm") as memory:
        producers, peer = registry(dram, "raw"), Peer("save", b"x")
        first = producers.register(hello_of(KNOWN, memory.source), peer)
        waiting = MappedSave(Save(ME, 7, "pages", no_chunks()), peer)
        first.saves.append(waiting)
        first.leases.add(3)
        with pytest.raises(SegmentError):
            producers.register(hello_of(KNOWN, replace(memory.source, segment_id="ab" * 16)), peer)
        again = producers.register(hello_of(KNOWN, memory.source), peer)
        assert list(again.saves) == [waiting]
        assert again.leases == {3}
        assert len(producers) == 1
        again.close()
