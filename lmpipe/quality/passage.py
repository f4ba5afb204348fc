"""KV on its way through a codec and back, chunk by chunk, as a tier would keep it. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmpipe.codecs import ChunkCodec, Source
from lmpipe.errors import CannotEncode
from lmpipe.layout import CHUNK_TOKENS, KVLayout


@dataclass(frozen=True, slots=True)
class Passage:
    """KV `[layer][K|V][batch][head][token][dim]` as it came back. `refused`: chunks that had to be kept raw."""

    kv: Tensor
    raw_bytes: int
    encoded_bytes: int
    chunks: int
    refused: int


def through(codec: ChunkCodec, kv: Tensor, layout: KVLayout) -> Passage:
    """Encode and decode whole chunks of dense KV.

    Args:
        kv: `[layer][K|V][batch][head][token][dim]`, its tokens a multiple of a chunk's.
    """
    back = torch.empty_like(kv)
    raw = layout.chunk_bytes(CHUNK_TOKENS)
    space = memoryview(bytearray(codec.bound(raw)))
    _, _, batch, _, tokens, _ = kv.shape
    chunks = encoded = refused = 0
    for row in range(batch):
        for position in range(tokens // CHUNK_TOKENS):
            where = (slice(None), slice(None), row, slice(None), slice(position * CHUNK_TOKENS, None))
            part = kv[where][:, :, :, :CHUNK_TOKENS].contiguous().cpu()
            payload = _bytes_of(part)
            chunks += 1
            try:
                length = codec.encode(payload, space, Source(layout, CHUNK_TOKENS, position))
            except CannotEncode:
                refused, encoded = refused + 1, encoded + raw
            else:
                encoded += length
                part = torch.empty_like(part)
                codec.decode(space[:length], _bytes_of(part))
            back[where][:, :, :, :CHUNK_TOKENS] = part
    return Passage(back, chunks * raw, encoded, chunks, refused)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return tensor.view(torch.uint8).numpy().reshape(-1).data
