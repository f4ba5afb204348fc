"""Every message there and back, against bytes kept in golden files, and against bytes that are none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe import messages as m
from lmpipe.errors import MessageError
from lmpipe.handles import CHUNK, ChunkRecords, SessionId, Tier
from lmpipe.layout import KVLayout
from lmpipe.messages import Message, decode, encode

GOLDEN = Path(__file__).parent / "golden" / "messages"
ME = SessionId(0x1122334455667788)


def records(count: int) -> ChunkRecords:
    chunks = np.zeros(count, CHUNK)
    chunks["key"] = [(i + 1).to_bytes(16, "little") for i in range(count)]
    chunks["anchor"] = b"anch"
    chunks["position"] = np.arange(count)
    chunks["shards"] = 2
    chunks["shard"] = np.arange(count) % 2
    chunks["layout"] = 0xFEDCBA9876543210
    chunks["raw_bytes"] = 32 << 20
    chunks["nbytes"] = 20 << 20
    chunks["place"] = (np.arange(count, dtype=np.uint64) << np.uint64(32)) | np.uint64(7)
    chunks["saved_at"] = 1_700_000_000
    chunks["namespace"] = 2**64 - 1
    return chunks


PLACES = np.array([1 << 32 | 1, 2 << 32 | 9], np.uint64)
LAYOUT = dataclasses.asdict(KVLayout.paged(32, 8, 128, "bfloat16", 16))
PAGES = m.PageSource(
    "/dev/shm/pages",
    "00ff" * 8,
    np.arange(3, dtype=np.uint64),
    np.full(3, 4096, np.uint64),
    np.full(3, 64, np.uint64),
    100,
)

HANDLES = [bytes(range(64)).hex(), bytes(range(64, 128)).hex()]
DEVICE_PAGES = m.DeviceSource(
    "GPU-00112233-4455-6677-8899-aabbccddeeff",
    HANDLES,
    np.array([100 * 4096, 1 << 20], np.uint64),
    np.array([0, 0, 1], np.uint64),
    np.array([0, 64, 4096], np.uint64),
    np.full(3, 4096, np.uint64),
    np.full(3, 64, np.uint64),
    100,
    HANDLES[0],
)

SAMPLES: list[Message] = [
    m.Register(ME, [1], "producer", "engine", 4711, LAYOUT, 256, 0, 2, "ab" * 32, 16, PAGES),
    m.Registered(ME, 1, 256, 32 << 20, PLACES),
    m.Refused(ME, "Save", 9, "chunks: 3 bytes"),
    m.Save(ME, 9, "pages", records(3), np.arange(12, dtype=np.int32).reshape(3, 4), 5),
    m.Saved(ME, 9, records(2)),
    m.SaveDropped(ME, 9, Tier.SSD, "full", records(1)),
    m.Persisted(ME, Tier.REMOTE, records(2)),
    m.Load(ME, 2**63 - 1, records(2), "arena", 123_456_789),
    m.Loaded(ME, 10, "ring.persist", records(2)),
    m.LoadFailed(ME, 10, "stale", records(1)),
    m.Lookup(ME, 12, np.frombuffer(bytes(range(40)), m.INDEX_KEY)),
    m.Found(ME, 12, [Tier.DRAM, Tier.SSD], np.array([[0, 0, 2], [1, 1, 1]], np.int32), records(3)),
    m.Prefetch(ME, records(2)),
    m.Cancel(ME, 10),
    m.Touch(ME, records(1)),
    m.Pin(ME, 11, True, records(1), 60.5),
    m.Pinned(ME, 11, 1),
    m.Invalidate(ME, 3, 2**64 - 1, [Tier.DRAM, Tier.SSD], records(1)),
    m.Invalidated(ME, 3, 12),
    m.Recode(ME, 5, "split", 2**64 - 1),
    m.Recoded(ME, 5, 7, 7 << 20, 5 << 20, {"no room in DRAM": 2}),
    m.Release(ME, "ring.persist", PLACES),
    m.Credit(ME, PLACES),
    m.Evicted(ME, Tier.DRAM, records(2)),
    m.Ping(ME, 1),
    m.Pong(ME, 1, "compress", [ME, SessionId(5)], "draining", ["persist"]),
    m.Drain(ME, 4),
    m.Drained(ME, 4),
]
BY_NAME = {type(sample).__name__: sample for sample in SAMPLES}
ON_DEVICE = dataclasses.replace(BY_NAME["Register"], pages=DEVICE_PAGES)
SAMPLES.append(ON_DEVICE)
all_types = pytest.mark.parametrize("name", sorted(BY_NAME))


def test_every_type_has_a_sample() -> None:
    assert {type(sample) for sample in SAMPLES} == set(m.TYPES)


@all_types
def test_golden_bytes(name: str) -> None:
    """The wire stays as it is: a change here is a new `VERSION`. One line of hex for each frame."""
    frames = [bytes(frame) for frame in encode(BY_NAME[name])]
    golden = [bytes.fromhex(line) for line in (GOLDEN / f"{name}.hex").read_text().split("\n")[:-1]]
    assert frames == golden
    assert decode(golden) == BY_NAME[name]


def test_golden_bytes_of_pages_on_a_device() -> None:
    (golden,) = (GOLDEN / "Register.device.hex").read_text().splitlines()
    assert [bytes(frame) for frame in encode(ON_DEVICE)] == [bytes.fromhex(golden)]
    assert decode([bytes.fromhex(golden)]) == ON_DEVICE != BY_NAME["Register"]


@all_types
def test_round_trip_gives_equal_message_and_types(name: str) -> None:
    sample = BY_NAME[name]
    back = decode([memoryview(frame) for frame in encode(sample)])
    assert back == sample
    for f in dataclasses.fields(sample):
        assert type(getattr(back, f.name)) is type(getattr(sample, f.name)), f.name
    assert dataclasses.replace(sample, session=SessionId(1)) != sample


@all_types
def test_empty_arrays_and_no_options(name: str) -> None:
    sample = BY_NAME[name]
    if m.chunk_count(sample):
        sample = dataclasses.replace(sample, chunks=m.no_chunks())
    if isinstance(sample, m.Save):
        sample = dataclasses.replace(sample, page_ids=m.no_pages(), grant=-1)
    if isinstance(sample, m.Found):
        sample = dataclasses.replace(sample, rows=m.no_rows())
    if isinstance(sample, m.Lookup):
        sample = dataclasses.replace(sample, keys=sample.keys[:0])
    if isinstance(sample, m.Register):
        sample = dataclasses.replace(sample, layout=None, pages=None)
    assert decode(encode(sample)) == sample


def test_large_arrays_are_not_copied_and_come_back() -> None:
    save = m.Save(ME, 1, "pages", records(500), np.arange(500 * 32, dtype=np.int32).reshape(500, 32), 1)
    frames = encode(save)
    assert np.shares_memory(np.frombuffer(frames[2], np.uint8), save.page_ids)
    assert decode(frames) == save


def test_layout_comes_back_as_a_layout() -> None:
    register = decode(encode(BY_NAME["Register"]))
    assert isinstance(register, m.Register) and register.layout is not None
    assert m.kv_layout(register.layout) == KVLayout(**register.layout) == KVLayout.paged(32, 8, 128, "bfloat16", 16)


def changed(name: str, **fields: object) -> list[bytes | memoryview]:
    frames = encode(BY_NAME[name])
    header = orjson.loads(frames[0])
    header.update(fields)
    return [orjson.dumps({key: value for key, value in header.items() if value is not ...}), *frames[1:]]


def device_pages(**fields: object) -> list[bytes | memoryview]:
    header = orjson.loads(encode(ON_DEVICE)[0])
    header["pages"].update(fields)
    return [orjson.dumps(header)]


def without(name: str, field: str) -> list[bytes | memoryview]:
    frames = encode(BY_NAME[name])
    header = orjson.loads(frames[0])
    del header[field]
    return [orjson.dumps(header), *frames[1:]]


def bad_record(**fields: object) -> list[bytes | memoryview]:
    chunks = records(3)
    for field, value in fields.items():
        chunks[field][1] = value
    return encode(m.Touch(ME, chunks))


def found(rows: npt.ArrayLike) -> list[bytes | memoryview]:
    return encode(dataclasses.replace(BY_NAME["Found"], rows=np.array(rows, np.int32)))


SAVE = encode(BY_NAME["Save"])
WRONG: dict[str, tuple[list[bytes | memoryview], str]] = {
    "no frames": ([], "frames"),
    "not JSON": ([b"\x80\x04pickle"], "header"),
    "not an object": ([b"[1]"], "header"),
    "not UTF-8": ([b'{"type":"\xff\xff"}'], "header"),
    "deep": ([b"[" * 100_000], "header"),
    "deep inside": ([b'{"type":"Ping","v":2,"x":' + b'{"a":' * 100_000], "x"),
    "large header": ([b" " * (1 << 20) + b"{}"], "frames"),
    "other version": (changed("Ping", v=3), "v"),
    "no version": (without("Ping", "v"), "v"),
    "unknown type": (changed("Ping", type="Pung"), "type"),
    "no type": (without("Ping", "type"), "type"),
    "unknown field": (changed("Ping", color=1), "color"),
    "missing field": (without("Ping", "sent_ns"), "sent_ns"),
    "text for a number": (changed("Save", save_id="1"), "save_id"),
    "float for a number": (changed("Save", save_id=1.0), "save_id"),
    "bool for a number": (changed("Save", save_id=True), "save_id"),
    "negative id": (changed("Save", save_id=-1), "save_id"),
    "id of 64 bits": (changed("Save", save_id=2**63), "save_id"),
    "no session": (changed("Ping", session=0), "session"),
    "long text": (changed("Save", segment="x" * 65), "segment"),
    "grant below -1": (changed("Save", grant=-2), "grant"),
    "unknown tier": (changed("Evicted", tier="tape"), "tier"),
    "unknown role": (changed("Register", role="boss"), "role"),
    "namespace not hex": (changed("Register", namespace="zz"), "namespace"),
    "namespace with a newline": (changed("Register", namespace="ab\n"), "namespace"),
    "shard not below shards": (changed("Register", shard=2), "shard"),
    "layout of another shape": (changed("Register", layout={"layers": 1}), "layout"),
    "layout that cannot exist": (changed("Register", layout={**LAYOUT, "dtype": "int2"}), "layout"),
    "layout of wrong types": (changed("Register", layout={**LAYOUT, "layers": "32"}), "layout"),
    "large namespace": ([changed("Invalidate")[0].replace(b"615,", b"6150,"), *changed("Invalidate")[1:]], "namespace"),
    "no sessions": (changed("Pong", sessions=[]), "sessions"),
    "names missing": (changed("Pong", below=[]), "below"),
    "many versions": (changed("Register", versions=list(range(17))), "versions"),
    "infinite ttl": ([changed("Pin")[0].replace(b"60.5", b"1e999"), *changed("Pin")[1:]], "ttl_s"),
    "array of another name": (changed("Touch", arrays=[["keys", "chunk", [1]]]), "chunks"),
    "array of another dtype": (changed("Touch", arrays=[["chunks", "u8", [9]]]), "chunks"),
    "array of another dimension": (changed("Touch", arrays=[["chunks", "chunk", [1, 1]]]), "chunks"),
    "array too long": (changed("Touch", arrays=[["chunks", "chunk", [m.MAX_CHUNKS + 1]]]), "chunks"),
    "array of a huge product": (
        changed("Save", arrays=[["chunks", "chunk", [3]], ["page_ids", "i4", [3, 2**31 - 1]]]),
        "page_ids",
    ),
    "rows without elements": (
        changed("Save", arrays=[["chunks", "chunk", [3]], ["page_ids", "i4", [2**31 - 1, 0]]]),
        "page_ids",
    ),
    "negative shape": (changed("Touch", arrays=[["chunks", "chunk", [-1]]]), "arrays"),
    "array unnamed": (changed("Save", arrays=[["chunks", "chunk", [3]]]), "arrays"),
    "frame too few": (SAVE[:2], "frames"),
    "frame too many": ([*SAVE, b""], "frames"),
    "frame too short": ([SAVE[0], bytes(SAVE[1])[:-1], SAVE[2]], "chunks"),
    "frame too long": ([SAVE[0], bytes(SAVE[1]) + b"\0", SAVE[2]], "chunks"),
    "page ids for slots": (changed("Save", segment="arena"), "page_ids"),
    "negative page id": ([*SAVE[:2], np.full(12, -1, np.int32).tobytes()], "page_ids"),
    "rows of two columns": (found(np.zeros((1, 2), np.int32)), "rows"),
    "row of a negative chunk": (found([[-1, 0, 2], [1, 1, 1]]), "rows"),
    "row of an unknown tier": (found([[0, 0, 2], [1, 2, 1]]), "rows"),
    "row without a record": (found([[0, 0, 3], [1, 1, 0]]), "rows"),
    "rows of more records than there are": (found([[0, 0, 2], [1, 1, 2]]), "chunks"),
    "too many keys": (changed("Lookup", arrays=[["keys", "key", [m.MAX_LOOKUP_KEYS + 1]]]), "keys"),
    "pages of an unknown memory": (device_pages(memory="tape"), "pages.memory"),
    "fields of a segment on a device": (device_pages(segment="/dev/shm/x"), "segment"),
    "device without a UUID": (device_pages(device="0"), "pages.device"),
    "handle too short": (device_pages(handles=["00"] * 2), "pages.handles"),
    "handle not hex": (device_pages(handles=[HANDLES[0], "zz" * 64]), "pages.handles"),
    "handle twice": (device_pages(handles=HANDLES[:1] * 2), "pages"),
    "no handle": (device_pages(handles=[], allocation_bytes=[]), "pages.handles"),
    "handles without sizes": (device_pages(allocation_bytes=[1 << 20]), "pages"),
    "event not a handle": (device_pages(written_event=""), "pages.written_event"),
    "planes of different length": (device_pages(plane_offset=[0]), "pages"),
    "plane in no allocation": (device_pages(plane_allocation=[0, 0, 2]), "pages"),
    "plane past its allocation": (device_pages(plane_offset=[0, 4096 - 63, 0]), "pages"),
    "plane past its allocation by its pages": (device_pages(pages=101), "pages"),
    "pages far apart": (device_pages(page_stride=[4096, 4096, 2**63 - 1]), "pages"),
    "no pages": (device_pages(pages=0), "pages.pages"),
    "too many planes": (device_pages(plane_offset=[0] * 4097), "pages.plane_offset"),
    "record of no shards": (bad_record(shards=0, shard=0), "chunks"),
    "record of an unknown codec": (bad_record(codec=999), "chunks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_field(case: str) -> None:
    frames, at_fault = WRONG[case]
    with pytest.raises(MessageError) as caught:
        decode(frames)
    assert caught.value.field.startswith(at_fault), caught.value


@pytest.mark.parametrize("count", [64, 65])
@pytest.mark.parametrize(("field", "value"), [("shard", 2), ("codec", 7)])
def test_every_record_is_checked_however_many_there_are(count: int, field: str, value: int) -> None:
    chunks = records(count)
    assert decode(encode(m.Touch(ME, chunks))) == m.Touch(ME, chunks)
    chunks[field][count - 1] = value
    with pytest.raises(MessageError, match=f"chunks.{field}"):
        decode(encode(m.Touch(ME, chunks)))


def test_an_array_of_another_dtype_is_not_sent() -> None:
    with pytest.raises(MessageError, match="page_ids"):
        encode(m.Save(ME, 1, "pages", records(1), np.zeros((1, 2), np.int64), 0))  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="places"):
        encode(m.Credit(ME, PLACES.reshape(1, 2)))


def test_a_long_reason_is_cut() -> None:
    refused = decode(encode(m.Refused(ME, "Save", 1, "é" * 10_000)))
    assert isinstance(refused, m.Refused) and refused.reason == "é" * 512


def test_refusal_names_what_can_still_be_read() -> None:
    error = MessageError("chunks", "3 bytes")
    assert m.refusal(SAVE[:2], ME, error) == m.Refused(ME, "Save", 9, "chunks: 3 bytes")
    assert m.refusal(changed("Load", load_id="x"), ME, error) == m.Refused(ME, "Load", 0, "chunks: 3 bytes")
    for frames in ([], [b"{"], [b"[]"], [b'{"type":[],"ref":1.5}'], [b"x" * 5000]):
        assert m.refusal(frames, ME, error) == m.Refused(ME, "", 0, "chunks: 3 bytes")


def test_ids_and_counts() -> None:
    assert {name: m.id_of(sample) for name, sample in BY_NAME.items() if m.id_of(sample)} == {
        **dict.fromkeys(["Save", "Saved", "SaveDropped", "Refused"], 9),
        **dict.fromkeys(["Loaded", "LoadFailed", "Cancel"], 10),
        **dict.fromkeys(["Invalidate", "Invalidated"], 3),
        **dict.fromkeys(["Recode", "Recoded"], 5),
        **dict.fromkeys(["Drain", "Drained"], 4),
        **dict.fromkeys(["Pin", "Pinned"], 11),
        **dict.fromkeys(["Lookup", "Found"], 12),
        "Load": 2**63 - 1,
    }
    assert m.chunk_count(BY_NAME["Save"]) == 3 and m.chunk_count(BY_NAME["Ping"]) == 0


def survives(frames: list[bytes]) -> None:
    """Either a message, or a `MessageError`; and the refusal of it is a message too."""
    try:
        decode(frames)
    except MessageError as error:
        decode(encode(m.refusal(frames, ME, error)))


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_random_frames(frames: list[bytes]) -> None:
    survives(frames)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.data())
def test_mutated_frames(data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(SAMPLES))
    frames = [bytearray(frame) for frame in encode(sample)]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = data.draw(st.sampled_from(frames))
        at = data.draw(st.integers(0, len(frame)))
        match data.draw(st.sampled_from(["cut", "flip", "insert", "drop"])):
            case "cut":
                del frame[at:]
            case "flip" if at < len(frame):
                frame[at] = data.draw(st.integers(0, 255))
            case "insert":
                frame[at:at] = data.draw(st.binary(max_size=10))
            case "drop" if len(frames) > 1:
                frames.pop()
            case _:
                pass
    survives([bytes(frame) for frame in frames])


@settings(max_examples=300)
@given(st.data())
def test_other_values_in_the_header(data: st.DataObject) -> None:
    frames = encode(data.draw(st.sampled_from(SAMPLES)))
    header = orjson.loads(frames[0])
    header[data.draw(st.sampled_from(sorted(header)))] = data.draw(json)
    try:
        head = orjson.dumps(header)
    except TypeError:  # an integer above 64 bits: by hand
        head = repr(header).replace("'", '"').encode("utf-8", "replace")
    survives([head, *map(bytes, frames[1:])])
