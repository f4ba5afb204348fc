"""fp8, int4h, adaptive: the stated error, the bytes of every instruction-set level, and what cannot be encoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from codec_samples import DTYPES, calibration, layout_of, loaded, normal, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe import native
from lmpipe.codecs import ChunkCodec, Source
from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.fp8 import Fp8Codec
from lmpipe.codecs.header import HEADER_BYTES
from lmpipe.codecs.int4h import Int4hCodec
from lmpipe.codecs.reference import fp8, rotated
from lmpipe.codecs.vectors import bits_of, describe
from lmpipe.errors import CannotEncode, FormatError
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout
from lmpipe.native import _native

GOLDEN = Path(__file__).parent.parent / "golden" / "codecs"
LEVELS = str(native.features()["levels"]).split()
TOKENS = 8
DIMS = [1, 2, 7, 16, 32, 48, 64, 65, 80, 96, 100, 128, 192, 256, 576, 1000, 1024]
TYPES = {"bfloat16": 1, "float16": 2, "float32": 3}


def encoded(codec: ChunkCodec, raw: bytes, source: Source) -> bytes:
    dst = bytearray(codec.bound(len(raw)))
    return bytes(dst[: codec.encode(memoryview(raw), memoryview(dst), source)])


def decoded(codec: ChunkCodec, data: bytes, raw_bytes: int) -> bytes:
    dst = bytearray(raw_bytes)
    codec.decode(memoryview(data), memoryview(dst))
    return bytes(dst)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest):
    _native._set_level(request.param)
    yield request.param
    _native._set_level(LEVELS[-1])


def awkward(head_dim: int, dtype: str, vectors: int = 37) -> torch.Tensor:
    """[vectors, head_dim] fp32 as the dtype holds them: zeros of both signs, constants, denormals, an offset, ties."""
    rng = np.random.default_rng(head_dim)
    x = rng.normal(size=(vectors, head_dim)) * np.exp(3 * rng.normal(size=(vectors, 1)))
    x[1], x[2], x[3] = 0, -0.0, 5.5
    x[4], x[5], x[6] = x[4] * 1e-9, x[5] * 1e-37, x[6] * 1e-44
    x[7] = 1000 + rng.normal(size=head_dim) * 1e-3
    x[8, 0], x[9, 0], x[10, -1], x[11, 0] = 448, 464, 465, 60000 / head_dim**0.5
    x[12] = rng.integers(0, 33, head_dim) * 2.0**-10
    x[12, 0] = 240
    return torch.from_numpy(np.clip(x, -2000, 2000)).to(DTYPES[dtype]).to(torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_native_fp8_is_the_reference(level: str, dtype: str) -> None:
    for head_dim in DIMS:
        numbers = awkward(head_dim, dtype)
        exponents, codes = fp8.encode_vectors(numbers)
        body = exponents.numpy().tobytes() + codes.numpy().tobytes()
        raw = numbers.to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
        dst, back = bytearray(len(body)), bytearray(len(raw))
        assert native.fp8_encode(raw, TYPES[dtype], head_dim, dst) and bytes(dst) == body, head_dim
        assert native.fp8_decode(body, TYPES[dtype], head_dim, back)
        assert bytes(back) == fp8.raw_of(fp8.decode_vectors(exponents, codes), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_native_rotated_is_the_reference(level: str, dtype: str) -> None:
    for head_dim in DIMS:
        numbers = awkward(head_dim, dtype)
        bits = torch.from_numpy(np.random.default_rng(1).choice(np.array([3, 4, 8], np.uint8), len(numbers)))
        scales, minima, codes = rotated.encode_vectors(numbers, bits)
        body = scales.numpy().tobytes() + minima.numpy().tobytes() + rotated.planes_of(codes, bits)
        raw = numbers.to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
        dst, back = bytearray(len(body)), bytearray(len(raw))
        assert native.rotated_encode(raw, TYPES[dtype], head_dim, bits.numpy(), dst) and bytes(dst) == body, head_dim
        assert native.rotated_decode(body, TYPES[dtype], head_dim, bits.numpy(), back)
        assert bytes(back) == rotated.raw_of(rotated.decode_vectors(scales, minima, codes), dtype)
        assert torch.equal(rotated.codes_of(rotated.planes_of(codes, bits), bits, head_dim), codes)


ENCODERS = {
    "fp8": (Fp8Codec(), lambda raw, source, table: fp8.encode(raw, source)),
    "int4h": (Int4hCodec(3, 1), lambda raw, source, table: rotated.encode_int4h(raw, source, 3, 1)),
    "adaptive": (None, lambda raw, source, table: rotated.encode_adaptive(raw, source, table)),
}


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=25, deadline=None)
@given(head_dim=st.integers(16, 140), dtype=st.sampled_from(list(TYPES)), seed=st.integers(0, 1 << 32))
def test_whole_chunks_are_the_reference(name: str, head_dim: int, dtype: str, seed: int) -> None:
    layout = layout_of(dtype, head_dim)
    raw, source = normal(layout, TOKENS, seed), Source(layout, TOKENS, seed % 2)
    model = calibration(layout, seed)
    codec, reference = ENCODERS[name]
    codec = codec or AdaptiveCodec(model)
    data = encoded(codec, raw, source)
    assert data == reference(raw, source, model.table)
    assert decoded(codec, data, len(raw)) == (
        fp8.decode(data, len(raw)) if name == "fp8" else rotated.decode(codec.number, data, len(raw))
    )


@settings(max_examples=60, deadline=None)
@given(
    head_dim=st.integers(1, 140),
    dtype=st.sampled_from(list(TYPES)),
    seed=st.integers(0, 1 << 32),
    power=st.integers(-140, 120),
)
def test_fp8_error(head_dim: int, dtype: str, seed: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    limit = min(float(torch.finfo(DTYPES[dtype]).max), 3e38)
    x = rng.normal(size=(5, head_dim)) * np.exp(4 * rng.normal(size=(5, head_dim)))
    raw = stored(np.clip(x * 2.0**power, -limit, limit), dtype)
    body, back = bytearray(5 * (head_dim + 1)), bytearray(len(raw))
    assert native.fp8_encode(raw, TYPES[dtype], head_dim, body)
    assert native.fp8_decode(body, TYPES[dtype], head_dim, back)
    x = loaded(raw, dtype).reshape(5, head_dim)
    error = np.abs(loaded(bytes(back), dtype).reshape(5, head_dim) - x)
    assert np.isfinite(error).all()
    least = 2.0**-25 if dtype == "float16" else 2.0**-134
    largest = np.abs(x).max(1, keepdims=True)
    assert (error <= np.maximum(np.abs(x) / 16, largest / 237000) + least).all()


@settings(max_examples=60, deadline=None)
@given(
    head_dim=st.integers(1, 140),
    dtype=st.sampled_from(list(TYPES)),
    bits=st.sampled_from([3, 4, 8]),
    seed=st.integers(0, 1 << 32),
    power=st.integers(-20, 8),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_rotated_error(head_dim: int, dtype: str, bits: int, seed: int, power: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(5, head_dim)) * np.exp(rng.normal(size=head_dim)) + offset) * 2.0**power
    raw = stored(np.clip(x, -3000, 3000), dtype)
    each = np.full(5, bits, np.uint8)
    body, back = bytearray(5 * (4 + bits * -(-head_dim // 8))), bytearray(len(raw))
    assert native.rotated_encode(raw, TYPES[dtype], head_dim, each, body)
    assert native.rotated_decode(body, TYPES[dtype], head_dim, each, back)
    x = loaded(raw, dtype).reshape(5, head_dim)
    block = rotated.block_of(head_dim)
    turned = x.reshape(5, -1, block) @ sylvester(block) / block**0.5
    low, high = turned.min((1, 2)), turned.max((1, 2))
    scale = (high - low + np.abs(low) / 1024 + 2.0**-24) / (2**bits - 1) * (1 + 2.0**-10) + 2.0**-24
    assert (np.frombuffer(bytes(body[:10]), np.float16) <= scale * (1 + 2.0**-20) + np.abs(x).max() * 2.0**-18).all()
    error = loaded(bytes(back), dtype).reshape(5, head_dim) - x
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0}[dtype]
    length = np.sqrt((x**2).sum(1))
    rounding = unit * (length + scale * head_dim**0.5) + 2.0**-20 * length + 2.0**-24 * head_dim**0.5
    assert (np.sqrt((error**2).sum(1)) <= scale / 2 * head_dim**0.5 + rounding).all()


def sylvester(n: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_numbers_stay_finite_and_exact_zeros_zero(dtype: str) -> None:
    top = float(torch.finfo(DTYPES[dtype]).max)
    raw = stored(np.array([[top, -top] * 16, [0.0, -0.0] * 16]), dtype)
    body, back = bytearray(2 * 33), bytearray(len(raw))
    assert native.fp8_encode(raw, TYPES[dtype], 32, body) and native.fp8_decode(body, TYPES[dtype], 32, back)
    numbers = loaded(bytes(back), dtype)
    assert np.isfinite(numbers).all() and (np.abs(numbers[:32]) >= top * 15 / 16).all()
    assert bytes(back[len(raw) // 2 :]) == raw[len(raw) // 2 :], "signs of zeros too"
    bits = np.full(2, 4, np.uint8)
    body = bytearray(2 * (4 + 16))
    if dtype != "float16":
        assert not native.rotated_encode(raw, TYPES[dtype], 32, bits, body), "a scale in fp16 is too small for it"
        return
    assert native.rotated_encode(raw, 2, 32, bits, body) and native.rotated_decode(body, 2, 32, bits, back)
    assert np.isfinite(loaded(bytes(back), dtype)).all()


@pytest.mark.parametrize("level_name", LEVELS)
def test_nan_is_found_wherever_it_is(level_name: str) -> None:
    _native._set_level(level_name)
    try:
        for head_dim in (1, 16, 65, 128, 256):
            bits, size = np.full(19, 4, np.uint8), 19 * head_dim
            for at in {0, 1 % size, size // 2, size - 1}:
                for wrong in (np.nan, np.inf, -np.inf):
                    numbers = np.random.default_rng(at).normal(size=size).astype(np.float32)
                    numbers[at] = wrong
                    raw = numbers.tobytes()
                    planes = bytearray(19 * (4 + 4 * -(-head_dim // 8)))
                    assert not native.fp8_encode(raw, 3, head_dim, bytearray(size + 19)), (head_dim, at, wrong)
                    assert not native.rotated_encode(raw, 3, head_dim, bits, planes), (head_dim, at, wrong)
    finally:
        _native._set_level(LEVELS[-1])


def test_native_refuses_wrong_lengths() -> None:
    raw, bits = bytes(256), np.full(2, 4, np.uint8)
    for wrong in (
        lambda: native.fp8_encode(raw, 1, 64, bytearray(129)),
        lambda: native.fp8_encode(raw, 0, 64, bytearray(130)),
        lambda: native.fp8_encode(raw, 1, 63, bytearray(130)),
        lambda: native.fp8_encode(raw, 1, 0, bytearray(130)),
        lambda: native.fp8_encode(raw, 1, 64, bytes(130)),
        lambda: native.fp8_decode(bytes(131), 1, 64, bytearray(256)),
        lambda: native.rotated_encode(raw, 1, 64, bits[:1], bytearray(72)),
        lambda: native.rotated_encode(raw, 1, 64, bits + 1, bytearray(88)),
        lambda: native.rotated_encode(raw, 1, 64, bits, bytearray(71)),
        lambda: native.rotated_decode(bytes(73), 1, 64, bits, bytearray(256)),
    ):
        with pytest.raises(ValueError):
            wrong()


LAYOUTS = {
    "dense": KVLayout.dense(3, 2, 16, "bfloat16"),
    "NHD": KVLayout.paged(3, 2, 16, "bfloat16", 4),
    "HND": KVLayout.paged(3, 2, 16, "bfloat16", 4, order="HND"),
    "fused": KVLayout(3, 2, 16, "bfloat16", 4, ("layer",), ("kv", "token", "head", "dim")),
    "MLA": KVLayout(3, 1, 16, "bfloat16", 4, ("layer", "kv"), ("token", "head", "dim"), 1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("position", [0, 1])
def test_bits_follow_layer_head_and_token(layout: KVLayout, position: int) -> None:
    """The same numbers in another order, as `canonical` gives them."""
    model = calibration(layout)
    raw = bytes(layout.chunk_bytes(TOKENS))
    _, header = describe(Codec.ADAPTIVE, len(raw), Source(layout, TOKENS, position), sink_tokens=5, edge_layers=1)
    bits = bits_of(layout, header, model.table)
    marked = np.repeat(bits, layout.head_dim * 2)
    view = layout.canonical(marked, TOKENS)[..., 0, 0]
    tokens = view.transpose(0, 1, 4, 2, 3).reshape(layout.layers, layout.kv, layout.kv_heads, TOKENS)
    for layer in range(layout.layers):
        for kv in range(layout.kv):
            for head in range(layout.kv_heads):
                own = 8 if layer in (0, layout.layers - 1) else model.bits[layer][kv][head]
                sinks = 5 if position == 0 else 0
                assert tokens[layer, kv, head].tolist() == [8] * sinks + [own] * (TOKENS - sinks)


def test_adaptive_needs_the_calibration_of_the_model_to_encode_and_nothing_to_decode() -> None:
    layout = layout_of()
    raw, source = normal(layout, TOKENS), Source(layout, TOKENS)
    with pytest.raises(CannotEncode, match="no calibration"):
        encoded(AdaptiveCodec(), raw, source)
    with pytest.raises(CannotEncode, match=r"\(3, 2, 2, 32\), the chunk of \(3, 2, 2, 16\)"):
        encoded(AdaptiveCodec(calibration(layout_of(head_dim=32))), raw, source)
    data = encoded(AdaptiveCodec(calibration(layout)), raw, source)
    assert decoded(AdaptiveCodec(), data, len(raw)) == decoded(AdaptiveCodec(calibration(layout)), data, len(raw))


def test_what_would_not_shrink_is_refused() -> None:
    layout = layout_of(head_dim=2)
    with pytest.raises(CannotEncode, match="would become"):
        encoded(Int4hCodec(), normal(layout, TOKENS), Source(layout, TOKENS))


@pytest.mark.parametrize(
    "codec", [Fp8Codec(), Int4hCodec(), AdaptiveCodec(calibration(layout_of()))], ids=lambda c: c.name
)
def test_damaged_scales_and_tables_are_format_errors(codec: ChunkCodec) -> None:
    layout = layout_of()
    raw = normal(layout, TOKENS)
    data = encoded(codec, raw, Source(layout, TOKENS))
    table = len(calibration(layout).table) if codec.number is Codec.ADAPTIVE else 0
    damaged = bytearray(data)
    damaged[HEADER_BYTES + table : HEADER_BYTES + table + 2] = b"\xff\xff"
    with pytest.raises(FormatError, match=r"exponent|finite"):
        decoded(codec, bytes(damaged), len(raw))
    damaged = bytearray(data)
    damaged[60] ^= 1  # extra_bytes
    with pytest.raises(FormatError):
        decoded(codec, bytes(damaged), len(raw))
    if table:
        damaged = bytearray(data)
        damaged[HEADER_BYTES] = 5
        with pytest.raises(FormatError, match="table of bits"):
            decoded(codec, bytes(damaged), len(raw))


@pytest.mark.parametrize("name", ENCODERS)
def test_golden_bytes(name: str) -> None:
    """What was written once is read, and written, for ever."""
    layout = layout_of()
    raw, source = (GOLDEN / "numbers.bin").read_bytes(), Source(layout, TOKENS)
    data, back = (GOLDEN / f"{name}.bin").read_bytes(), (GOLDEN / f"{name}_decoded.bin").read_bytes()
    codec = ENCODERS[name][0] or AdaptiveCodec(calibration(layout))
    assert decoded(codec, data, len(raw)) == back
    assert encoded(codec, raw, source) == data
