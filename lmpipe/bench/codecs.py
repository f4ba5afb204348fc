"""Codecs: speed against memcpy, bytes saved, and what that does to the hits of a conversation workload.

speed     encode and decode of one chunk of 8B-shaped KV (32 MiB of bf16, heads of 128) on one thread
limit     one memcpy of the same 32 MiB, from and to memory of which no cache has a line, as for the codec
ratio     raw bytes / encoded bytes of that chunk
hits      of a conversation workload, through a node that has DRAM only: prompt tokens found, per codec, with the same
          bytes of DRAM (hits.py)

`lmpipe quality` has the ratio on a model's own KV, and what a codec costs in quality.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lmpipe import native
from lmpipe.bench.harness import Setting, main, rates
from lmpipe.bench.hits import hits
from lmpipe.bench.numbers import calibration_of, kv
from lmpipe.bench.report import Figure, Goal
from lmpipe.codecs import CODECS, ChunkCodec, Source
from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.handles import Codec
from lmpipe.layout import CHUNK_TOKENS, KVLayout

SPEED = {Codec.SPLIT: 0.8, Codec.FP8: 0.8, Codec.INT4H: 0.5, Codec.ADAPTIVE: 0.4}
RATIO = {Codec.SPLIT: 1.3, Codec.INT4H: 3.7}
COLD_BYTES = 256 << 20
"""More than any cache: so many bytes are gone through before the same are used again."""


def run(setting: Setting) -> list[Figure]:
    """Speed and ratio of every codec, then hits."""
    layout = KVLayout.paged(setting.size(32, 2), 8, 128, "bfloat16", 16)
    chunk = kv(layout, CHUNK_TOKENS)
    figures: list[Figure] = []
    for codec in codecs(layout):
        figures += _speed(setting, codec, chunk, Source(layout, CHUNK_TOKENS, 1))
    return [*figures, *hits(setting)]


def codecs(layout: KVLayout) -> list[ChunkCodec]:
    """All but raw; the adaptive one with a table for this layout."""
    named = {**CODECS, Codec.ADAPTIVE: AdaptiveCodec(calibration_of(layout))}
    return [codec for number, codec in named.items() if number is not Codec.RAW]


def _speed(setting: Setting, codec: ChunkCodec, chunk: npt.NDArray[np.uint8], source: Source) -> list[Figure]:
    nbytes = len(chunk)
    copies = setting.size(COLD_BYTES // nbytes + 1, 1)
    raw = np.tile(chunk, (copies, 1))
    back = np.zeros_like(raw)
    stored = np.zeros((copies, codec.bound(nbytes)), np.uint8)
    lengths = [codec.encode(raw[at].data, stored[at].data, source) for at in range(copies)]
    copier, regions = native.Copier(1), (native.Region(raw.data), native.Region(back.data))
    turn = _around(copies)

    def encode() -> float:
        at = next(turn)
        began = time.perf_counter()
        codec.encode(raw[at].data, stored[at].data, source)
        return time.perf_counter() - began

    def decode() -> float:
        at = next(turn)
        began = time.perf_counter()
        codec.decode(stored[at, : lengths[at]].data, back[at].data)
        return time.perf_counter() - began

    def memcpy() -> float:
        at = next(turn)
        began = time.perf_counter()
        copier.memcpy(regions[1], at * nbytes, regions[0], at * nbytes, nbytes)
        return time.perf_counter() - began

    goal = Goal("ratio", ">=", SPEED[codec.number]) if codec.number in SPEED else None
    figures: list[Figure] = []
    for name, measured in (("encode", encode), ("decode", decode)):
        values, limits = setting.alternate(f"{codec.name}, {name}", measured, memcpy)
        values, limits = rates(nbytes, values), rates(nbytes, limits)
        figures.append(Figure.of(f"{codec.name}, {name}", values, "GB/s", limits=limits, goal=goal))
    smaller = Goal("value", ">=", RATIO[codec.number]) if codec.number in RATIO else None
    return [*figures, Figure.of(f"{codec.name}, ratio", [nbytes / lengths[0]], "x", goal=smaller)]


def _around(count: int) -> Iterator[int]:
    while True:
        yield from range(count)


if __name__ == "__main__":
    sys.exit(main(run))
