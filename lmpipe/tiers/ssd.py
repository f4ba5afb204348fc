"""The SSD tier: chunks in append-only segment files of one directory, rows in the `ssd` index.

Bytes first, row after; a row goes before the file it points into. Capacity is kept by giving up whole files, oldest
first. A disk that is full, read-only or failing makes the tier read-only, with the reason, and is tried again later;
what is stored can still be loaded.

`write`, `settle` and `invalidate` may block for as long as the disk does: they belong on one thread beside the stage's
own. `read` may be called from others at the same time. Checksums are computed on threads of their own while the disk
works.

Knows where records lie. Does not know who saved a chunk or who waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from lmpipe import failpoints
from lmpipe.errors import OUT_OF_MEANS, ForeignVersion, FormatError, NodeError
from lmpipe.handles import BLOCK_BYTES, ChunkRecords, Extent
from lmpipe.index import IndexWriter
from lmpipe.index_row import index_key, index_keys, row_records
from lmpipe.tiers import ChunkGone, Recovered, Stored, TierDown, is_as_good, is_same
from lmpipe.tiers.directory import lock_directory
from lmpipe.tiers.format import MAX_KEYS, digests, forget_header, piece_lengths, record_blocks
from lmpipe.tiers.recovery import forget, join, newest, write_rows
from lmpipe.tiers.segment_file import OpenSegment, segment_path
from lmpipe.tiers.segment_reader import Scan, cut_torn, read_chunk, scan

FlushPolicy = Literal["none", "interval", "each"]

MIN_SEGMENTS = 4
RETRY_S = (1.0, 30.0)


class SsdTier:
    """The chunks of one node on disk. Call `recover` before anything else.

    Raises:
        NodeError: another node uses the directory, or it is another user's.
        OSError: the directory cannot be made or opened.
    """

    def __init__(
        self,
        directory: Path,
        capacity_bytes: int,
        flush: FlushPolicy,
        segment_bytes: int,
        index: IndexWriter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.capacity_bytes = capacity_bytes
        self.read_only = ""
        """Why nothing is written at present; empty: all is well."""
        self.direct = True
        """Whether the page cache is out of the way (O_DIRECT)."""
        self._index = index
        self._flush: FlushPolicy = flush
        self._segment_bytes = max(min(segment_bytes, capacity_bytes // MIN_SEGMENTS), 16 * BLOCK_BYTES)
        self._segment_bytes -= self._segment_bytes % BLOCK_BYTES
        self._clock = clock
        self._retry_at_s = 0.0
        self._retry_s = RETRY_S[0]
        self._lock = threading.RLock()
        self._open: OpenSegment | None = None
        self._files: dict[int, int] = {}
        """Bytes of every segment file, oldest first, the open one last."""
        self._written: list[ChunkRecords] = []
        self._settled: list[Stored] = []
        self._owed: list[tuple[int, npt.NDArray[np.uint8] | None]] = []
        self._hashers = ThreadPoolExecutor(2, "lmpipe-checksum")
        self._lock_file = lock_directory(directory)

    @property
    def used_bytes(self) -> int:
        """Bytes of all segment files."""
        return sum(self._files.values())

    @property
    def rows(self) -> int:
        """Rows of the index."""
        return self._index.count()

    def tick(self) -> None:
        """To be called every second: looks after the index's readers."""
        self._index.tick()

    # ---- save ----

    def write(self, records: ChunkRecords, payloads: Sequence[memoryview]) -> Stored:
        """Append chunks. `payloads` are page-aligned and at least `nbytes` long. They get their rows at the next
        `settle`.

        Records that could not be written are missing at the end of `Stored.records`, and `reason` says why.
        """
        with self._lock:
            evicted: list[ChunkRecords] = []
            placed = records.copy()
            if self.read_only and self._clock() < self._retry_at_s:
                return Stored(reason=self.read_only, down=True)
            pieces = [
                self._hashers.submit(digests, payload[: int(n)], piece_lengths(int(n)))
                for payload, n in zip(payloads, records["nbytes"], strict=True)
            ]
            done, reason, down = 0, "", False
            try:
                failpoints.hit("ssd.write.begun")
                self._pay_forgets(evicted)
                while done < len(records):
                    blocks = record_blocks(int(records["nbytes"][done]))
                    segment = self._segment_for(blocks, evicted)
                    if segment is None:
                        reason = f"a chunk of {blocks} blocks is larger than a segment"
                        break
                    last = done + segment.group(records["nbytes"][done:].tolist())
                    segment.append(placed[done:last], payloads[done:last], pieces[done:last])
                    done = last
                failpoints.hit("ssd.write.written")
                self._worked()
            except OSError as error:
                reason, down = self._fail(error), True
            for piece in pieces[done:]:
                piece.cancel()
            wait(pieces)  # no thread of ours looks at the payloads any more
            self._written.append(placed[:done])
            return Stored(placed[:done], reason, join(evicted), down)

    def settle(self) -> Stored:
        """Make what was written survive, as far as the flush policy asks, and give it its rows.

        `records` are those that are in since the last call; `reason`, when others are lost, why.
        """
        with self._lock:
            written, self._written = join(self._written), []
            reason, down = "", False
            if len(written) and self._flush != "none" and self._open is not None:
                try:
                    failpoints.hit("ssd.settle.begun")
                    self._open.flush()
                except OSError as error:
                    # What the disk did not confirm is not acknowledged; sealed files were flushed when they were
                    # sealed.
                    written = written[written["place"] >> 32 != self._open.number]
                    reason, down = self._fail(error), True
            failpoints.hit("ssd.settle.flushed")
            evicted: list[ChunkRecords] = []
            try:
                while len(written) and not self._index.put_records(written):
                    if not self._reclaim(evicted):
                        written, reason = written[:0], "the index is full"
            except OSError as error:
                written, reason, down = written[:0], self._fail(error), True
            gone = ~np.isin(written["place"] >> 32, list(self._files))
            if gone.any():  # its own file was given up for the room, and the row goes with all its shards
                lost = set(index_keys(written[gone]))
                gone = np.array([key in lost for key in index_keys(written)], np.bool_)
                self._delete_rows(list(lost), None)
                written, reason = written[~gone], "evicted at once"
            early, self._settled = self._settled, []
            parts = [*early, Stored(written, reason, join(evicted), down)]
            return Stored(
                join([part.records for part in parts]),
                next((part.reason for part in parts if part.reason), ""),
                join([part.evicted for part in parts]),
                any(part.down for part in parts),
            )

    def _segment_for(self, blocks: int, evicted: list[ChunkRecords]) -> OpenSegment | None:
        """The open file if so much still fits, else a new one; None if it would not fit any."""
        if (blocks + 4) * BLOCK_BYTES > self._segment_bytes:
            return None
        if self._open is not None and not self._open.fits(blocks):
            self._seal()
        if self._open is None:
            while self.used_bytes + self._segment_bytes > self.capacity_bytes and self._reclaim(evicted):
                pass
            number = max(self._files, default=0) + 1
            self._open = OpenSegment.create(self.directory, number, self._segment_bytes)
            self.direct = self._open.direct
            self._files[number] = self._segment_bytes
        return self._open

    def _seal(self) -> None:
        segment, self._open = self._open, None
        if segment is None:
            return
        try:
            self._files[segment.number] = segment.seal(self._flush != "none")
        except OSError:
            if self._flush != "none":  # its records may not survive
                self._written = [part[part["place"] >> 32 != segment.number] for part in self._written]
            raise

    def _reclaim(self, evicted: list[ChunkRecords]) -> bool:
        """Give up the oldest sealed file: its rows, then the file. False: there is none."""
        number = next(iter(self._files), None)
        if number is None or (self._open is not None and number == self._open.number):
            return False
        path = segment_path(self.directory, number)
        try:
            keys = index_keys(scan(path, number).chunks)
        except (FormatError, OSError):
            keys = [key for batch in self._index.scan() for key, _ in batch]
        for at in range(0, len(keys), 4096):
            evicted.append(self._delete_rows(keys[at : at + 4096], number))
        failpoints.hit("ssd.reclaim.unindexed")
        self._unlink(number)
        return True

    def _delete_rows(self, keys: Sequence[bytes], segment: int | None) -> ChunkRecords:
        """Delete rows (of those, only the ones with a shard in `segment`); the records they had."""
        gone: dict[bytes, ChunkRecords] = {}
        for key in keys:
            row = self._index.get(key)
            if row is not None:
                found = row_records(row)
                if segment is None or (found["place"] >> 32 == segment).any():
                    gone[key] = found
        self._index.delete(list(gone))
        return join(list(gone.values()))

    def _fail(self, error: OSError) -> str:
        """Read-only from now on, for a while; the reason."""
        self.read_only = f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}"
        self._retry_at_s = self._clock() + self._retry_s
        self._retry_s = min(self._retry_s * 2, RETRY_S[1])
        with contextlib.suppress(OSError):  # without a footer, what it holds is found by its records
            self._seal()
        return self.read_only

    def _worked(self) -> None:
        self.read_only, self._retry_s = "", RETRY_S[0]

    # ---- load ----

    def find(self, record: np.void) -> np.void | None:
        """The stored record of the same chunk and shard, if it is just what is asked for."""
        return next((stored for stored in self._rows_of(record) if is_same(stored, record)), None)

    def has(self, record: np.void) -> bool:
        """Whether what is stored of a chunk and shard is at least as exact as this, so that it need not be written."""
        return any(is_as_good(stored, record) for stored in self._rows_of(record))

    def _rows_of(self, record: np.void) -> ChunkRecords:
        row = self._index.get(index_key(record.tobytes()))
        return record.reshape(1)[:0] if row is None else row_records(row)

    def read(self, record: np.void, into: memoryview) -> None:
        """Read the payload of a record of `find` into `into`, page-aligned and at least `nbytes` long.

        Raises:
            ChunkGone: its file was given up.
            FormatError: what lies there is damaged or another chunk; its row is gone now.
            TierDown: it could not be looked at.
        """
        path = segment_path(self.directory, Extent.from_place(int(record["place"])).segment)
        try:
            failpoints.hit("ssd.read.begun")
            read_chunk(path, record, into, self._hashers)
            failpoints.hit("ssd.read.verified")
        except FileNotFoundError as error:
            raise ChunkGone(f"{path} was given up") from error
        except FormatError:
            self.drop(record)
            raise
        except OSError as error:
            if error.errno in OUT_OF_MEANS:
                raise TierDown(f"{path}: {error.strerror}") from error
            self.drop(record)
            raise FormatError(f"{path}: {error.strerror}") from error

    def drop(self, record: np.void) -> None:
        """Delete the row of a stored record, if it still points there."""
        with self._lock:
            row = self._index.get(index_key(record.tobytes()))
            if row is not None and (row_records(row)["place"] == record["place"]).any():
                self._index.delete([index_key(record.tobytes())])

    # ---- forget, recover, end ----

    def invalidate(self, namespace: int, chunks: ChunkRecords) -> int:
        """Forget `chunks`, or, if none are named, a namespace (0: all). Rows that went; recovery brings none back."""
        with self._lock:
            early = self.settle()
            self._settled.append(early)
            if len(chunks):
                removed = [self._delete_rows(index_keys(chunks), None)]
                keys = np.ascontiguousarray(chunks["key"]).view(np.uint8).reshape(-1, 16)
                self._owed += [(0, keys[at : at + MAX_KEYS]) for at in range(0, len(keys), MAX_KEYS)]
            else:
                removed = [self._delete_rows(self._named(batch, namespace), None) for batch in self._index.scan()]
                self._owed.append((namespace, None))
            evicted: list[ChunkRecords] = []
            try:
                failpoints.hit("ssd.forget.unindexed")
                if not len(chunks) and not namespace:
                    self._unlink_all()
                self._pay_forgets(evicted)
                failpoints.hit("ssd.forget.written")
            except OSError as error:
                self._fail(error)
            self._settled.append(Stored(evicted=join(evicted)))
            return len(set(index_keys(join(removed))))

    @staticmethod
    def _named(batch: list[tuple[bytes, bytes]], namespace: int) -> list[bytes]:
        return [key for key, row in batch if not namespace or int(row_records(row)["namespace"][0]) == namespace]

    def _unlink_all(self) -> None:
        """Nothing is to be kept: the files are as good a tombstone as any."""
        if self._open is not None:
            self._open.close()
            self._open = None
        for number in list(self._files):
            self._unlink(number)
        self._owed.clear()

    def _pay_forgets(self, evicted: list[ChunkRecords]) -> None:
        """Write the tombstones that are owed and make them survive, before anything else is written."""
        while self._owed:
            namespace, keys = self._owed[0]
            segment = self._segment_for(1, evicted)
            assert segment is not None, "every segment has room for one block"
            segment.append_forget(forget_header(segment.id, segment.extent, namespace, keys))
            del self._owed[0]

    def recover(self) -> Recovered:
        """Fill the index from the files and publish it. Files without a footer get one.

        Raises:
            NodeError: another version of lmpipe has written there; nothing was removed.
        """
        with self._lock:
            found, damaged = 0, 0
            parts: list[ChunkRecords] = []
            for path in sorted(self.directory.glob("????????.seg")):
                number = int(path.stem, 16)
                self._files[number] = path.stat().st_size
                try:
                    part = scan(path, number)
                    if not part.sealed:
                        self._mend(path, part)
                except ForeignVersion as error:
                    raise NodeError(
                        f"{error}; use the lmpipe that wrote it, or give tiers.ssd another directory"
                    ) from None
                except (FormatError, OSError):
                    damaged += 1
                    continue
                damaged += bool(part.damage)
                found += len(part.chunks)
                parts.append(part.chunks)
                for block, header in part.forgets:
                    keys = header.table if len(header.table) else None
                    before = Extent(number, block).place
                    parts = [forget(join(parts), before, int(header.record["namespace"]), keys)]
            records = join(parts)
            with contextlib.suppress(OSError):  # a read-only disk: what lies there can be loaded
                while self.used_bytes > self.capacity_bytes:
                    oldest = next(iter(self._files))
                    self._unlink(oldest)
                    records = records[records["place"] >> 32 != oldest]
            failpoints.hit("ssd.recover.scanned")
            lost = write_rows(self._index, newest(records))
            self._index.publish()
            return Recovered(self._index.count(), found, damaged, lost)

    def _mend(self, path: Path, part: Scan) -> None:
        """Drop what was being written when the node died, then seal the file, or remove it if nothing is left."""
        cut_torn(path, part, self._hashers)
        number = part.header.segment
        if not len(part.chunks) and not part.forgets:
            self._unlink(number)
            return
        with contextlib.suppress(OSError):  # a read-only disk: next time, then
            forgets = [block for block, _ in part.forgets]
            reopened = OpenSegment.reopen(path, part.header, part.end_block, part.chunks, forgets)
            self._files[number] = reopened.seal(self._flush != "none")

    def _unlink(self, number: int) -> None:
        segment_path(self.directory, number).unlink(missing_ok=True)
        del self._files[number]

    def close(self) -> None:
        """Settle, seal, and let another node have the directory. The index stays open."""
        with self._lock:
            self.settle()
            with contextlib.suppress(OSError):
                self._seal()
            self._hashers.shutdown()
            os.close(self._lock_file)
