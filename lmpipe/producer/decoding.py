"""Encoded chunks of the arena on their way into an engine's pages: decoded by the engine's own threads, into memory of
their own, and from there scattered.

    held slot ─▶ decode into scratch memory ─▶ scatter into the pages

As everywhere on the load side, no worker takes part, and a chunk that cannot be decoded is a chunk that has not come.
Native codecs and copies run without the interpreter lock, so several chunks are worked on at once.
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import numpy.typing as npt

from lmpipe import native
from lmpipe.codecs import CODECS
from lmpipe.errors import FormatError
from lmpipe.handles import ChunkRecords, Codec
from lmpipe.shm.table import SlotTable

_START = np.zeros(1, np.uint64)


class Decoder:
    """`threads` is how many chunks of one load are decoded at a time, the first of them on the caller's thread."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._copier = native.Copier(1)
        self._spare: deque[npt.NDArray[np.uint8]] = deque(maxlen=threads)
        """Memory of former loads: its first touch costs as much as decoding does."""

    def scatter(
        self, arena: SlotTable, records: ChunkRecords, pool: native.PagePool, page_ids: npt.NDArray[np.int32]
    ) -> dict[int, str]:
        """Copy held chunks into pages, which are those of `page_ids`, (n, pages of a chunk).

        Returns:
            Why those did not arrive that did not, by their place in `records`.
        """
        waiting = deque(range(len(records)))
        failed: dict[int, str] = {}
        problems: list[BaseException] = []

        def work() -> None:
            try:
                while waiting:
                    try:
                        at = waiting.popleft()
                    except IndexError:  # another thread was quicker
                        return
                    reason = self._scatter_one(arena, records[at], pool, page_ids[at : at + 1])
                    if reason:
                        failed[at] = reason
            except BaseException as problem:  # noqa: BLE001 - raised again on the caller's thread
                problems.append(problem)

        helpers = [
            threading.Thread(target=work, name=f"lmpipe-decode-{i}", daemon=True)
            for i in range(1, min(self._threads, len(records)))
        ]
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()
        if problems:
            raise problems[0]
        return failed

    def _scatter_one(
        self, arena: SlotTable, record: np.void, pool: native.PagePool, page_ids: npt.NDArray[np.int32]
    ) -> str:
        """Why the chunk did not arrive, or nothing."""
        raw_bytes, codec = int(record["raw_bytes"]), CODECS[Codec(int(record["codec"]))]
        memory = self._memory(raw_bytes)
        try:
            encoded = arena.payload(int(record["place"]) >> 32, int(record["nbytes"]))
            codec.decode(encoded, memory[:raw_bytes].data)
            self._copier.scatter(pool, np.ascontiguousarray(page_ids), native.Region(memory.data), _START)
        except FormatError as error:
            return f"damaged in DRAM: {error}"
        finally:
            self._spare.append(memory)
        return ""

    def _memory(self, nbytes: int) -> npt.NDArray[np.uint8]:
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        return memory if len(memory) >= nbytes else np.empty(nbytes, np.uint8)
