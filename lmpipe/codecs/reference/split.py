"""`split` in plain torch: the oracle of the native kernel and of the GPU kernel. Slow; no production module imports it.

docs/decisions/0011-codec-formats.md has the picture.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import torch

from lmpipe.codecs.header import DTYPES, HEADER_BYTES, Header
from lmpipe.codecs.source import Source
from lmpipe.errors import FormatError
from lmpipe.handles import Codec

ITEM_BYTES = {"": 1, "bfloat16": 2, "float16": 2, "float32": 4}
BLOCK_NUMBERS = 4096
GROUP_NUMBERS, SAMPLED_GROUPS, TOPS = 64, 17, 64
"""A window is placed by every 17th group of 64 numbers of its block."""
BITS = (2, 3, 4)
RAW = 255
TABLE_ROW = struct.Struct("<IBBH")
PROBE_BYTES, PROBES = 16 << 10, 4


def encode(raw: bytes, source: Source) -> bytes:
    """The whole encoded chunk."""
    known = source.layout.dtype if source.layout else ""
    dtype = known if known in DTYPES[1:] else probe(raw)
    payload, table_bytes = encode_numbers(raw, dtype)
    return Header(Codec.SPLIT, len(raw), len(payload), dtype, extra_bytes=table_bytes).pack() + payload


def probe(raw: bytes) -> str:
    """The dtype that shortens four pieces of `raw` most; "" where none shortens them."""
    unit = max(len(raw) // PROBES // 4 * 4, PROBE_BYTES)
    pieces = [raw[at : at + PROBE_BYTES] for at in range(0, len(raw), unit)][:PROBES]
    lengths = {dtype: sum(len(encode_numbers(piece, dtype)[0]) for piece in pieces) for dtype in DTYPES[1:]}
    best = min(lengths, key=lambda dtype: lengths[dtype])
    return best if lengths[best] < sum(len(piece) for piece in pieces) else ""


def encode_numbers(raw: bytes, dtype: str) -> tuple[bytes, int]:
    """Table, body and tail; and the bytes of the table."""
    if not dtype:
        return raw, 0
    item = ITEM_BYTES[dtype]
    whole = len(raw) // item * item
    table, body = b"", b""
    for at in range(0, whole, BLOCK_NUMBERS * item):
        offset = len(body)
        top, bits, escapes, block = encode_block(raw[at : min(at + BLOCK_NUMBERS * item, whole)], dtype)
        table += TABLE_ROW.pack(offset, top, bits, escapes)
        body += block
    return table + body + raw[whole:], len(table)


def encode_block(raw: bytes, dtype: str) -> tuple[int, int, int, bytes]:
    """Top exponent, bits, number of escapes, bytes of the block."""
    exponent, rest = take_apart(number(raw, ITEM_BYTES[dtype]), dtype)
    best = (0, RAW, 0, raw)
    for bits in BITS:
        top = place_window(exponent, bits)
        escape = (1 << bits) - 1
        code = ((top - exponent) % 256).clamp(max=escape)
        escaped = octets(exponent[code == escape])
        block = rest + planes(code, bits) + escaped
        if len(block) < len(best[3]):
            best = (top, bits, len(escaped), block)
    return best


def place_window(exponent: torch.Tensor, bits: int) -> int:
    """The top exponent of the window with most of the sampled numbers.

    It is the highest of these or up to 63 below; of equal ones the lowest.
    """
    sampled = exponent[torch.arange(len(exponent)) // GROUP_NUMBERS % SAMPLED_GROUPS == 0]
    highest, width = int(sampled.max()), (1 << bits) - 1
    inside = {
        top: int(((sampled <= top) & (sampled > top - width)).sum()) for top in range(highest - TOPS + 1, highest + 1)
    }
    return min(top for top in inside if inside[top] == max(inside.values()))


def number(raw: bytes, item: int) -> torch.Tensor:
    """Little-endian integers of `item` bytes."""
    places = torch.tensor([1 << 8 * i for i in range(item)])
    return (torch.tensor(list(raw), dtype=torch.int64).reshape(-1, item) * places).sum(1)


def take_apart(n: torch.Tensor, dtype: str) -> tuple[torch.Tensor, bytes]:
    """Exponents, and the rest of the numbers as it is stored."""
    if dtype == "bfloat16":
        return n >> 7 & 0xFF, octets(n >> 15 << 7 | n & 0x7F)
    if dtype == "float16":
        return n >> 10 & 0x1F, octets(n & 0xFF) + planes(n >> 15 << 2 | n >> 8 & 3, 3)
    low = torch.stack([n & 0xFF, n >> 8 & 0xFF], 1).flatten()
    return n >> 23 & 0xFF, octets(low) + octets(n >> 31 << 7 | n >> 16 & 0x7F)


def octets(n: torch.Tensor) -> bytes:
    """One byte each."""
    return n.to(torch.uint8).numpy().tobytes()


def planes(code: torch.Tensor, bits: int) -> bytes:
    """`bits` planes of one bit of every code, padded with zeros to whole bytes."""
    padded = torch.nn.functional.pad(code, (0, -len(code) % 8))
    places = torch.tensor([1 << i for i in range(8)])
    return b"".join(octets(((padded >> b & 1).reshape(-1, 8) * places).sum(1)) for b in range(bits))


def decode(stored: bytes, raw_bytes: int) -> bytes:
    """Inverse of `encode`.

    Raises:
        FormatError: `stored` is damaged, or holds a payload of another length.
    """
    header = Header.unpack(memoryview(stored), Codec.SPLIT, raw_bytes)
    payload = stored[HEADER_BYTES:]
    if not header.dtype:
        if header.extra_bytes or len(payload) != raw_bytes:
            raise FormatError("bytes are stored without a table")
        return payload
    item = ITEM_BYTES[header.dtype]
    numbers = raw_bytes // item
    counts = [min(BLOCK_NUMBERS, numbers - at) for at in range(0, numbers, BLOCK_NUMBERS)]
    if header.extra_bytes != len(counts) * TABLE_ROW.size:
        raise FormatError(f"a table of {header.extra_bytes} bytes for {len(counts)} blocks")
    table = list(TABLE_ROW.iter_unpack(payload[: header.extra_bytes]))
    body, tail = payload[header.extra_bytes :], raw_bytes - numbers * item
    offsets = [row[0] for row in table] + [len(body) - tail]
    if offsets[0] or any(first >= second for first, second in pairwise(offsets)):
        raise FormatError(f"offsets of blocks are not in order: {offsets}")
    blocks = [
        decode_block(body[first:second], count, row, header.dtype)
        for (first, second), count, row in zip(pairwise(offsets), counts, table, strict=True)
    ]
    return b"".join(blocks) + body[len(body) - tail :]


def decode_block(block: bytes, count: int, row: tuple[int, int, int, int], dtype: str) -> bytes:
    """The numbers of one block, as bytes."""
    _, top, bits, escapes = row
    item = ITEM_BYTES[dtype]
    plane_bytes = -(-count // 8)
    rest_bytes = {"bfloat16": count, "float16": count + 3 * plane_bytes, "float32": 3 * count}[dtype]
    expected = item * count if bits == RAW else rest_bytes + bits * plane_bytes + escapes
    if bits not in (*BITS, RAW) or len(block) != expected or (bits == RAW and escapes):
        raise FormatError(f"a block of {len(block)} bytes with {bits} bits and {escapes} escapes")
    if bits == RAW:
        return block
    escape = (1 << bits) - 1
    code = codes(block[rest_bytes : rest_bytes + bits * plane_bytes], count, bits)
    if int((code == escape).sum()) != escapes:
        raise FormatError(f"{int((code == escape).sum())} codes are escapes, the table has {escapes}")
    exponent = (top - code) % 256
    exponent[code == escape] = torch.tensor(list(block[len(block) - escapes :]), dtype=torch.int64)
    return put_together(exponent, block[:rest_bytes], dtype)


def codes(stored: bytes, count: int, bits: int) -> torch.Tensor:
    """Inverse of `planes`."""
    octet = torch.tensor(list(stored), dtype=torch.int64).reshape(bits, -1, 1)
    bit = (octet >> torch.arange(8) & 1).reshape(bits, -1)[:, :count]
    return (bit << torch.arange(bits).unsqueeze(1)).sum(0)


def put_together(exponent: torch.Tensor, rest: bytes, dtype: str) -> bytes:
    """Inverse of `take_apart`."""
    count = len(exponent)
    octet = torch.tensor(list(rest), dtype=torch.int64)
    if dtype == "float16":
        code = codes(rest[count:], count, 3)
        n = code >> 2 << 15 | (exponent & 0x1F) << 10 | (code & 3) << 8 | octet[:count]
    elif dtype == "bfloat16":
        n = octet >> 7 << 15 | exponent << 7 | octet & 0x7F
    else:
        high = octet[2 * count :]
        n = (
            high >> 7 << 31
            | exponent << 23
            | (high & 0x7F) << 16
            | octet[1 : 2 * count : 2] << 8
            | octet[: 2 * count : 2]
        )
    return octets((n.unsqueeze(1) >> 8 * torch.arange(ITEM_BYTES[dtype]) & 0xFF).flatten())
