"""The codecs' GPU kernels: bytes of bf16 per second against a copy within the device's memory; or all kernels compiled.

    python profiling/gpu_codecs.py                 on a GPU; figures on stdout
    python profiling/gpu_codecs.py --compile 90    for that compute capability, or gfx942 and the like; no GPU needed

Pages are those of `lmpipe bench save`: 32 layers x 8 heads x 128, bf16, 16 tokens, in random order. A chunk has 256
tokens (32 MiB), and 16 of them take turns, so that no cache holds them. Inside the clock, which is the device's, is
everything from the first launch of a turn to its last kernel's end. Kernels and copy take turns too; the median of the
rounds counts. Before a codec is measured, one chunk must give the bytes that it has on the CPU.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from lmpipe.codecs import CODECS
from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.calibration import BITS
from lmpipe.codecs.header import HEADER_BYTES, Header
from lmpipe.codecs.reference.rotated import encode_adaptive
from lmpipe.codecs.source import Source
from lmpipe.cuda import coding, paging, split
from lmpipe.cuda.coding import Coder
from lmpipe.cuda.pages import DevicePages
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

CHUNKS, CHUNK_PAGES, ROUNDS = 16, 16, 20
PROGRAMS = (8, 16, 32, 64, 1024)
"""How many programs a kernel may have: what is left of the multiprocessors is the engine's."""


PAGED = [
    (KVLayout.paged(1, 8, 128, "bfloat16", 16), 4),
    (KVLayout.dense(1, 2, 128, "bfloat16"), 4),
    (KVLayout.paged(1, 3, 80, "bfloat16", 4), 4),
    (KVLayout(2, 8, 128, "bfloat16", 16, (), ("layer", "kv", "token", "head", "dim")), 1),
    (KVLayout(1, 1, 576, "bfloat16", 64, ("layer",), ("kv", "token", "head", "dim"), kv=1), 1),
    *((KVLayout(1, 1, 1, "uint8", 1, ("layer",), ("opaque",), opaque_page_bytes=odd), 1) for odd in (1, 6, 4098)),
]
"""Layouts, and pages of a chunk, that make kernels of raw pages differ: rows a page and a tile, words of 4, 2, 1."""


@dataclass
class Chunk:
    """A chunk's pages, and a buffer for what follows the header of its encoded form."""

    pages: DevicePages
    ids: torch.Tensor
    payload: torch.Tensor
    table: bytes


def bits_table(layout: KVLayout) -> bytes:
    """As `adaptive` might have it: 3, 4 and 8 bits."""
    count = layout.layers * layout.kv * layout.kv_heads
    return np.random.default_rng(1).choice(BITS, count, p=(0.7, 0.25, 0.05)).astype(np.uint8).tobytes()


def raw_bytes(chunk: Chunk) -> int:
    """Of the chunk's payload."""
    return chunk.pages.layout.plane_count * len(chunk.ids) * chunk.pages.layout.page_bytes


def coder(codec: Codec, chunk: Chunk) -> Coder:
    """As `adaptive` is configured by calibration, and the others by default."""
    return Coder(codec, table=chunk.table if codec == Codec.ADAPTIVE else b"")


def encode(codec: Codec, chunk: Chunk, programs: int) -> torch.Tensor:
    """Bytes that follow the header, on the device; -1: the chunk is refused."""
    return coder(codec, chunk).encode(chunk.pages, chunk.ids, chunk.payload, 0, programs=programs)


def header(codec: Codec, chunk: Chunk, payload_bytes: int) -> Header:
    """Of the chunk when it is encoded."""
    return coder(codec, chunk).header(chunk.pages, len(chunk.ids), 0, payload_bytes)


def decode(codec: Codec, head: Header, chunk: Chunk, programs: int) -> torch.Tensor:
    """What the kernels return: whether the chunk is damaged."""
    payload = chunk.payload[: head.payload_bytes]
    return coding.decode(head, coder(codec, chunk).table, payload, chunk.pages, chunk.ids, programs=programs)


def chunks(layout: KVLayout, count: int, device: str) -> list[Chunk]:
    """Chunks in one pool, their pages in random order, numbers as models have them."""
    scales = torch.randn(layout.head_dim, device=device).exp()
    shape = (count * CHUNK_PAGES, layout.page_tokens, layout.kv_heads, layout.head_dim)
    dtype = getattr(torch, layout.dtype)
    planes = [(torch.randn(shape, device=device) * scales).to(dtype) for _ in range(layout.plane_count)]
    pages = DevicePages.of(layout, planes)
    order = np.random.default_rng(0).permutation(count * CHUNK_PAGES).astype(np.int32).reshape(count, -1)
    nbytes = split.bound(pages, CHUNK_PAGES)
    return [
        Chunk(pages, pages.ids(ids), torch.empty(nbytes, dtype=torch.uint8, device=device), bits_table(layout))
        for ids in order
    ]


# ---- without a GPU


@dataclass(frozen=True)
class Assembly:
    """Where a backend of Triton leaves its code, and what in it is of interest here, as regular expressions."""

    text: str
    binary: str
    wide_load: str
    wide_store: str
    inexact: str
    """Of multiplications and additions in one, which round otherwise than both."""
    division: str = "$^"
    """An exact one; it has five of these in it."""


ASSEMBLIES = {
    "cuda": Assembly("ptx", "cubin", r"ld\.global\.v4", r"st\.global\.v4", r"fma\.rn\.f32|div\.(full|approx)|\.ftz"),
    "hip": Assembly(
        "amdgcn",
        "hsaco",
        r"(global|buffer)_load_dwordx4",
        r"(global|buffer)_store_dwordx4",
        r"v_(pk_)?(fma|fmac|mad)_f32",
        "v_div_fixup_f32",
    ),
}


def target(architecture: str) -> GPUTarget:
    """Of a compute capability, or of an AMD architecture."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture), 32)


class CompileOnly:
    """The part of a driver that Triton asks before it compiles."""

    def __init__(self, architecture: str) -> None:
        self._target = target(architecture)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(architecture: str, dtypes: list[str]) -> None:
    """Compile every kernel as it would be launched, and say what became of it."""
    triton.runtime.driver.set_active(CompileOnly(architecture))
    assembly = ASSEMBLIES[target(architecture).backend]
    run = triton.JITFunction.run

    def compiled(self: triton.JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        text = kernel.asm[assembly.text]
        load, store = ("v4" if re.search(way, text) else "-" for way in (assembly.wide_load, assembly.wide_store))
        inexact = len(re.findall(assembly.inexact, text)) - 5 * len(re.findall(assembly.division, text))
        kind = kwargs["DTYPE"] if "DTYPE" in kwargs else f"{kwargs['ITEM']}x{kwargs['WORDS']}"
        print(
            f"{self.fn.__module__}.{self.__name__} {kind} {architecture}:"
            f" {len(kernel.asm[assembly.binary])} bytes, {kernel.metadata.shared} shared,"
            f" widest load {load}, store {store}, inexact {inexact}"
        )

    triton.JITFunction.run = compiled
    for layout, count in PAGED:
        memory = torch.zeros((layout.plane_count, count, layout.page_bytes), dtype=torch.uint8)
        pages, ids = DevicePages.of(layout, list(memory)), torch.arange(count, dtype=torch.int32)[None]
        payloads = torch.empty((1, memory.numel()), dtype=torch.uint8)
        paging.gather(pages, ids, payloads, programs=16)
        paging.scatter(pages, ids, payloads, programs=16)
    for dtype in dtypes:
        (chunk,) = chunks(KVLayout.paged(1, 2, 128, dtype, 16), 1, "cpu")
        for codec in (Codec.SPLIT, Codec.FP8, Codec.INT4H):
            encode(codec, chunk, 16)
            decode(codec, header(codec, chunk, len(chunk.payload)), chunk, 16)


# ---- on a GPU


def check(codec: Codec, chunk: Chunk) -> None:
    """The chunk's encoded bytes must be those of the CPU, and must decode to what they do there."""
    layout = chunk.pages.layout
    ids = chunk.ids.cpu().tolist()
    raw = b"".join(plane[ids].cpu().view(torch.uint8).numpy().tobytes() for plane in chunk.pages.planes)
    source = Source(layout, CHUNK_PAGES * layout.page_tokens)
    if codec == Codec.ADAPTIVE:
        expected = encode_adaptive(raw, source, chunk.table)
    else:
        dst = memoryview(bytearray(CODECS[codec].bound(len(raw))))
        expected = bytes(dst[: CODECS[codec].encode(memoryview(raw), dst, source)])
    head = header(codec, chunk, int(encode(codec, chunk, 64)))
    found = head.pack() + chunk.payload[: head.payload_bytes].cpu().numpy().tobytes()
    if found != expected or len(found) != HEADER_BYTES + head.payload_bytes:
        raise SystemExit(f"{codec.name}: the GPU's bytes are not the CPU's")
    back = memoryview(bytearray(len(raw)))
    (AdaptiveCodec() if codec == Codec.ADAPTIVE else CODECS[codec]).decode(memoryview(expected), back)
    damaged = int(decode(codec, head, chunk, 64))
    written = b"".join(plane[ids].cpu().view(torch.uint8).numpy().tobytes() for plane in chunk.pages.planes)
    if damaged or written != bytes(back):
        raise SystemExit(f"{codec.name}: what the GPU decodes is not what the CPU does")


def seconds(step: Callable[[], object]) -> float:
    """On the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def turns(codec: Codec, pool: list[Chunk], programs: int) -> Iterator[tuple[str, float, float]]:
    """(what, bytes of bf16 per second, the same of a copy): encoding and decoding all chunks of the pool."""
    nbytes = raw_bytes(pool[0]) * len(pool)
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    steps: dict[str, Callable[[], object]] = {
        "encode": lambda: [encode(codec, chunk, programs) for chunk in pool],
        "decode": lambda: [decode(codec, head, chunk, programs) for head, chunk in zip(heads, pool, strict=True)],
    }
    heads = [header(codec, chunk, int(encode(codec, chunk, programs))) for chunk in pool]
    for what, step in steps.items():
        step()
        both = [(seconds(step), seconds(lambda: target.copy_(source))) for _ in range(ROUNDS)]
        mine, copy = (statistics.median(times) for times in zip(*both, strict=True))
        yield what, nbytes / mine, nbytes / copy


def measure() -> None:
    """Check, then measure, every codec."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("codec     what    programs      GB/s   copy GB/s   ratio")
    pool = chunks(KVLayout.paged(32, 8, 128, "bfloat16", 16), CHUNKS, "cuda")
    for codec in (Codec.SPLIT, Codec.FP8, Codec.INT4H, Codec.ADAPTIVE):
        check(codec, pool[0])
        for programs in PROGRAMS:
            for what, mine, copy in turns(codec, pool, programs):
                figures = f"{mine / 1e9:9.1f} {copy / 1e9:11.1f} {mine / copy:7.3f}"
                print(f"{codec.name.lower():9} {what:7} {programs:8} {figures}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--compile", metavar="ARCHITECTURE", help="compile only, such as for 90 (an H100) or gfx942 (an MI300)"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"], help="to compile for")
    arguments = parser.parse_args()
    if arguments.compile:
        compile_all(arguments.compile, arguments.dtypes)
    elif torch.cuda.is_available():
        measure()
    else:
        raise SystemExit("no GPU here, or torch is built without CUDA; --compile 90 compiles without one")


if __name__ == "__main__":
    main()
