"""Transfers between an engine's pages on a device and chunks in pinned memory of the host, beside the engine's work.

    save    pages ── gather or encode ──▶ staging ── DMA ──▶ host
    load    host  ── DMA ──▶ staging ── scatter or decode ──▶ pages

A transfer is cut into pieces, which go through the two buffers of its direction in turns (staging.py): while one's
kernel runs, the other's DMA does. Nothing waits on the host but `encode_into` with a codec whose length the numbers
decide.

Runs in the engine's process, but not while that captures a CUDA graph: memory may be allocated. Knows no arena, no
message and no tier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.cuda import coding, paging
from lmpipe.cuda.coding import Coder
from lmpipe.cuda.lanes import Event
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.pieces import Piece, cut
from lmpipe.cuda.staging import Staged, aligned, parts, rows
from lmpipe.cuda.transfers import Transfers
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec
from lmpipe.spans import Span

PageIds = npt.NDArray[np.int32]
HostBytes = memoryview | torch.Tensor
"""A chunk on the host: writable bytes, or uint8 `[n]`. Pinned, else transfers are slow and wait for each other."""


class DevicePool:
    """The pages of one engine, or of one request, on one device. Any thread may call; making one allocates nothing.

    Page ids have shape (chunks, pages of a chunk); -1 is no page: it is saved as zeros and left out by a load. Memory
    of the host must stay as it is until the event that a call returns has come, and so must the pages.
    """

    def __init__(self, pages: DevicePages, transfers: Transfers) -> None:
        """`transfers`: of the pages' device, which may serve other pools too.

        Raises:
            ValueError: the pages are of another device, or a single one does not fit a piece of a transfer.
        """
        if pages.layout.page_bytes > transfers.piece_bytes:
            raise ValueError(f"a page of {pages.layout.page_bytes} bytes must fit a piece of {transfers.piece_bytes}")
        if pages.device != transfers.device:
            raise ValueError(f"the pages lie on {pages.device}, the transfers are of {transfers.device}")
        self.pages = pages
        self._saves, self._loads, self._spans = transfers.saves, transfers.loads, transfers.spans
        self._staging_bytes, self._piece_bytes = transfers.staging_bytes, transfers.piece_bytes
        self._programs = transfers.programs

    def chunk_bytes(self, page_ids: PageIds) -> int:
        """Of a payload of as many pages as these chunks have."""
        return self.pages.layout.plane_count * page_ids.shape[-1] * self.pages.layout.page_bytes

    def can_decode(self, codec: Codec, nbytes: int) -> bool:
        """Whether a kernel decodes chunks of this codec, and one of so many bytes fits the staging buffers."""
        return codec in coding.ON_DEVICE and nbytes <= self._staging_bytes

    def save_into(self, page_ids: PageIds, destinations: Sequence[HostBytes], after: Event | None = None) -> Event:
        """Copy pages to the host, as raw payloads. `after`: when the pages have been computed.

        Returns the event after which the payloads are there and the pages may change.

        Raises:
            ValueError: not as many destinations as chunks, one too short, or a page id outside the pool; nothing is
                copied.
        """
        hosts = self._hosts(page_ids, destinations, [self.chunk_bytes(page_ids)] * len(destinations))
        with self._span("gpu.save", page_ids), self._saves.transfer(after):
            for piece in self._cut(page_ids, range(self.pages.layout.plane_count)):
                self._out(self._saves.next(self._piece_bytes), piece, page_ids, hosts)
            return self._saves.joined()

    def load_from(self, page_ids: PageIds, sources: Sequence[HostBytes], after: Event | None = None) -> Event:
        """Copy raw payloads into pages. `after`: when nothing reads the pages any more.

        Returns the event after which the pages have their numbers.

        Raises:
            ValueError: as `save_into`.
        """
        return self._load(page_ids, sources, after, [range(self.pages.layout.plane_count)])[0]

    def load_layers(self, page_ids: PageIds, sources: Sequence[HostBytes], after: Event | None = None) -> list[Event]:
        """As `load_from`, first layer first, with an event for each layer, so that computing can begin with the first.

        Where layers interleave (`layout.layer_pieces` is 1) there is one event, for all.
        """
        return self._load(
            page_ids, sources, after, [self.pages.layer(i) for i in range(self.pages.layout.layer_pieces)]
        )

    def encode_into(
        self,
        coder: Coder,
        page_ids: PageIds,
        destinations: Sequence[HostBytes],
        positions: Sequence[int],
        after: Event | None = None,
    ) -> Encoded:
        """Copy pages to the host, encoded, each chunk with its header. `positions`: of the chunks in their prompt.

        Waits on the host for lengths that the numbers decide (`split`).

        Raises:
            CannotEncode: the pages do not consist of vectors of numbers.
            ValueError: as `save_into`; or an encoded chunk may become larger than a staging buffer.
        """
        count = page_ids.shape[1]
        if len(positions) != len(destinations):
            raise ValueError(f"{len(positions)} positions of {len(destinations)} chunks")
        bounds = [coder.bound(self.pages, count, position) for position in positions]
        whole = self.chunk_bytes(page_ids)
        hosts = self._hosts(page_ids, destinations, [min(whole, HEADER_BYTES + each) for each in bounds])
        lengths = self._answers(len(hosts))
        encoded = Encoded(lengths)
        with self._span("gpu.encode", page_ids), self._saves.transfer(after):
            begun: Callable[[], None] | None = None
            for group in self._groups(bounds):
                staged = self._saves.next(sum(aligned(bounds[chunk]) for chunk in group))
                finish = self._encode(staged, coder, group, bounds, page_ids, hosts, positions, lengths)
                if begun is not None:
                    begun()
                begun = finish
            if begun is not None:
                begun()
            encoded.done = self._saves.joined()
        return encoded

    def decode_from(
        self,
        page_ids: PageIds,
        sources: Sequence[HostBytes],
        codecs: Sequence[Codec],
        after: Event | None = None,
    ) -> Decoded:
        """Fill pages from encoded chunks with their headers, each source as long as its chunk.

        Raises:
            ValueError: not as many sources and codecs as chunks, or a page id outside the pool; nothing is copied.
        """
        hosts = self._hosts(page_ids, sources, [HEADER_BYTES] * len(sources))
        if len(codecs) != len(hosts):
            raise ValueError(f"{len(codecs)} codecs of {len(hosts)} chunks")
        raw_bytes = self.chunk_bytes(page_ids)
        damaged = self._answers(len(hosts))
        decoded = Decoded(damaged)
        heads: dict[int, tuple[Header, bytes]] = {}
        for chunk, (host, codec) in enumerate(zip(hosts, codecs, strict=True)):
            try:
                head, table = coding.opened(host.numpy().data, codec, raw_bytes)
                if head.payload_bytes > self._staging_bytes:
                    raise FormatError(f"{head.payload_bytes} bytes do not fit {self._staging_bytes} of staging")
                heads[chunk] = head, table
            except FormatError as error:
                decoded.refused[chunk] = str(error)
        with self._span("gpu.decode", page_ids), self._loads.transfer(after):
            places = list(heads)
            for group in self._groups([heads[chunk][0].payload_bytes for chunk in places]):
                some = {places[at]: heads[places[at]] for at in group}
                staged = self._loads.next(sum(aligned(head.payload_bytes) for head, _ in some.values()))
                self._decode(staged, some, page_ids, hosts, decoded)
            decoded.done = self._loads.joined()
        return decoded

    def _span(self, name: str, page_ids: PageIds) -> Span:
        return self._spans.span(name, self.chunk_bytes(page_ids) * len(page_ids), len(page_ids))

    def _load(
        self, page_ids: PageIds, sources: Sequence[HostBytes], after: Event | None, parts: list[range]
    ) -> list[Event]:
        hosts = self._hosts(page_ids, sources, [self.chunk_bytes(page_ids)] * len(sources))
        events: list[Event] = []
        with self._span("gpu.load", page_ids), self._loads.transfer(after):
            for planes in parts:
                for piece in self._cut(page_ids, planes):
                    self._in(self._loads.next(self._piece_bytes), piece, page_ids, hosts)
                events.append(self._loads.joined())
        return events

    def _out(self, staged: Staged, piece: Piece, page_ids: PageIds, hosts: list[torch.Tensor]) -> None:
        staged_rows = rows(staged.buffer, piece)

        def gather() -> None:
            ids = self._ids(page_ids, piece)
            paging.gather(self.pages, ids, staged_rows, planes=piece.planes, programs=self._programs)

        def copy() -> None:
            for row, chunk in zip(staged_rows, piece.chunks, strict=True):
                hosts[chunk][piece.at : piece.at + piece.nbytes].copy_(row, non_blocking=True)

        nbytes, chunks = staged_rows.numel(), len(piece.chunks)
        staged.run("gather", nbytes, chunks, gather)
        staged.run("copy to host", nbytes, chunks, copy)

    def _in(self, staged: Staged, piece: Piece, page_ids: PageIds, hosts: list[torch.Tensor]) -> None:
        staged_rows = rows(staged.buffer, piece)

        def copy() -> None:
            for row, chunk in zip(staged_rows, piece.chunks, strict=True):
                row.copy_(hosts[chunk][piece.at : piece.at + piece.nbytes], non_blocking=True)

        def scatter() -> None:
            ids = self._ids(page_ids, piece)
            paging.scatter(self.pages, ids, staged_rows, planes=piece.planes, programs=self._programs)

        nbytes, chunks = staged_rows.numel(), len(piece.chunks)
        staged.run("copy from host", nbytes, chunks, copy)
        staged.run("scatter", nbytes, chunks, scatter)

    def _encode(
        self,
        staged: Staged,
        coder: Coder,
        group: range,
        bounds: list[int],
        page_ids: PageIds,
        hosts: list[torch.Tensor],
        positions: Sequence[int],
        lengths: torch.Tensor,
    ) -> Callable[[], None]:
        """Begin with a group of chunks; the answer goes on with it when another group has begun too."""
        places = dict(zip(group, parts(staged.buffer, [bounds[chunk] for chunk in group]), strict=True))
        count = page_ids.shape[1]

        def work() -> None:
            ids = self.pages.ids(page_ids[group.start : group.stop])
            for chunk, row in places.items():
                try:
                    position = positions[chunk]
                    length = coder.encode(self.pages, ids[chunk - group.start], row, position, programs=self._programs)
                    lengths[chunk : chunk + 1].copy_(length, non_blocking=True)
                except CannotEncode:
                    lengths[chunk] = -1

        staged.run("encode", self.chunk_bytes(page_ids) * len(group), len(group), work)
        written = staged.lane.record()

        def finish() -> None:
            known: dict[int, int] = {}
            for chunk, position in zip(group, positions[group.start : group.stop], strict=True):
                nbytes = coder.payload_bytes(self.pages, count, position)
                if nbytes is None:
                    written.synchronize()
                    nbytes = int(lengths[chunk])
                if nbytes > 0:
                    known[chunk] = nbytes
                    head = coder.header(self.pages, count, position, nbytes).pack()
                    hosts[chunk][:HEADER_BYTES].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))

            def copy() -> None:
                for chunk, nbytes in known.items():
                    hosts[chunk][HEADER_BYTES : HEADER_BYTES + nbytes].copy_(places[chunk][:nbytes], non_blocking=True)

            staged.run("copy to host", sum(known.values()), len(known), copy)

        return finish

    def _decode(
        self,
        staged: Staged,
        heads: dict[int, tuple[Header, bytes]],
        page_ids: PageIds,
        hosts: list[torch.Tensor],
        decoded: Decoded,
    ) -> None:
        places = parts(staged.buffer, [head.payload_bytes for head, _ in heads.values()])

        def copy() -> None:
            for row, chunk in zip(places, heads, strict=True):
                row.copy_(hosts[chunk][HEADER_BYTES:], non_blocking=True)

        def decode() -> None:
            ids = self.pages.ids(page_ids[list(heads)])
            for row, page_row, (chunk, (head, table)) in zip(places, ids, heads.items(), strict=True):
                try:
                    damaged = coding.decode(head, table, row, self.pages, page_row, programs=self._programs)
                    decoded.damaged[chunk : chunk + 1].copy_(damaged, non_blocking=True)
                except FormatError as error:
                    decoded.refused[chunk] = str(error)

        staged.run("copy from host", sum(map(len, places)), len(places), copy)
        staged.run("decode", self.chunk_bytes(page_ids) * len(places), len(places), decode)

    def _cut(self, page_ids: PageIds, planes: range) -> list[Piece]:
        chunks, count = page_ids.shape
        return list(cut(chunks, planes, count, self.pages.layout.page_bytes, self._piece_bytes))

    def _ids(self, page_ids: PageIds, piece: Piece) -> torch.Tensor:
        chunks, part = piece.chunks, piece.pages
        return self.pages.ids(page_ids[chunks.start : chunks.stop, part.start : part.stop])

    def _groups(self, lengths: list[int]) -> list[range]:
        """Consecutive chunks that fit a staging buffer together."""
        groups: list[range] = []
        first, filled = 0, 0
        for chunk, nbytes in enumerate(lengths):
            if nbytes > self._staging_bytes:
                raise ValueError(f"an encoded chunk of {nbytes} bytes does not fit {self._staging_bytes} of staging")
            filled += aligned(nbytes)
            if filled > self._piece_bytes and chunk > first:
                groups.append(range(first, chunk))
                first, filled = chunk, aligned(nbytes)
        return [*groups, range(first, len(lengths))] if lengths else []

    def _hosts(self, page_ids: PageIds, given: Sequence[HostBytes], least: list[int]) -> list[torch.Tensor]:
        """The chunks as tensors, of `least` bytes each, checked; so are the page ids."""
        if page_ids.ndim != 2 or len(page_ids) != len(given):
            raise ValueError(f"page ids of shape {page_ids.shape} for {len(given)} chunks on the host")
        self.pages.check(page_ids)
        hosts = [_host_bytes(each) for each in given]
        for chunk, (host, wanted) in enumerate(zip(hosts, least, strict=True)):
            if len(host) < wanted:
                raise ValueError(f"chunk {chunk} has {len(host)} bytes on the host, {wanted} are wanted")
        return hosts

    def _answers(self, count: int) -> torch.Tensor:
        """A word for each chunk, on the host, that the device writes."""
        return torch.zeros(count, dtype=torch.int64, pin_memory=self.pages.device.type == "cuda")


@dataclass(slots=True)
class Encoded:
    """Chunks on their way to the host."""

    _lengths: torch.Tensor
    done: Event = field(init=False)
    """After it all is there, and the pages may change."""

    def lengths(self) -> list[int]:
        """Wait; bytes of every chunk with its header, 0 where it cannot be encoded and must be saved raw."""
        self.done.synchronize()
        return [HEADER_BYTES + nbytes if nbytes > 0 else 0 for nbytes in map(int, self._lengths)]


@dataclass(slots=True)
class Decoded:
    """Encoded chunks on their way into pages."""

    damaged: torch.Tensor
    refused: dict[int, str] = field(default_factory=dict[int, str])
    done: Event = field(init=False)
    """After it the pages have their numbers, but for chunks that are damaged."""

    def failed(self) -> dict[int, str]:
        """Wait; why chunks did not arrive, by their place. Their pages hold nothing of meaning."""
        self.done.synchronize()
        damaged = [chunk for chunk, word in enumerate(map(int, self.damaged)) if word]
        return {**dict.fromkeys(damaged, "an encoded chunk is damaged"), **self.refused}


def _host_bytes(given: HostBytes) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        if given.device.type != "cpu" or given.dtype != torch.uint8 or given.ndim != 1 or not given.is_contiguous():
            raise ValueError(f"a chunk on the host is uint8 [n], not {given.dtype} {given.shape} on {given.device}")
        return given
    if given.readonly:
        raise ValueError("a chunk on the host lies in memory that cannot be written")
    return torch.frombuffer(given, dtype=torch.uint8)
