"""KV through a codec: whole chunks, in the right order, and raw where a codec refuses."""

from __future__ import annotations

import pytest
import torch

from lmpipe.codecs import CODECS, ChunkCodec, Source
from lmpipe.codecs.raw import RawCodec
from lmpipe.handles import Codec, Fidelity
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.quality.passage import through

LAYOUT = KVLayout.dense(2, 3, 16, "bfloat16")


def kv(chunks: int, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2, rows, 3, chunks * CHUNK_TOKENS, 16, generator=generator).bfloat16()


class Told(RawCodec):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, Source]] = []

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        self.seen.append((bytes(src), source))
        return super().encode(src, dst, source)


def test_chunks_are_payloads_of_the_layout_with_their_position() -> None:
    numbers, codec = kv(2), Told()
    passage = through(codec, numbers, LAYOUT)
    assert torch.equal(passage.kv, numbers)
    assert [source for _, source in codec.seen] == [Source(LAYOUT, CHUNK_TOKENS, at) for at in (0, 1, 0, 1)]
    second = numbers[:, :, 0, :, CHUNK_TOKENS:]
    assert codec.seen[1][0] == second.contiguous().view(torch.uint8).numpy().tobytes()
    assert passage.raw_bytes == passage.encoded_bytes == numbers.numel() * 2
    assert (passage.chunks, passage.refused) == (4, 0)


@pytest.mark.parametrize("codec", [codec for codec in CODECS.values() if codec.fidelity is Fidelity.EXACT])
def test_exact_codecs_give_back_every_bit(codec: ChunkCodec) -> None:
    numbers = kv(1)
    assert torch.equal(through(codec, numbers, LAYOUT).kv.view(torch.int16), numbers.view(torch.int16))


def test_refused_chunks_stay_raw_and_are_counted() -> None:
    numbers = kv(2)
    numbers[0, 1, 1, 2, 300, 4] = torch.inf
    passage = through(CODECS[Codec.INT4H], numbers, LAYOUT)
    assert (passage.chunks, passage.refused) == (4, 1)
    changed = [
        not torch.equal(passage.kv[:, :, row, :, tokens], numbers[:, :, row, :, tokens])
        for row in (0, 1)
        for tokens in (slice(0, CHUNK_TOKENS), slice(CHUNK_TOKENS, None))
    ]
    assert changed == [True, True, True, False]
    assert LAYOUT.chunk_bytes(CHUNK_TOKENS) < passage.encoded_bytes < 2.5 * LAYOUT.chunk_bytes(CHUNK_TOKENS)


def test_the_first_tokens_of_a_prompt_are_kept_better() -> None:
    errors = (through(CODECS[Codec.INT4H], kv(2), LAYOUT).kv.float() - kv(2).float()).abs()
    by_token = errors.amax(dim=(0, 1, 2, 3, 5))
    assert by_token[:4].max() < 0.1 * by_token[4:].max()
    assert by_token[CHUNK_TOKENS : CHUNK_TOKENS + 4].max() > 2 * by_token[:4].max()
