"""split on a device: the bytes of the reference, from pages and into pages."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_pages import CASES, DTYPES, Engine, as_payload, layout_of, numbers, on_host, source_of

from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.codecs.reference import split as reference
from lmpipe.cuda import split
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

PAGES = 3


def encoded(engine: Engine, programs: int = 3) -> bytes:
    """The whole encoded chunk."""
    dst = engine.buffer(split.bound(engine.pages, len(engine.ids)))
    payload_bytes = int(split.encode(engine.pages, engine.ids, dst, programs=programs))
    header = split.header(engine.pages, len(engine.ids), payload_bytes)
    return header.pack() + on_host(dst[:payload_bytes])


def head_of(stored: bytes, raw_bytes: int) -> Header:
    """Of an encoded chunk."""
    return Header.unpack(memoryview(stored), Codec.SPLIT, raw_bytes)


def decoded(stored: bytes, engine: Engine, raw_bytes: int) -> bool:
    """Fill the engine's pages; whether the chunk is whole."""
    head = head_of(stored, raw_bytes)
    payload = engine.upload(stored[HEADER_BYTES:])
    return not int(split.decode(head, payload, engine.pages, engine.ids, programs=2))


def check(layout: KVLayout, raw: bytes, device: torch.device) -> None:
    """Encoded as the reference does, and back."""
    expected = reference.encode(raw, source_of(layout, PAGES))
    assert encoded(Engine.of(layout, PAGES, device, raw)) == expected
    engine = Engine.of(layout, PAGES, device)
    assert decoded(expected, engine, len(raw))
    assert engine.payload() == raw
    assert engine.others_untouched()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts(case: tuple[str, str], device: torch.device) -> None:
    layout = layout_of(case)
    check(layout, numbers(layout, PAGES), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("content", ["noise", "zeros", "constant", "special"])
def test_contents(dtype: str, content: str, device: torch.device) -> None:
    layout = KVLayout.dense(1, 1, 72, dtype)
    random, count = np.random.default_rng(2), 2 * PAGES * 72
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 1e-7, 65504.0, 1.0])
    raw = {
        "noise": random.bytes(len(as_payload(torch.zeros(count), dtype))),
        "zeros": as_payload(torch.zeros(count), dtype),
        "constant": as_payload(torch.full((count,), -3.14), dtype),
        "special": as_payload(special[torch.from_numpy(random.integers(0, len(special), count))], dtype),
    }[content]
    check(layout, raw, device)


def test_the_number_of_programs_does_not_matter(device: torch.device) -> None:
    layout = KVLayout.paged(1, 3, 64, "bfloat16", 8)
    engine = Engine.of(layout, PAGES, device, numbers(layout, PAGES))
    assert encoded(engine, programs=1) == encoded(engine, programs=1000)


def test_other_numbers_than_the_pages_have(device: torch.device) -> None:
    layout = KVLayout.dense(1, 2, 64, "bfloat16")
    raw = numbers(layout, PAGES)
    payload, table_bytes = reference.encode_numbers(raw, "float32")
    stored = Header(Codec.SPLIT, len(raw), len(payload), "float32", extra_bytes=table_bytes).pack() + payload
    engine = Engine.of(layout, PAGES, device)
    assert decoded(stored, engine, len(raw))
    assert engine.payload() == raw


def test_a_page_that_is_not_wanted_is_left_out(device: torch.device) -> None:
    layout = KVLayout.paged(1, 2, 64, "bfloat16", 4)
    raw = numbers(layout, PAGES)
    engine = Engine.of(layout, PAGES, device)
    engine.ids = engine.pages.ids(np.array([engine.page_ids[0], -1, engine.page_ids[2]], np.int32))
    assert decoded(reference.encode(raw, source_of(layout, PAGES)), engine, len(raw))
    planes = np.frombuffer(engine.payload(), np.uint8).reshape(layout.plane_count, PAGES, -1)
    wanted = np.frombuffer(raw, np.uint8).reshape(planes.shape)
    assert (planes[:, [0, 2]] == wanted[:, [0, 2]]).all()
    assert (planes[:, 1] == 0xA5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_damage_is_found(dtype: str, device: torch.device) -> None:
    """Wherever the reference finds some, and nowhere else; what it does not find decodes to the same."""
    layout = KVLayout.paged(1, 3, 64, dtype, 8)
    raw = numbers(layout, PAGES)
    stored = reference.encode(raw, source_of(layout, PAGES))
    random = np.random.default_rng(3)
    body = HEADER_BYTES + head_of(stored, len(raw)).extra_bytes
    places = [*range(HEADER_BYTES, HEADER_BYTES + 12), *random.integers(body, len(stored), 4).tolist()]
    for place in places:
        damaged = bytearray(stored)
        damaged[place] ^= 1 << int(random.integers(8))
        engine = Engine.of(layout, PAGES, device)
        whole = decoded(bytes(damaged), engine, len(raw))
        try:
            expected = reference.decode(bytes(damaged), len(raw))
        except FormatError:
            assert not whole
        else:
            assert whole and engine.payload() == expected
        assert engine.others_untouched()


def test_offsets_beyond_the_body(device: torch.device) -> None:
    layout = KVLayout.paged(1, 3, 64, "bfloat16", 8)
    raw = numbers(layout, PAGES)
    stored = bytearray(reference.encode(raw, source_of(layout, PAGES)))
    for offset in (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        struct.pack_into("<I", stored, HEADER_BYTES + 8, offset)
        assert not decoded(bytes(stored), Engine.of(layout, PAGES, device), len(raw))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    layout = KVLayout.dense(1, 2, 64, "bfloat16")
    engine = Engine.of(layout, PAGES, device, numbers(layout, PAGES))
    with pytest.raises(ValueError, match="at least"):
        split.encode(engine.pages, engine.ids, engine.buffer(100), programs=1)
    head = split.header(engine.pages, PAGES, 1000)
    for wrong in (replace(head, raw_bytes=8), replace(head, dtype=""), replace(head, extra_bytes=0), head):
        with pytest.raises(FormatError):
            split.decode(wrong, engine.buffer(999), engine.pages, engine.ids, programs=1)
    bytewise = Engine.of(KVLayout.dense(1, 2, 64, "float8_e4m3fn"), PAGES, device)
    with pytest.raises(CannotEncode, match="float8_e4m3fn"):
        split.encode(bytewise.pages, bytewise.ids, bytewise.buffer(10_000), programs=1)
