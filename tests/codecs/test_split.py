"""`split`: every level writes what the reference writes, reads it back, and reads nothing else."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from codec_samples import DTYPES, layout_of, stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmpipe import native
from lmpipe.codecs import ANY, Source
from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.codecs.reference import split as reference
from lmpipe.codecs.split import BLOCK_NUMBERS, PROBE_BYTES, PROBES, TABLE_ROW_BYTES, SplitCodec
from lmpipe.errors import FormatError
from lmpipe.handles import Codec

CODEC = SplitCodec()
GOLDEN = Path(__file__).parents[1] / "golden" / "codecs"
ROW = struct.Struct("<IBBH")
each_level = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoded(raw: bytes, source: Source = ANY) -> bytes:
    dst = bytearray(CODEC.bound(len(raw)))
    return bytes(dst[: CODEC.encode(memoryview(raw), memoryview(dst), source)])


def decoded(data: bytes, raw_bytes: int) -> bytes:
    dst = bytearray(raw_bytes)
    CODEC.decode(memoryview(data), memoryview(dst))
    return bytes(dst)


def table(data: bytes, dtype: str, raw_bytes: int) -> list[tuple[int, int, int, int]]:
    """(offset, top exponent, bits, escapes) of each block."""
    blocks = -(-(raw_bytes // reference.ITEM_BYTES[dtype]) // BLOCK_NUMBERS)
    return list(ROW.iter_unpack(data[HEADER_BYTES : HEADER_BYTES + blocks * ROW.size]))


def numbers(count: int, dtype: str, seed: int = 0, spread: float = 0.8) -> bytes:
    """Gaussian, with a scale for each of 128 channels."""
    rng = np.random.default_rng(seed)
    scale = np.exp(spread * rng.normal(size=128))[np.arange(count) % 128]
    return stored(rng.normal(size=count) * scale, dtype)


@cache
def expected(raw: bytes, told: str) -> bytes:
    """Once for all levels: the reference is slow."""
    return reference.encode(raw, SOURCES[told])


@cache
def patterns() -> dict[str, bytes]:
    """What a payload may hold beside numbers of like size."""
    rng = np.random.default_rng(7)
    special = np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7C00, 1, 0x807F, 0x3F80, 0xFFFF], np.uint16)
    flat = rng.integers(0, 256, 5000, np.uint16) << 7  # all exponents alike often: raw blocks between others
    return {
        "nothing": b"",
        "zeros": bytes(50_001),
        "ones": b"\xff" * 20_000,
        "constant": np.full(9000, 0x3FA7, np.uint16).tobytes(),
        "noise": rng.bytes(70_003),
        "special": rng.choice(special, 9001).tobytes(),
        "denormal": rng.integers(0, 128, 9000, np.uint16).tobytes(),
        "mixed": numbers(9000, "bfloat16") + flat.tobytes() + bytes(9000) + numbers(100, "bfloat16", 1, 4),
        "half zeros": numbers(4096, "bfloat16")[:4096] + bytes(8192),
        # Windows that a sample places cannot reach below zero or over 255.
        "lowest": rng.integers(0, 1 << 10, 4500, np.uint16).tobytes(),
        "highest": (0xFFFF - rng.integers(0, 1 << 10, 4500, np.uint16)).astype(np.uint16).tobytes(),
        "far": rng.choice(np.array([0x0080, 0x7F00], np.uint16), 5000, p=[0.05, 0.95]).tobytes(),
    }


SOURCES = {"unknown": ANY, **{dtype: Source(layout_of(dtype)) for dtype in DTYPES}}


@pytest.mark.parametrize("told", SOURCES)
@pytest.mark.parametrize("name", patterns())
def test_levels_write_what_the_reference_writes(level: str, name: str, told: str) -> None:
    raw = patterns()[name]
    want = expected(raw, told)
    assert encoded(raw, SOURCES[told]) == want
    assert len(want) <= CODEC.bound(len(raw))
    assert decoded(want, len(raw)) == raw == reference.decode(want, len(raw))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 1000, 1089, 4095, 4096, 4097, 8192, 20_000])
def test_any_number_of_numbers(level: str, dtype: str, count: int) -> None:
    """And with bytes behind the last whole number."""
    for tail in (b"", b"\x01", b"\x01\x02\x03"):
        raw, source = numbers(count, dtype, count) + tail, SOURCES[dtype]
        want = expected(raw, dtype)
        assert encoded(raw, source) == want and decoded(want, len(raw)) == raw


@each_level
@given(
    dtype=st.sampled_from(list(DTYPES)),
    count=st.integers(1, 9000),
    spread=st.floats(0, 6),
    seed=st.integers(0, 1 << 32),
    zeros=st.floats(0, 1),
)
def test_numbers_of_any_spread(level: str, dtype: str, count: int, spread: float, seed: int, zeros: float) -> None:
    drawn = np.frombuffer(numbers(count, dtype, seed, spread), np.uint16).copy()
    drawn[np.random.default_rng(seed).random(len(drawn)) < zeros] = 0
    raw = drawn.tobytes()
    want = reference.encode(raw, SOURCES[dtype])
    assert encoded(raw, SOURCES[dtype]) == want and decoded(want, len(raw)) == raw


def test_places_that_are_not_aligned(level: str) -> None:
    raw = numbers(9000, "bfloat16")
    want = expected(raw, "unknown")
    for shift in (1, 16, 33):
        held = bytes(shift) + raw
        dst = memoryview(bytearray(shift + CODEC.bound(len(raw)) + 1))
        used = CODEC.encode(memoryview(held)[shift:], dst[shift : shift + len(want)], ANY)
        assert dst[shift : shift + used].tobytes() == want, "and it fits exactly"
        assert not any(dst[shift + used :]), "nothing behind it"
        back = memoryview(bytearray(shift + len(raw) + 1))
        CODEC.decode(dst[shift : shift + used], back[shift : shift + len(raw)])
        assert back.tobytes() == bytes(shift) + raw + b"\0"


def test_the_dtype_is_found_without_a_layout() -> None:
    for dtype in DTYPES:
        raw = numbers(100_000, dtype)
        assert Header.unpack(memoryview(encoded(raw)), Codec.SPLIT, len(raw)).dtype == dtype
        whole = memoryview(raw)
        assert encoded(raw) == encoded(raw, Source(layout_of(dtype))) and len(encoded(raw)) < len(whole)
    noise = np.random.default_rng(1).bytes(100_000)
    assert len(encoded(noise)) == HEADER_BYTES + len(noise)
    late = np.random.default_rng(1).bytes(PROBE_BYTES) + numbers(PROBES * PROBE_BYTES, "bfloat16")
    assert len(encoded(late)) < 0.85 * len(late), "not by its beginning only"


def test_every_width_is_chosen_where_it_is_shortest() -> None:
    def chosen(spread: float) -> set[int]:
        raw = numbers(4 * BLOCK_NUMBERS, "bfloat16", spread=spread)
        return {bits for _, _, bits, _ in table(encoded(raw), "bfloat16", len(raw))}

    same = np.random.default_rng(1).integers(0x3F80, 0x3FFF, 3 * BLOCK_NUMBERS, np.uint16).tobytes()
    assert {bits for _, _, bits, _ in table(encoded(same), "bfloat16", len(same))} == {2}
    assert chosen(0.5) == {3} and chosen(3) == {4}
    noise = np.random.default_rng(1).bytes(2 * BLOCK_NUMBERS)
    assert table(encoded(noise, SOURCES["bfloat16"]), "bfloat16", len(noise)) == [(0, 0, 255, 0)]


def test_numbers_like_kv_shrink_as_promised() -> None:
    for spread in (0.0, 0.5, 1.0):
        raw = numbers(1 << 18, "bfloat16", spread=spread)
        assert len(raw) / len(encoded(raw)) > 1.35
    # A few channels that are much larger than the others cost their escapes only.
    outliers = np.frombuffer(numbers(1 << 18, "bfloat16", spread=0.3), np.uint16).copy()
    outliers[::64] += 5 << 7
    assert outliers.nbytes / len(encoded(outliers.tobytes())) > 1.35


DAMAGES = {
    "offset": (0, "<I", 1, r"block 0: offset is 1 where 0"),
    "bits": (5, "<B", 9, r"block 0: bits is 9"),
    "bits of none": (5, "<B", 1, r"block 0: bits is 1"),
    "escapes": (6, "<H", 5000, r"block 0: number of escapes is 5000"),
    "fewer escapes": (6, "<H", 0, r"block 1: offset|block 0: its codes|follow the last block"),
    "second offset": (8, "<I", 1 << 31, r"block 1: offset is 2147483648"),
    "last offset": (16, "<I", 0, r"block 2: offset is 0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_table_is_named(level: str, damage: str) -> None:
    at, form, value, problem = DAMAGES[damage]
    raw = numbers(9000, "bfloat16")
    data = bytearray(encoded(raw))
    struct.pack_into(form, data, HEADER_BYTES + at, value)
    with pytest.raises(FormatError, match=problem):
        decoded(bytes(data), len(raw))
    with pytest.raises(FormatError):
        reference.decode(bytes(data), len(raw))


def test_another_number_of_escapes_in_the_codes_is_named(level: str) -> None:
    raw = numbers(100, "bfloat16")
    data = bytearray(encoded(raw))
    ((_, _, bits, _),) = table(bytes(data), "bfloat16", len(raw))
    planes = HEADER_BYTES + ROW.size + 100
    data[planes : planes + 13 * bits] = b"\xff" * 13 * bits
    with pytest.raises(FormatError, match="block 0: its codes have another number of escapes than its row"):
        decoded(bytes(data), len(raw))


def test_a_body_of_another_length_is_named() -> None:
    raw = numbers(9000, "bfloat16")
    payload = encoded(raw)[HEADER_BYTES:]
    table_bytes = 3 * TABLE_ROW_BYTES

    def chunk(payload: bytes, dtype: str = "bfloat16", extra_bytes: int = table_bytes) -> bytes:
        return Header(Codec.SPLIT, len(raw), len(payload), dtype, extra_bytes=extra_bytes).pack() + payload

    assert decoded(chunk(payload), len(raw)) == raw
    for wrong, problem in (
        (chunk(payload + b"\0"), "1 bytes follow the last block"),
        (chunk(payload[:-1]), "block 2: length is"),
        (chunk(payload[:table_bytes]), "block 0: length is"),
        (chunk(payload, extra_bytes=16), "extra_bytes"),
        (chunk(payload, dtype="float32"), "extra_bytes"),
        (chunk(payload, dtype="", extra_bytes=0), "payload_bytes"),
    ):
        with pytest.raises(FormatError, match=problem):
            decoded(wrong, len(raw))
    assert native.split_decode(b"1234567", bytearray(2), 1) == "a table of 8 bytes was expected, there are 7 in all"


def test_every_flipped_byte_is_refused_or_gives_other_numbers(level: str) -> None:
    """Nothing but a FormatError, and what one implementation takes for numbers the other takes for the same."""
    raw = numbers(70, "float16", 3) + b"\x05"
    data = encoded(raw, SOURCES["float16"])
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            assert outcome(damaged, len(raw)) == reference_outcome(damaged, len(raw)), (at, flip)


@each_level
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES)), count=st.integers(1, 9000))
def test_damage_anywhere(level: str, data: st.DataObject, dtype: str, count: int) -> None:
    raw = numbers(count, dtype, count)
    damaged = bytearray(encoded(raw, SOURCES[dtype]))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["table", "anywhere", "planes"]))
        low, high = (HEADER_BYTES, HEADER_BYTES + 8) if kind == "table" else (0, len(damaged))
        at = data.draw(st.integers(low, min(high, len(damaged)) - 1))
        length = 600 if kind == "planes" else 1
        damaged[at : at + length] = data.draw(st.sampled_from([b"\xff", b"\0", b"\x7f"])) * len(
            damaged[at : at + length]
        )
    assert outcome(bytes(damaged), len(raw)) == reference_outcome(bytes(damaged), len(raw))


def outcome(data: bytes, raw_bytes: int) -> bytes | None:
    try:
        return decoded(data, raw_bytes)
    except FormatError:
        return None


def reference_outcome(data: bytes, raw_bytes: int) -> bytes | None:
    try:
        return reference.decode(data, raw_bytes)
    except FormatError:
        return None


def test_the_native_functions_refuse_what_is_not_theirs() -> None:
    with pytest.raises(ValueError, match="dtype"):
        native.split_encode(b"1234", bytearray(100), 0)
    with pytest.raises(ValueError, match="dtype"):
        native.split_decode(b"1234", bytearray(100), 4)
    with pytest.raises(ValueError, match="read-only"):
        native.split_encode(b"1234", bytes(100), 1)
    with pytest.raises(ValueError, match="read-only"):
        native.split_decode(b"1234", bytes(100), 1)
    with pytest.raises(ValueError, match="do not fit a buffer of 5"):
        native.split_encode(bytes(100), bytearray(5), 1)
    with pytest.raises(TypeError, match="src"):
        native.split_encode(memoryview(bytes(100))[::2], bytearray(100), 1)


def test_every_short_destination_is_refused(level: str) -> None:
    raw = numbers(5000, "bfloat16")
    length = len(encoded(raw))
    for room in (0, 63, 64, 70, 79, 80, 4000, 5900, length - 1):
        with pytest.raises(ValueError, match="do not fit"):
            CODEC.encode(memoryview(raw), memoryview(bytearray(room)), ANY)
    with pytest.raises(ValueError, match="do not fit"):
        CODEC.encode(memoryview(b"noise"), memoryview(bytearray(64)), ANY)


def golden_payload(dtype: str) -> bytes:
    """Without a random generator, which may change: exponents and mantissas by arithmetic."""
    item = reference.ITEM_BYTES[dtype]
    exponent_bits, bias = (5, 12) if dtype == "float16" else (8, 120)
    mantissa_bits = 8 * item - 1 - exponent_bits
    out = bytearray()
    for i in range(BLOCK_NUMBERS + 100):
        exponent = 31 * i % 5 + 17 * i % 3 + bias if i % 41 else i // 41 % 30
        mantissa = i * 2654435761 % (1 << 32) >> (32 - mantissa_bits)
        out += (i % 2 << (8 * item - 1) | exponent << mantissa_bits | mantissa).to_bytes(item, "little")
    return bytes(out) + b"\x2a"


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(level: str, dtype: str) -> None:
    """Stored chunks must stay readable: a change here needs a new version number in the header."""
    raw = golden_payload(dtype)
    data = (GOLDEN / f"split_{dtype}.bin").read_bytes()
    assert encoded(raw, SOURCES[dtype]) == data
    assert decoded(data, len(raw)) == raw
