"""fp8 on a device: the bytes of the reference, from pages and into pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_pages import CASES, DTYPES, Engine, as_payload, layout_of, numbers, on_host, source_of

from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.codecs.reference import fp8 as reference
from lmpipe.cuda import fp8
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

PAGES = 3


def encoded(engine: Engine, position: int = 0) -> bytes:
    """The whole encoded chunk; empty where it is refused."""
    header = fp8.header(engine.pages, len(engine.ids), position)
    dst = engine.buffer(header.payload_bytes)
    refused = int(fp8.encode(engine.pages, engine.ids, dst, programs=2))
    return b"" if refused else header.pack() + on_host(dst)


def decoded(stored: bytes, engine: Engine, raw_bytes: int) -> bool:
    """Fill the engine's pages; whether the chunk is whole."""
    head = Header.unpack(memoryview(stored), Codec.FP8, raw_bytes)
    return not int(fp8.decode(head, engine.upload(stored[HEADER_BYTES:]), engine.pages, engine.ids, programs=2))


def check(layout: KVLayout, raw: bytes, device: torch.device) -> None:
    """Encoded as the reference does, and decoded as it does."""
    expected = reference.encode(raw, source_of(layout, PAGES, 5))
    assert encoded(Engine.of(layout, PAGES, device, raw), 5) == expected
    engine = Engine.of(layout, PAGES, device)
    assert decoded(expected, engine, len(raw))
    assert engine.payload() == reference.decode(expected, len(raw))
    assert engine.others_untouched()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts(case: tuple[str, str], device: torch.device) -> None:
    layout = layout_of(case)
    check(layout, numbers(layout, PAGES), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude(dtype: str, device: torch.device) -> None:
    """Vectors from zeros and denormals to the largest number there is, with ties of the rounding in each."""
    layout = KVLayout.dense(20, 2, 64, dtype)
    largest = torch.finfo(DTYPES[dtype]).max
    vectors = 40 * 2 * PAGES
    tops = torch.logspace(-45, np.log10(largest), vectors, dtype=torch.float64)
    steps = torch.from_numpy(np.random.default_rng(4).integers(-464, 465, (vectors, 64))) / 464
    steps[:, 0] = 1
    values = (tops[:, None] * steps).clamp(-largest, largest)
    values[:3] = torch.tensor([[0.0], [-0.0], [largest]])
    check(layout, as_payload(values, dtype), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(dtype: str, number: float, device: torch.device) -> None:
    layout = KVLayout.paged(1, 2, 80, dtype, 4)
    values = torch.ones(2 * PAGES * 4 * 2 * 80)
    values[-1] = number
    assert not encoded(Engine.of(layout, PAGES, device, as_payload(values, dtype)))


def test_an_exponent_out_of_range_is_found(device: torch.device) -> None:
    layout = KVLayout.dense(1, 2, 64, "bfloat16")
    raw = numbers(layout, PAGES)
    stored = bytearray(reference.encode(raw, source_of(layout, PAGES)))
    stored[HEADER_BYTES + 3] = 248
    assert not decoded(bytes(stored), Engine.of(layout, PAGES, device), len(raw))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    layout = KVLayout.dense(1, 2, 64, "bfloat16")
    engine = Engine.of(layout, PAGES, device, numbers(layout, PAGES))
    head = fp8.header(engine.pages, PAGES)
    with pytest.raises(ValueError, match="fit"):
        fp8.encode(engine.pages, engine.ids, engine.buffer(head.payload_bytes - 1), programs=1)
    with pytest.raises(FormatError, match="pages"):
        fp8.decode(fp8.header(engine.pages, 2), engine.buffer(9), engine.pages, engine.ids, programs=1)
    with pytest.raises(FormatError, match="bytes"):
        fp8.decode(head, engine.buffer(9), engine.pages, engine.ids, programs=1)
    short = Engine.of(KVLayout.dense(1, 2, 1, "bfloat16"), PAGES, device)
    with pytest.raises(CannotEncode, match="would become"):
        fp8.encode(short.pages, short.ids, short.buffer(100), programs=1)
    opaque = KVLayout(1, 2, 64, "bfloat16", 4, ("layer", "kv", "head"), ("opaque",), opaque_page_bytes=512)
    unknown = Engine.of(opaque, PAGES, device)
    with pytest.raises(CannotEncode, match="opaque"):
        fp8.encode(unknown.pages, unknown.ids, unknown.buffer(9000), programs=1)
