"""What every codec must do; one more codec is one more parameter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from codec_samples import ENCODERS, payloads, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe.codecs import ANY, CODECS, ChunkCodec, Source, codec_named
from lmpipe.codecs.checks import conflicts
from lmpipe.codecs.zstd import ZstdCodec
from lmpipe.errors import CannotEncode, FormatError, TopologyError
from lmpipe.handles import Codec, Fidelity
from lmpipe.topology import parse

EVERY = pytest.mark.parametrize("codec", ENCODERS.values(), ids=lambda c: c.name)
BYTEWISE = pytest.mark.parametrize(
    "codec", [codec for codec in ENCODERS.values() if not codec.numeric], ids=lambda c: c.name
)
NUMERIC = pytest.mark.parametrize(
    "codec", [codec for codec in ENCODERS.values() if codec.numeric], ids=lambda c: c.name
)


def encoded(codec: ChunkCodec, raw: bytes, source: Source = ANY) -> bytes:
    dst = bytearray(codec.bound(len(raw)))
    return bytes(dst[: codec.encode(memoryview(raw), memoryview(dst), source)])


def decoded(codec: ChunkCodec, stored: bytes, raw_bytes: int) -> bytes:
    dst = bytearray(raw_bytes)
    codec.decode(memoryview(stored), memoryview(dst))
    return bytes(dst)


def test_every_number_has_a_codec_and_names_differ() -> None:
    assert set(CODECS) == set(Codec)
    assert [codec_named(c.name) for c in CODECS.values()] == list(CODECS.values())
    with pytest.raises(KeyError):
        codec_named("nothing")


def test_codecs_that_compute_with_numbers_are_refused_for_opaque_pages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbers(ZstdCodec):
        numeric = True

    text = "name: a\nengines: {opaque_pages: %s}\ntiers:\n  dram: {capacity: 1GiB}\n  %s\n"
    ssd, remote = (
        "ssd: {directory: d, capacity: 2GiB, codec: %s}",
        "remote: {url: file:///r, capacity: 1GiB, codec: %s}",
    )

    def found(opaque: str, ssd: str, remote: str) -> list[str]:
        try:
            parse(text % (opaque, f"{ssd}\n  {remote}"), "f.yaml", Path("/base"), conflicts)
        except TopologyError as error:
            return str(error).splitlines()
        return []

    assert found("true", ssd % "zstd", remote % "zstd") == [], "bytes are bytes"
    monkeypatch.setitem(CODECS, Codec.ZSTD, Numbers())
    assert found("false", ssd % "zstd", remote % "zstd") == found("true", ssd % "raw", remote % "raw") == []
    wrong = found("true", ssd % "zstd", remote % "zstd")
    problem = "zstd computes with the numbers in a page, whose order is unknown where pages are opaque"
    mend = "choose raw or split here"
    assert wrong == [f"f.yaml:{5 + at}: tiers.{t}.codec: {problem}; {mend}" for at, t in enumerate(("ssd", "remote"))]
    assert "unknown codec" in found("true", ssd % "zzz", remote % "zstd")[0], "which another check refuses"


@EVERY
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decode_is_the_inverse_of_encode(codec: ChunkCodec, data: st.DataObject) -> None:
    raw, source = data.draw(payloads(codec))
    stored = encoded(codec, raw, source)
    assert len(stored) <= codec.bound(len(raw), source) <= codec.bound(len(raw))
    assert not codec.numeric or len(stored) == codec.bound(len(raw), source)
    back = decoded(codec, stored, len(raw))
    if codec.fidelity is Fidelity.EXACT:
        assert back == raw
    else:
        assert back != raw and decoded(CODECS[codec.number], stored, len(raw)) == back, "whoever decodes"


@BYTEWISE
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 200_001, 3 << 20])
def test_noise_stays_within_bound(codec: ChunkCodec, nbytes: int) -> None:
    raw = np.random.default_rng(nbytes).bytes(nbytes)
    assert decoded(codec, encoded(codec, raw), nbytes) == raw


@EVERY
def test_a_short_destination_is_refused(codec: ChunkCodec) -> None:
    raw, source = sample(codec)
    with pytest.raises(ValueError, match="do not fit"):
        codec.encode(memoryview(raw), memoryview(bytearray(8)), source)


@EVERY
def test_a_payload_of_another_length_is_a_format_error(codec: ChunkCodec) -> None:
    raw, source = sample(codec)
    stored = encoded(codec, raw, source)
    for other in (0, len(raw) - 1, len(raw) + 1):
        with pytest.raises(FormatError, match="expected"):
            decoded(codec, stored, other)


@EVERY
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damage_is_a_format_error_or_seen_by_nobody(codec: ChunkCodec, data: st.DataObject) -> None:
    """Only zstd has a checksum (of others, the tier has): damage may pass. No other error is ever raised."""
    raw, source = data.draw(payloads(codec, 2000).filter(lambda given: bool(given[0])))
    stored = bytearray(encoded(codec, raw, source))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "other"]))
    at = data.draw(st.integers(0, min(len(stored), data.draw(st.sampled_from([64, 1 << 20]))) - 1))
    if kind == "flip":
        stored[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del stored[at:]
    elif kind == "grow":
        stored += b"\0"
    else:
        stored = bytearray(data.draw(st.binary(max_size=64)))
    try:
        back = decoded(codec, bytes(stored), len(raw))
    except FormatError:
        return
    # A flipped bit that zstd does not need (an unused header bit) still gives the right bytes.
    assert codec.number is not Codec.ZSTD or back == raw


@NUMERIC
def test_what_numeric_codecs_cannot_write_they_refuse(codec: ChunkCodec) -> None:
    raw, source = sample(codec)
    layout = source.layout
    assert layout
    opaque = replace(layout, page=("opaque",), opaque_page_bytes=layout.page_bytes)
    inner = replace(layout, page=("head", "dim", "token"))
    for other, problem in (
        (ANY, "layout of the chunk is not known"),
        (Source(opaque, source.chunk_tokens), "side by side"),
        (Source(inner, source.chunk_tokens), "side by side"),
        (Source(replace(layout, dtype="float8_e4m3fn"), source.chunk_tokens), "type float8_e4m3fn"),
        (Source(replace(layout, head_dim=2048, page_tokens=1), source.chunk_tokens), "head_dim 2048"),
        (Source(layout, source.chunk_tokens + 1), "does not divide"),
        (Source(layout, source.chunk_tokens + layout.page_tokens), "no chunk"),
    ):
        with pytest.raises(CannotEncode, match=problem):
            encoded(codec, raw, other)
    for wrong in (np.nan, np.inf, -np.inf):
        numbers = np.frombuffer(raw, np.uint16).copy()
        numbers[len(numbers) // 2] = np.float32(wrong).view(np.uint32) >> 16
        with pytest.raises(CannotEncode, match="NaN or infinite"):
            encoded(codec, numbers.tobytes(), source)


def test_zstd_shrinks_numbers_of_like_size() -> None:
    numbers = np.random.default_rng(1).normal(size=1 << 18).astype(np.float32)
    raw = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bf16, cut
    assert len(encoded(CODECS[Codec.ZSTD], raw)) < 0.8 * len(raw)
