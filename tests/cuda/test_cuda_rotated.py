"""int4h and adaptive on a device: the bytes of the reference, from pages and into pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_pages import CASES, DTYPES, Engine, as_payload, layout_of, numbers, on_host, source_of

from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.codecs.reference import rotated as reference
from lmpipe.cuda import rotated
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

PAGES = 3


def encoded(engine: Engine, head: Header, table: bytes = b"") -> bytes:
    """The whole encoded chunk; empty where it is refused."""
    dst = engine.buffer(head.payload_bytes)
    refused = int(rotated.encode(head, table, engine.pages, engine.ids, dst, programs=2))
    return b"" if refused else head.pack() + on_host(dst)


def decoded(codec: Codec, stored: bytes, engine: Engine, raw_bytes: int) -> bool:
    """Fill the engine's pages; whether the chunk is whole."""
    head = Header.unpack(memoryview(stored), codec, raw_bytes)
    payload = stored[HEADER_BYTES:]
    table = payload[: head.extra_bytes]
    return not int(rotated.decode(head, table, engine.upload(payload), engine.pages, engine.ids, programs=2))


def check_back(codec: Codec, stored: bytes, layout: KVLayout, raw_bytes: int, device: torch.device) -> None:
    """Decoded as the reference does."""
    engine = Engine.of(layout, PAGES, device)
    assert decoded(codec, stored, engine, raw_bytes)
    assert engine.payload() == reference.decode(codec, stored, raw_bytes)
    assert engine.others_untouched()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_int4h(case: tuple[str, str], device: torch.device) -> None:
    layout = layout_of(case)
    raw = numbers(layout, PAGES)
    expected = reference.encode_int4h(raw, source_of(layout, PAGES), sink_tokens=2, edge_layers=1)
    engine = Engine.of(layout, PAGES, device, raw)
    head = rotated.header(Codec.INT4H, engine.pages, PAGES, sink_tokens=2, edge_layers=1)
    assert encoded(engine, head) == expected
    check_back(Codec.INT4H, expected, layout, len(raw), device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adaptive(case: tuple[str, str], device: torch.device) -> None:
    layout = layout_of(case)
    raw = numbers(layout, PAGES)
    table = np.random.default_rng(5).choice([3, 4, 8], layout.layers * layout.kv * layout.kv_heads).astype(np.uint8)
    for position in (0, 3):
        expected = reference.encode_adaptive(raw, source_of(layout, PAGES, position), table.tobytes(), sink_tokens=1)
        engine = Engine.of(layout, PAGES, device, raw)
        head = rotated.header(Codec.ADAPTIVE, engine.pages, PAGES, position, sink_tokens=1, table=table.tobytes())
        assert encoded(engine, head, table.tobytes()) == expected
        check_back(Codec.ADAPTIVE, expected, layout, len(raw), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude(dtype: str, device: torch.device) -> None:
    """Zeros of both signs, constants, denormals, vectors far from zero, up to what a scale in fp16 can hold."""
    layout = KVLayout.dense(10, 2, 96, dtype)
    vectors = 20 * 2 * PAGES
    random = np.random.default_rng(6)
    tops = torch.logspace(-44, 4.5, vectors, dtype=torch.float64)[:, None]
    values = tops * torch.from_numpy(random.uniform(-1, 1, (vectors, 96)))
    values[::5] += tops[::5]
    values[1:4] = torch.tensor([[0.0], [-0.0], [-7.25]])
    raw = as_payload(values.clamp(-65504, 65504), dtype)
    expected = reference.encode_int4h(raw, source_of(layout, PAGES))
    engine = Engine.of(layout, PAGES, device, raw)
    assert encoded(engine, rotated.header(Codec.INT4H, engine.pages, PAGES)) == expected
    check_back(Codec.INT4H, expected, layout, len(raw), device)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e7, -1e6])
def test_what_no_scale_fits_is_refused(number: float, device: torch.device) -> None:
    layout = KVLayout.paged(1, 2, 80, "float32", 4)
    values = torch.ones(2 * PAGES * 4 * 2 * 80)
    values[-81:-78] = number
    raw = as_payload(values, "float32")
    with pytest.raises(CannotEncode):
        reference.encode_int4h(raw, source_of(layout, PAGES))
    engine = Engine.of(layout, PAGES, device, raw)
    assert not encoded(engine, rotated.header(Codec.INT4H, engine.pages, PAGES))


def test_numbers_that_the_rotation_makes_infinite_are_refused(device: torch.device) -> None:
    """Here it leaves no infinity behind, only NaN, which comparisons pass over."""
    layout = KVLayout.dense(1, 2, 16, "bfloat16")
    values = torch.zeros(4 * PAGES * 16)
    values[-16:-8] = torch.tensor([1.0, 1, -1, -1, 1, 1, 1, 1]) * 3e38
    engine = Engine.of(layout, PAGES, device, as_payload(values, "bfloat16"))
    assert not encoded(engine, rotated.header(Codec.INT4H, engine.pages, PAGES))


@pytest.mark.parametrize("place", [1, 2 * 12 + 1])
def test_a_scale_that_is_not_finite_is_found(place: int, device: torch.device) -> None:
    layout = KVLayout.dense(1, 2, 64, "bfloat16")
    raw = numbers(layout, PAGES)
    stored = bytearray(reference.encode_int4h(raw, source_of(layout, PAGES)))
    stored[HEADER_BYTES + place] = 0x7C
    assert not decoded(Codec.INT4H, bytes(stored), Engine.of(layout, PAGES, device), len(raw))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    layout = KVLayout.dense(1, 2, 64, "bfloat16")
    engine = Engine.of(layout, PAGES, device, numbers(layout, PAGES))
    head = rotated.header(Codec.INT4H, engine.pages, PAGES)
    with pytest.raises(ValueError, match="fit"):
        rotated.encode(head, b"", engine.pages, engine.ids, engine.buffer(9), programs=1)
    short = Engine.of(KVLayout.dense(1, 2, 1, "bfloat16"), PAGES, device)
    with pytest.raises(CannotEncode, match="would become"):
        short_head = rotated.header(Codec.INT4H, short.pages, PAGES)
        rotated.encode(short_head, b"", short.pages, short.ids, short.buffer(999), programs=1)
    for table in (b"", b"\4\4\4", b"\4\4\4\5"):
        wrong = Header(Codec.ADAPTIVE, head.raw_bytes, 400, "bfloat16", layout, PAGES, extra_bytes=len(table))
        with pytest.raises(FormatError, match="table"):
            rotated.decode(wrong, table, engine.buffer(400), engine.pages, engine.ids, programs=1)
    longer = rotated.header(Codec.INT4H, engine.pages, PAGES, sink_tokens=0)
    with pytest.raises(FormatError, match="bytes"):
        rotated.decode(head, b"", engine.buffer(longer.payload_bytes), engine.pages, engine.ids, programs=1)
