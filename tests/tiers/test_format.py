"""Stored bytes: what is written is read back, and anything else is a FormatError, never another exception."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_chunks import chunks

from lmpipe import native
from lmpipe.errors import FormatError
from lmpipe.handles import BLOCK_BYTES, Extent
from lmpipe.tiers.format import (
    MAX_KEYS,
    MAX_PIECES,
    NO_ID,
    SEALED_AT,
    Footer,
    RecordHeader,
    RecordKind,
    SegmentHeader,
    chunk_header,
    digests,
    forget_header,
    piece_lengths,
    piece_size,
)

GOLDEN = Path(__file__).parents[1] / "golden"
IDENTITY = bytes(range(16))


def segment_header() -> bytes:
    return SegmentHeader(3, IDENTITY, 1_700_000_000).pack()


def record_header() -> bytes:
    record = chunks(1, 600_000)[0]
    record["place"] = Extent(3, 1).place
    data = bytes(600_000)
    return chunk_header(record, IDENTITY, digests(memoryview(data), piece_lengths(len(data)))).pack()


def forget_keys() -> bytes:
    keys = np.arange(48, dtype=np.uint8).reshape(3, 16)
    return forget_header(IDENTITY, Extent(3, 9), 0, keys).pack()


def footer() -> bytes:
    records = chunks(60)
    records["place"] = [Extent(3, 1 + 3 * n).place for n in range(60)]
    return Footer(3, IDENTITY, records, np.array([181, 182], np.uint32)).pack(200)


PARTS: dict[str, tuple[Callable[[], bytes], Callable[[bytes], object]]] = {
    "segment_header": (segment_header, lambda data: SegmentHeader.parse(data, "here")),
    "record_chunk": (record_header, lambda data: RecordHeader.parse(data, "here")),
    "record_forget_keys": (forget_keys, lambda data: RecordHeader.parse(data, "here")),
    "segment_footer": (footer, lambda data: Footer.parse(data, 200, "here")),
}
EVERY = pytest.mark.parametrize("name", PARTS)


@EVERY
def test_golden(name: str) -> None:
    """Files of older versions must stay readable: a change here needs a new version number."""
    make, parse = PARTS[name]
    data = make()
    assert (GOLDEN / f"{name}.bin").read_bytes() == data
    assert len(data) % BLOCK_BYTES == 0
    parse(data)


def test_everything_comes_back() -> None:
    header = RecordHeader.parse(record_header(), "here")
    assert header.kind is RecordKind.CHUNK and header.id == IDENTITY and header.blocks == 1 + 147
    assert header.record.tobytes() == chunk_header(header.record, IDENTITY, header.table).record.tobytes()
    assert header.table.tobytes() == b"".join(native.xxh3_128(bytes(n)) for n in (262144, 262144, 75712))
    assert SegmentHeader.parse(segment_header(), "here") == SegmentHeader(3, IDENTITY, 1_700_000_000)
    found = Footer.parse(footer(), 200, "here")
    assert found.chunks.tobytes()[:40] == chunks(60).tobytes()[:40] and found.forgets.tolist() == [181, 182]
    forgets = RecordHeader.parse(forget_keys(), "here")
    assert forgets.kind is RecordKind.FORGET_KEYS and forgets.table.shape == (3, 16) and forgets.blocks == 1
    whole = RecordHeader.parse(forget_header(NO_ID, Extent(1, 1), 5, None).pack(), "here")
    assert whole.kind is RecordKind.FORGET_NAMESPACE and int(whole.record["namespace"]) == 5


@given(nbytes=st.integers(1, 2**32 - 1))
def test_pieces_make_the_payload(nbytes: int) -> None:
    lengths = piece_lengths(nbytes)
    assert int(lengths.sum()) == nbytes and 1 <= len(lengths) <= MAX_PIECES and int(lengths.min()) > 0
    assert (lengths[:-1] == piece_size(nbytes)).all() and piece_size(nbytes) % BLOCK_BYTES == 0


@EVERY
@given(data=st.data())
def test_any_flipped_byte_is_named(name: str, data: st.DataObject) -> None:
    make, parse = PARTS[name]
    bad = bytearray(make())
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError, match="here"):
        parse(bytes(bad))


@EVERY
@given(data=st.data())
def test_bad_fields_under_a_good_checksum(name: str, data: st.DataObject) -> None:
    """What a broken writer might produce: parsed to something that exists, or refused."""
    make, parse = PARTS[name]
    bad = bytearray(make())
    block = len(bad) - BLOCK_BYTES
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 140))
        width = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.sampled_from([0, 1, 2, 0x80, 0xFF]) | st.integers(0, 2 ** (8 * width) - 1))
        bad[block + at : block + at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    bad[block + SEALED_AT :] = native.xxh3_128(bytes(bad[block : block + SEALED_AT]))
    try:
        parse(bytes(bad))
    except FormatError as error:
        assert "here" in str(error)


@given(st.binary(max_size=3 * BLOCK_BYTES))
def test_noise_is_no_file(noise: bytes) -> None:
    for _, parse in PARTS.values():
        with pytest.raises(FormatError):
            parse(noise)


def test_errors_name_the_fault() -> None:
    def resealed(block: bytes, at: int, value: bytes) -> bytes:
        body = bytearray(block[:SEALED_AT])
        body[at : at + len(value)] = value
        return bytes(body) + native.xxh3_128(bytes(body))

    good = record_header()
    for bad, words in (
        (good[:100], "a block of 100 bytes"),
        (b"X" + good[1:], "magic is b'XMPRECD"),
        (good[:-1] + b"\0", "checksum differs"),
        (resealed(good, 8, b"\2"), "version 2, this lmpipe reads 1"),
        (resealed(good, 12, b"\x09"), "kind 9 is unknown"),
        (resealed(good, 32, b"\2"), "2 pieces of 262144 bytes do not make 600000"),
        (resealed(good, 48 + 44, bytes(4)), "chunk of 0 bytes"),
        (resealed(good, 48 + 24, b"\1"), "shard or codec"),
        (resealed(good, 4000, b"\1"), "are not zero"),
        (resealed(forget_keys(), 32, (MAX_KEYS + 1).to_bytes(4, "little")), "248 keys to forget"),
    ):
        with pytest.raises(FormatError, match=words):
            RecordHeader.parse(bad, "here")
    with pytest.raises(FormatError, match="footer at block 200 does not fit a file of"):
        Footer.first_block(footer()[-BLOCK_BYTES:], 900_000, "here")
    records = chunks(1)
    with pytest.raises(FormatError, match="outside its file"):
        Footer.parse(Footer(3, IDENTITY, records, np.empty(0, np.uint32)).pack(9), 9, "here")
