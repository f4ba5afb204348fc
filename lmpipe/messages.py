"""The messages between producers and stages. No I/O: frames in, messages out, and back.

A message is a header frame and one frame for each array:

    +------------------------------------------------------------------+
    | {"v":2,"type":"Save","session":7,"save_id":3, …,                 |  frame 0, JSON, at most 1 MiB
    |  "arrays":[["chunks","chunk",[16]],["page_ids","i4",[16,32]]]}   |  name, dtype, shape: all of them, in this order
    +------------------------------------------------------------------+
    | 16 chunk records of 72 bytes (handles.py)                        |  frame 1, C order, little-endian
    +------------------------------------------------------------------+
    | 16 x 32 int32                                                    |  frame 2
    +------------------------------------------------------------------+

Dtypes on the wire: "chunk" (the 72-byte record), "key" (anchor and key, 20 bytes), "i4", "u8". What does not fit
(another version, an unknown or missing field, a wrong type, a length or count out of bounds, a frame too many) is
refused with a `MessageError` that names the field. Arrays that come in are views of the frames: take them as read-only,
copy before writing.

`session` is the sender's. `save_id`, `load_id` and `ref` are chosen by the sender and unique in its session. A message
that names pages is valid for one session and is delivered at most once; one that names keys may be sent again.

The annotations below are the format and its bounds; wire.py has the machinery.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt
import orjson
from msgspec import Meta

from lmpipe.errors import LayoutError, MessageError
from lmpipe.handles import CHUNK, ChunkRecords, Codec, SessionId, Tier
from lmpipe.index_row import INDEX_KEY_BYTES
from lmpipe.layout import KVLayout
from lmpipe.page_source import DeviceHeader, MappedHeader, source_of
from lmpipe.page_source import DeviceSource as DeviceSource
from lmpipe.page_source import PageSource as PageSource
from lmpipe.wire import MAX_HEADER_BYTES, MAX_TEXT, ArraySpec, Frame, Via, Wire, equal

MAX_CHUNKS = 1 << 16
MAX_PAGE_IDS = 1 << 22
MAX_LOOKUP_KEYS = 1 << 14
MAX_FRAME_BYTES = max(MAX_HEADER_BYTES, MAX_CHUNKS * CHUNK.itemsize, MAX_PAGE_IDS * 4)

PageIds = npt.NDArray[np.int32]
Places = npt.NDArray[np.uint64]
IndexKeys = npt.NDArray[np.void]
INDEX_KEY = np.dtype(f"V{INDEX_KEY_BYTES}")
"""anchor ‖ key of a chunk, as the index has it."""

# The record fields that the code behind uses as they are: shard, shards, codec.
_NUMBERS = struct.Struct("<24xHHH42x")
assert _NUMBERS.size == CHUNK.itemsize
_LAST_CODEC = int(max(Codec))
_FEW = 64
"""Up to here a loop beats NumPy, by far when the caches are cold, as they are when a message arrives."""


def _check_records(name: str, count: int, frame: Frame) -> None:
    if count <= _FEW:
        numbers = list(_NUMBERS.iter_unpack(frame))
        shards_right = all(shard < shards for shard, shards, _ in numbers)
        codecs_right = all(codec <= _LAST_CODEC for _, _, codec in numbers)
    else:
        records = np.ndarray(count, CHUNK, frame)
        shards_right = not np.count_nonzero(records["shard"] >= records["shards"])
        codecs_right = not np.count_nonzero(records["codec"] > _LAST_CODEC)
    if not shards_right:
        raise MessageError(f"{name}.shard", "is not below shards")
    if not codecs_right:
        raise MessageError(f"{name}.codec", "is unknown")


_Session = Annotated[SessionId, Meta(ge=1, le=2**63 - 1)]
_Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_U16 = Annotated[int, Meta(ge=0, le=2**16 - 1)]
_U31 = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Word = Annotated[str, Meta(max_length=64)]
_Hex = Annotated[str, Meta(max_length=64, pattern=r"\A([0-9a-f]{2})*\Z")]
_Reason = Annotated[str, Meta(max_length=MAX_TEXT)]
_Chunks = Annotated[ChunkRecords, ArraySpec("chunk", CHUNK, 1, MAX_CHUNKS, MAX_CHUNKS, _check_records)]
_PageIds = Annotated[PageIds, ArraySpec("i4", np.dtype("<i4"), 2, MAX_CHUNKS, MAX_PAGE_IDS)]
_Rows = Annotated[PageIds, ArraySpec("i4", np.dtype("<i4"), 2, MAX_CHUNKS, 3 * MAX_CHUNKS)]
_Keys = Annotated[IndexKeys, ArraySpec("key", INDEX_KEY, 1, MAX_LOOKUP_KEYS, MAX_LOOKUP_KEYS)]
_Places = Annotated[Places, ArraySpec("u8", np.dtype("<u8"), 1, MAX_CHUNKS, MAX_CHUNKS)]


def no_chunks() -> ChunkRecords:
    """An empty record array."""
    return np.empty(0, CHUNK)


def no_rows() -> PageIds:
    """An empty array of `Found.rows`."""
    return np.empty((0, 3), np.int32)


def no_pages() -> PageIds:
    """An empty page id array: the chunks' bytes lie in slots."""
    return np.empty((0, 0), np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """Base of all messages. Equal when all fields are, arrays byte by byte."""

    session: _Session

    def __eq__(self, other: object) -> bool:
        return equal(self, other)

    __hash__ = None  # type: ignore[assignment]


LayoutFields = dict[str, Any]
"""The fields of a `KVLayout`, as `dataclasses.asdict` gives them."""


def kv_layout(layout: LayoutFields) -> KVLayout:
    """Inverse of `asdict`.

    Raises:
        MessageError: not the fields of a layout that can exist.
    """
    if layout.keys() != {f.name for f in fields(KVLayout)}:
        raise MessageError("layout", f"fields {sorted(layout)}, wanted those of KVLayout")
    try:
        return msgspec.convert(layout, KVLayout)
    except (msgspec.ValidationError, LayoutError) as error:
        raise MessageError("layout", str(error)) from None


def _layout_fields(header: dict[str, Any]) -> LayoutFields:
    layout: LayoutFields = {}
    for key, value in header.items():
        layout[key] = tuple(cast("list[str]", value)) if isinstance(value, list) else value
    kv_layout(layout)
    return layout


_LayoutHeader = dict[_Word, _U31 | _Word | Annotated[list[_Word], Meta(max_length=8)]]


@dataclass(frozen=True, slots=True, eq=False)
class Register(Message):
    """A producer or stage introduces itself. `namespace`: hex digest; `leases`: arena slots it wants lent."""

    versions: Annotated[list[_U16], Meta(max_length=16)]
    role: Literal["producer", "stage"]
    name: _Word
    pid: _U31
    layout: Annotated[LayoutFields | None, Via(_LayoutHeader, _layout_fields)]
    chunk_tokens: _U31
    shard: _U16
    shards: _U16
    namespace: _Hex
    leases: _U16
    pages: Annotated[PageSource | DeviceSource | None, Via(MappedHeader | DeviceHeader, source_of)] = None


@dataclass(frozen=True, slots=True, eq=False)
class Registered(Message):
    """Welcome: the version to speak, the chunk size in force, the slots lent."""

    version: _U16
    chunk_tokens: _U31
    chunk_bytes: _Id
    leases: _Places


@dataclass(frozen=True, slots=True, eq=False)
class Refused(Message):
    """A message was not accepted: its type, its id (0: none or unreadable), why."""

    about: _Word
    ref: _Id
    reason: _Reason


@dataclass(frozen=True, slots=True, eq=False)
class Save(Message):
    """Chunks to keep: slots (`place`), or in `segment` "pages" the engine's pages, under the grant word `grant`."""

    save_id: _Id
    segment: _Word
    chunks: _Chunks
    page_ids: _PageIds = field(default_factory=no_pages)
    grant: Annotated[int, Meta(ge=-1, le=2**16 - 1)] = -1


@dataclass(frozen=True, slots=True, eq=False)
class Saved(Message):
    """The chunks are visible to lookups in DRAM."""

    save_id: _Id
    chunks: _Chunks


@dataclass(frozen=True, slots=True, eq=False)
class SaveDropped(Message):
    """The tier did not take the chunks. `again`: because it is down; it is sent them again when it is not."""

    save_id: _Id
    tier: Tier
    reason: _Reason
    chunks: _Chunks
    again: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Persisted(Message):
    """The tier has the chunks, flushed by its policy."""

    tier: Tier
    chunks: _Chunks


@dataclass(frozen=True, slots=True, eq=False)
class Load(Message):
    """Bring chunks into slots. `deadline_ns`: CLOCK_MONOTONIC, 0 for none."""

    load_id: _Id
    chunks: _Chunks
    segment: _Word = "arena"
    deadline_ns: _Id = 0


@dataclass(frozen=True, slots=True, eq=False)
class Loaded(Message):
    """These chunks of a load are in the slots their `place` names."""

    load_id: _Id
    segment: _Word
    chunks: _Chunks


@dataclass(frozen=True, slots=True, eq=False)
class LoadFailed(Message):
    """These chunks of a load will not come; leases that went with them are returned."""

    load_id: _Id
    reason: _Reason
    chunks: _Chunks


@dataclass(frozen=True, slots=True, eq=False)
class Lookup(Message):
    """Which rows has each tier of these chunks of a prompt? From one who cannot map the index (docs/decisions/0017)."""

    ref: _Id
    keys: _Keys


@dataclass(frozen=True, slots=True, eq=False)
class Found(Message):
    """What was there of a prompt from its start up to the first chunk of which no tier has anything. Holds are taken by
    who asked, as after a lookup of its own.

    `rows`: (rows, 3), each the chunk's number in the lookup, the tier's in `tiers`, and how many of `chunks` are its.
    """

    ref: _Id
    tiers: Annotated[list[Tier], Meta(max_length=8)]
    rows: _Rows
    chunks: _Chunks


@dataclass(frozen=True, slots=True, eq=False)
class Prefetch(Message):
    """Bring these chunks up to DRAM; nobody waits."""

    chunks: _Chunks


@dataclass(frozen=True, slots=True, eq=False)
class Cancel(Message):
    """Nobody waits for this load any more."""

    load_id: _Id


@dataclass(frozen=True, slots=True, eq=False)
class Touch(Message):
    """These chunks were used."""

    chunks: _Chunks


@dataclass(frozen=True, slots=True, eq=False)
class Pin(Message):
    """Keep these chunks from eviction for `ttl_s` (`pin` False: no longer)."""

    ref: _Id
    pin: bool
    chunks: _Chunks
    ttl_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Pinned(Message):
    """So many chunks are now pinned, or no longer."""

    ref: _Id
    count: _U31


@dataclass(frozen=True, slots=True, eq=False)
class Invalidate(Message):
    """Forget chunks: those of a namespace (0: of all), or, if any are named, only these."""

    ref: _Id
    namespace: Annotated[int, Meta(ge=0)] = 0
    tiers: Annotated[list[Tier], Meta(max_length=8)] = field(default_factory=lambda: list(Tier))
    chunks: _Chunks = field(default_factory=no_chunks)


@dataclass(frozen=True, slots=True, eq=False)
class Invalidated(Message):
    """So many rows are gone."""

    ref: _Id
    removed: _Id


@dataclass(frozen=True, slots=True, eq=False)
class Recode(Message):
    """Store the chunks of a namespace (0: all) that lie in DRAM by another codec, where that can be done."""

    ref: _Id
    codec: _Word
    namespace: Annotated[int, Meta(ge=0)] = 0


@dataclass(frozen=True, slots=True, eq=False)
class Recoded(Message):
    """So many chunks are of that codec now that were not before, and the bytes they took and take. `left`: how many
    stay as they were, by reason.
    """

    ref: _Id
    recoded: _Id
    before_bytes: _Id
    after_bytes: _Id
    left: Annotated[dict[_Reason, _Id], Meta(max_length=64)]


@dataclass(frozen=True, slots=True, eq=False)
class Release(Message):
    """The sender needs these slots no more."""

    segment: _Word
    places: _Places


@dataclass(frozen=True, slots=True, eq=False)
class Credit(Message):
    """Arena slots leased to the receiver."""

    places: _Places


@dataclass(frozen=True, slots=True, eq=False)
class Evicted(Message):
    """The tier keeps these chunks no longer."""

    tier: Tier
    chunks: _Chunks


@dataclass(frozen=True, slots=True, eq=False)
class Ping(Message):
    """Are you there?"""

    sent_ns: _Id


@dataclass(frozen=True, slots=True, eq=False)
class Pong(Message):
    """Yes. `sessions`: this stage's, then those `below`, by name. `sent_ns` 0: unasked, the chain has changed."""

    sent_ns: _Id
    stage: _Word
    sessions: Annotated[list[_Session], Meta(min_length=1, max_length=16)]
    state: Literal["ready", "draining"] = "ready"
    below: Annotated[list[_Word], Meta(max_length=15)] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True, eq=False)
class Drain(Message):
    """Finish what you have, then say so."""

    ref: _Id


@dataclass(frozen=True, slots=True, eq=False)
class Drained(Message):
    """Nothing is left."""

    ref: _Id


TYPES: Sequence[type[Message]] = (
    Register,
    Registered,
    Refused,
    Save,
    Saved,
    SaveDropped,
    Persisted,
    Load,
    Loaded,
    LoadFailed,
    Lookup,
    Found,
    Prefetch,
    Cancel,
    Touch,
    Pin,
    Pinned,
    Invalidate,
    Invalidated,
    Recode,
    Recoded,
    Release,
    Credit,
    Evicted,
    Ping,
    Pong,
    Drain,
    Drained,
)
_REFS = ("save_id", "load_id", "ref")


def _check_register(message: Register) -> None:
    if message.shard >= message.shards:
        raise MessageError("shard", f"{message.shard} is not below shards ({message.shards})")


def _check_save(message: Save) -> None:
    rows, wanted = len(message.page_ids), len(message.chunks) if message.segment == "pages" else 0
    if rows != wanted:
        raise MessageError("page_ids", f"{rows} rows for {wanted} chunks in pages")
    if message.page_ids.size and message.page_ids.min() < 0:
        raise MessageError("page_ids", "a page id is negative")


def _check_found(message: Found) -> None:
    rows = message.rows
    if rows.shape[1] != 3:
        raise MessageError("rows", f"{rows.shape[1]} columns, wanted 3")
    if rows.size and (rows.min() < 0 or rows[:, 2].min() < 1 or rows[:, 1].max() >= len(message.tiers)):
        raise MessageError("rows", f"a number below 0, a row of no records, or a tier that is none of {message.tiers}")
    if (wanted := int(rows[:, 2].sum(dtype=np.int64))) != len(message.chunks):
        raise MessageError("chunks", f"{len(message.chunks)}, the rows have {wanted}")


def _check_namespace(message: Invalidate | Recode) -> None:
    if message.namespace >= 2**64:
        raise MessageError("namespace", "does not fit 64 bits")


def _check_pong(message: Pong) -> None:
    if len(message.below) != len(message.sessions) - 1:
        raise MessageError("below", f"{len(message.below)} names for {len(message.sessions) - 1} sessions")


_CHECKS: dict[type[Message], Callable[[Any], None]] = {
    Register: _check_register,
    Save: _check_save,
    Found: _check_found,
    Invalidate: _check_namespace,
    Recode: _check_namespace,
    Pong: _check_pong,
}
_WIRE: Wire[Message] = Wire(TYPES, _CHECKS)
encode = _WIRE.encode
decode = _WIRE.decode


def _getter(cls: type[Message], *names: str) -> Callable[[Message], Any] | None:
    return next((attrgetter(f.name) for f in fields(cls) if f.name in names), None)


_CHUNKS: dict[type[Message], Callable[[Message], Any]] = {
    cls: getter for cls in TYPES if (getter := _getter(cls, "chunks"))
}
_REF: dict[type[Message], Callable[[Message], int]] = {cls: getter for cls in TYPES if (getter := _getter(cls, *_REFS))}


def chunk_count(message: Message) -> int:
    """How many chunks a message names."""
    getter = _CHUNKS.get(type(message))
    return len(getter(message)) if getter else 0


def id_of(message: Message) -> int:
    """What an answer to it refers to: the id of the save or load, or `ref`; 0 for messages without one."""
    getter = _REF.get(type(message))
    return getter(message) if getter else 0


def refusal(frames: Sequence[Frame], session: SessionId, error: MessageError) -> Refused:
    """The answer to frames that `decode` refused, with their type and id as far as these can be read."""
    about, ref = "", 0
    if frames and len(frames[0]) <= 4096:
        try:
            header: Any = orjson.loads(frames[0])
        except orjson.JSONDecodeError:
            header = None
        if isinstance(header, dict):
            said = msgspec.convert(header, dict[Any, Any])
            about = next((cls.__name__ for cls in TYPES if cls.__name__ == said.get("type")), "")
            ids = [said[name] for name in _REFS if name in said]
            ref = next((value for value in ids if type(value) is int and 0 <= value < 2**63), 0)
    return Refused(session, about, ref, str(error))
