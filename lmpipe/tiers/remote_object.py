"""The remote tier on an object store (S3 and the like, or a directory), through obstore.

An object is a record header and the payload (format.py); its name (object_name.py) says all that the index needs, so
that a listing rebuilds the rows. Other nodes write and delete in the same place: a row is a hint, and only what was
verified counts.

Every call has a time-out, none is retried by the library, and a store that fails at reading, or at writing, is left
alone with that for a growing time.
Calls block; any thread may make them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from lmpipe import failpoints
from lmpipe.errors import ForeignVersion, FormatError, TopologyError
from lmpipe.handles import BLOCK_BYTES, ChunkRecords
from lmpipe.index import IndexWriter
from lmpipe.index_row import index_key, index_keys, row_records
from lmpipe.tiers import ChunkGone, Recovered, Stored, TierDown, is_as_good, is_same
from lmpipe.tiers.breaker import Breaker
from lmpipe.tiers.format import NO_ID, RecordHeader, chunk_header, digests, piece_lengths
from lmpipe.tiers.object_name import chunk_prefix, namespace_prefix, object_name, parse_name
from lmpipe.tiers.recovery import BATCH_ROWS, join, newest

T = TypeVar("T")

DELETE_AT_ONCE = 256
PROBE = "probe"
"""A prefix that no object has."""


def open_store(url: str, timeout_s: float) -> ObjectStore:
    """The store of a topology's URL.

    Raises:
        TopologyError: a scheme or an address that obstore does not know.
    """
    try:
        if url.startswith("file://"):
            return LocalStore(url.removeprefix("file://"), automatic_cleanup=True, mkdir=True)
        timeout = timedelta(seconds=timeout_s)
        return from_url(
            url,
            client_options={"timeout": timeout, "connect_timeout": timeout, "allow_http": url.startswith("http:")},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
        )
    except (BaseError, OSError, ValueError) as error:
        raise TopologyError(f"tiers.remote.url {url!r}: {_short(error)}") from error


class RemoteTier:
    """The chunks of this node, and of others that share the store. Call `recover` first, again if the store is down."""

    def __init__(
        self,
        store: ObjectStore,
        capacity_bytes: int,
        index: IndexWriter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._coming_bytes = 0
        """Of objects that are being stored, by as many threads."""
        self._store = store
        self._index = index
        self._reads, self._writes = Breaker(clock), Breaker(clock)
        self._lock = threading.Lock()
        self._objects: dict[str, int] = {}
        """Bytes of every object known, oldest first."""
        self._owed: set[str] = set()
        """Objects to delete when the store answers again."""

    @property
    def down(self) -> str:
        """Why the store is not asked at present; empty: it is."""
        return self._reads.reason or self._writes.reason

    @property
    def rows(self) -> int:
        """Rows of the index."""
        return self._index.count()

    # ---- save ----

    def put(self, record: np.void, payload: memoryview) -> Stored:
        """Store a chunk, if the index does not have it as exact, and give it its row."""
        if self.has(record):
            return Stored(_one(record))
        nbytes = int(record["nbytes"])
        clean = record.copy()
        clean["place"] = 0
        body = payload[:nbytes]
        name, room = object_name(clean), nbytes + BLOCK_BYTES
        if (evicted := self._take_room(room)) is None:
            return Stored(reason=f"a chunk of {nbytes} bytes is larger than the tier, or than what others leave of it")
        try:
            header = chunk_header(clean, NO_ID, digests(body, piece_lengths(nbytes))).pack()
            # Two buffers and no multipart: obstore sends them as they lie, without a copy.
            parts = [header, body]
            self._ask(lambda: obstore.put(self._store, name, parts, mode="create", use_multipart=False), self._writes)
        except AlreadyExistsError:
            pass  # the name is the content's: another node was faster
        except TierDown as error:
            self._end_put(room)
            return Stored(reason=str(error), evicted=evicted, down=True)
        failpoints.hit("remote.put.stored")
        if not self._index.put_records(_one(clean)):
            self._end_put(room)
            self._delete([name])
            return Stored(reason="the index is full", evicted=evicted)
        failpoints.hit("remote.put.indexed")
        self._end_put(room, name)
        return Stored(_one(clean), evicted=evicted)

    def _end_put(self, room: int, name: str = "") -> None:
        """What was coming has come, as the object `name`, or it has not."""
        with self._lock:
            self._coming_bytes -= room
            if name:
                self.used_bytes += room - self._objects.pop(name, 0)
                self._objects[name] = room

    def _take_room(self, nbytes: int) -> ChunkRecords | None:
        """Give up the oldest objects until so many bytes fit beside those that are coming: rows first, then the
        objects. None: they do not fit.
        """
        victims: list[str] = []
        with self._lock:
            left_bytes = self.capacity_bytes - self._coming_bytes - nbytes
            while self._objects and self.used_bytes > left_bytes:
                name = next(iter(self._objects))
                self.used_bytes -= self._objects[name]
                victims.append(name)
                del self._objects[name]
            fits = self.used_bytes <= left_bytes
            self._coming_bytes += nbytes if fits else 0
        gone = [self._delete_row(parse_name(name, _bytes_of(name))) for name in victims]
        if victims:
            failpoints.hit("remote.evict.unindexed")
        self._delete(victims)
        return join(gone) if fits else None

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

    def get(self, record: np.void, into: memoryview) -> None:
        """Fetch the payload of a record of `find` into `into`, at least `nbytes` long.

        Raises:
            ChunkGone: the object is no more; its row is gone now.
            FormatError: it is damaged or another chunk; row and object are gone now. ForeignVersion: the row alone is.
            TierDown: the store does not answer.
        """
        name, nbytes = object_name(record), int(record["nbytes"])
        try:
            end = BLOCK_BYTES + nbytes
            data = self._ask(lambda: obstore.get_range(self._store, name, start=0, end=end), self._reads)
        except FileNotFoundError as error:
            self._forget(record, name)
            raise ChunkGone(f"object {name} is no more") from error
        view = memoryview(data)
        try:
            if len(view) != BLOCK_BYTES + nbytes:
                raise FormatError(f"object {name}: {len(view)} bytes, its name says {BLOCK_BYTES + nbytes}")
            header = RecordHeader.parse(view[:BLOCK_BYTES], f"object {name}")
            if header.record.tobytes() != record.tobytes() or header.id != NO_ID:
                raise FormatError(f"object {name}: holds another chunk")
            wrong = np.flatnonzero((digests(view[BLOCK_BYTES:], piece_lengths(nbytes)) != header.table).any(axis=1))
            if len(wrong):
                raise FormatError(f"object {name}: checksum of piece {wrong[0]} differs")
        except FormatError as error:
            self._forget(record, name)
            if not isinstance(error, ForeignVersion):  # that one is good for the node that wrote it
                self._delete([name])
            raise
        into[:nbytes] = view[BLOCK_BYTES:]
        failpoints.hit("remote.get.verified")

    def _forget(self, record: np.void, name: str) -> None:
        with self._lock:
            self.used_bytes -= self._objects.pop(name, 0)
        self._delete_row(record)

    def _delete_row(self, record: np.void) -> ChunkRecords:
        """Delete the row of a record, if it still names this very object; the records it had."""
        key = index_key(record.tobytes())
        row = self._index.get(key)
        if row is None or all(object_name(stored) != object_name(record) for stored in row_records(row)):
            return _one(record)[:0]
        self._index.delete([key])
        return row_records(row)

    # ---- forget, recover ----

    def invalidate(self, namespace: int, chunks: ChunkRecords) -> int:
        """Forget `chunks`, or, if none are named, a namespace (0: all). Rows that went.

        Objects that cannot be deleted now are deleted when the store answers again, as long as this process lives.
        """
        if len(chunks):
            keys = [key for key in dict.fromkeys(index_keys(chunks)) if self._index.get(key) is not None]
            prefixes = [chunk_prefix(record) for record in chunks]
        else:
            keys = [
                key
                for batch in self._index.scan()
                for key, row in batch
                if not namespace or int(row_records(row)["namespace"][0]) == namespace
            ]
            prefixes = [namespace_prefix(namespace)] if namespace else [""]
        removed = sum(self._index.delete(keys[at : at + 4096]) for at in range(0, len(keys), 4096))
        with self._lock:
            names = {name for name in self._objects if any(name.startswith(prefix) for prefix in prefixes)}
        for prefix in prefixes:  # those of other nodes, and of chunks saved twice
            try:
                names.update(name for name, size in self._list(prefix) if _is_ours(name, size))
            except TierDown:
                break
        self._delete(sorted(names))
        with self._lock:
            for name in names:
                self.used_bytes -= self._objects.pop(name, 0)
        return removed

    def tick(self) -> None:
        """To be called every second; looks after the index's readers, deletes what is owed. May block."""
        self._index.tick()
        if self._owed:
            self._delete([])
        if self._reads.reason:  # whether it answers again is known before somebody waits for it
            with contextlib.suppress(TierDown):
                self._list(PROBE)

    def recover(self) -> Recovered:
        """Publish the index and fill it from a listing; what is over the capacity is given up.

        Raises:
            TierDown: the store cannot be listed; only what is saved from now on has rows.
        """
        self._index.publish()
        found: list[np.void] = []
        strange = 0
        for name, size in self._list(""):
            try:
                found.append(parse_name(name, size))
            except FormatError:
                strange += 1
        records = join([_one(record) for record in sorted(found, key=lambda record: int(record["saved_at"]))])
        with self._lock:
            since = self._objects  # what was put while the store could not be listed
            self._objects = {object_name(record): int(record["nbytes"]) + BLOCK_BYTES for record in records} | since
            self.used_bytes = sum(self._objects.values())
        lost = 0
        rows = newest(records)
        for at in range(0, len(rows), BATCH_ROWS):
            if not self._index.put_records(rows[at : at + BATCH_ROWS]):
                lost += len(rows[at : at + BATCH_ROWS])
        self._take_room(0)  # who died while objects were deleted has left more than the capacity
        return Recovered(self._index.count(), len(records), strange, lost)

    # ---- the store ----

    def _ask(self, call: Callable[[], T], breaker: Breaker) -> T:
        """Make a call under a breaker: a store that is full, or lets nobody write, can be read all the same.

        Raises:
            TierDown: it failed, or the store is left alone at present.
            FileNotFoundError: there is no such object.
            AlreadyExistsError: there is one.
        """
        if not breaker.allows():
            raise TierDown(breaker.reason or "the store is being tried")
        try:
            failpoints.hit("remote.ask.begun")
            answer = call()
        except (FileNotFoundError, AlreadyExistsError):
            breaker.succeeded()
            raise
        except (BaseError, OSError) as error:
            breaker.failed(_short(error))
            raise TierDown(_short(error)) from error
        breaker.succeeded()
        return answer

    def _list(self, prefix: str) -> list[tuple[str, int]]:
        def listed() -> list[tuple[str, int]]:
            pages = obstore.list(self._store, prefix or None, chunk_size=1000)  # pyright: ignore
            return [(item["path"], item["size"]) for page in pages for item in page]

        try:
            return self._ask(listed, self._reads)
        except FileNotFoundError:
            return []

    def _delete(self, names: Sequence[str]) -> None:
        """Delete objects and those owed; what fails is owed."""
        with self._lock:
            self._owed.update(names)
            owed = sorted(self._owed)
        for at in range(0, len(owed), DELETE_AT_ONCE):
            part = owed[at : at + DELETE_AT_ONCE]
            try:
                self._ask(lambda part=part: obstore.delete(self._store, part), self._writes)
            except TierDown:
                return
            except FileNotFoundError:
                if not self._delete_singly(part):
                    return
            with self._lock:
                self._owed.difference_update(part)

    def _delete_singly(self, names: Sequence[str]) -> bool:
        """Some stores stop at the first object that is not there."""
        for name in names:
            try:
                self._ask(lambda name=name: obstore.delete(self._store, name), self._writes)
            except FileNotFoundError:
                continue
            except TierDown:
                return False
        return True


def _one(record: np.void) -> ChunkRecords:
    return record.reshape(1).copy()


def _is_ours(name: str, nbytes: int) -> bool:
    try:
        parse_name(name, nbytes)
    except FormatError:
        return False
    return True


def _bytes_of(name: str) -> int:
    """Size of an object by its name."""
    return int(name.rsplit("-", 3)[1], 16) + BLOCK_BYTES


def _short(error: Exception) -> str:
    """The first line of an obstore error: the rest is its inner structure."""
    return str(error).split("\n", 1)[0][:300]
