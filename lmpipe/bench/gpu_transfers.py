"""32K tokens of an 8B model's KV: 32 layers, 8 KV heads of 128, bf16, pages of 16 tokens in random order, 4 GiB.

gather, scatter    all chunks in one launch, into or from memory of the device. Full grid: against one copy of as many
                   bytes within the device's memory. Capped: against the link, since that is what it must keep up with
save, load         `DevicePool` between pages and a pinned payload for each chunk, against one DMA of the same bytes
                   between the device's memory and the same pinned memory
both at once       a save of one half and a load of the other, against two such DMAs at once
codecs             kernels alone at full grid, in bytes of bf16, against a copy within the device's memory; and through
                   `DevicePool`, in encoded bytes with headers, against one DMA of so many

The clock is the host's, from an idle device to an idle device, so launches count. Saves and loads are checked once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmpipe.bench.gpu_device import Device, Work, checksum
from lmpipe.bench.harness import Measured, Setting, rates
from lmpipe.bench.report import Figure, Goal
from lmpipe.codecs.header import Header
from lmpipe.cuda import coding, paging
from lmpipe.cuda.coding import Coder
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.transfers import PROGRAMS, Transfers
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout

OF_MEMORY, OF_LINK, KEEPS_UP, OF_BOTH = (Goal("ratio", ">=", bound) for bound in (0.8, 0.9, 1.0, 0.85))
CODECS = {
    Codec.SPLIT: {"decode": Goal("value", ">=", 300)},
    Codec.FP8: {},
    Codec.INT4H: {"encode": Goal("value", ">=", 188)},
}
"""With what is wanted of the kernels, in GB/s of bf16."""
CODEC_TOKENS = 4096
"""16 chunks of 32 MiB: no cache of the device holds them."""


def run(setting: Setting, device: Device, tokens: int) -> list[Figure]:
    """All figures."""
    layout = layout_of(setting)
    work = Work.of(device, layout, tokens)
    bench = _Transfers(setting, work)
    figures = [*bench.kernels(), *bench.directions(), bench.both()]
    bench.close()
    for codec in CODECS:
        figures += codec_transfers(setting, work, codec)
    del work, bench
    device.forget()
    work = Work.of(device, layout, min(tokens, CODEC_TOKENS))
    for codec, goals in CODECS.items():
        figures += codec_kernels(setting, work, codec, goals)
    return figures


def layout_of(setting: Setting) -> KVLayout:
    """Of the KV that is moved."""
    return KVLayout.paged(setting.size(32, 2), setting.size(8, 1), setting.size(128, 16), "bfloat16", 16)


def figure(
    setting: Setting, name: str, measured: Measured, limit: Measured, goal: Goal | None, nbytes: int, limited: int = 0
) -> Figure:
    """GB/s of `nbytes` in turns with those of its limit, of `limited` bytes if that differs."""
    values, limits = setting.alternate(name, measured, limit)
    return Figure.of(name, rates(nbytes, values), "GB/s", limits=rates(limited or nbytes, limits), goal=goal)


class _Transfers:
    def __init__(self, setting: Setting, work: Work) -> None:
        self._setting, self._work, self._device = setting, work, work.device
        self._transfers = Transfers(work.device.torch)
        self._pool = DevicePool(work.pages, self._transfers)
        self._label = f"{work.page_ids.size * work.pages.layout.page_tokens} tokens"

    def kernels(self) -> list[Figure]:
        """Gather and scatter, full grid and capped."""
        work = self._work
        payloads = self._device.bytes(work.nbytes).view(len(work.page_ids), -1)
        ids = work.pages.ids(work.page_ids)
        moves: dict[str, Callable[..., None]] = {"gather": paging.gather, "scatter": paging.scatter}
        copies = {
            "gather": lambda: payloads.view(-1).copy_(work.flat),
            "scatter": lambda: work.flat.copy_(payloads.view(-1)),
        }
        figures: list[Figure] = []
        for name, move in moves.items():
            for programs, grid in ((self._device.programs, "full grid"), (PROGRAMS, f"{PROGRAMS} programs")):
                limit = copies[name] if grid == "full grid" else self._dma_out if name == "gather" else self._dma_in
                figures.append(
                    figure(
                        self._setting,
                        f"{name}, {grid}",
                        lambda move=move, programs=programs: self._device.seconds(
                            lambda: move(work.pages, ids, payloads, programs=programs)
                        ),
                        lambda limit=limit: self._device.seconds(limit),
                        OF_MEMORY if grid == "full grid" else KEEPS_UP,
                        work.nbytes,
                    )
                )
        return figures

    def directions(self) -> list[Figure]:
        """One at a time; what was saved must be what is loaded."""
        work, pool = self._work, self._pool
        wanted = checksum(work.memory)
        pool.save_into(work.page_ids, work.chunks).synchronize()
        work.memory.zero_()
        self._device.synchronize()
        pool.load_layers(work.page_ids, work.chunks)[-1].synchronize()
        if checksum(work.memory) != wanted:
            raise RuntimeError("what was loaded is not what was saved")
        steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "save": (lambda: pool.save_into(work.page_ids, work.chunks), self._dma_out),
            "load": (lambda: pool.load_from(work.page_ids, work.chunks), self._dma_in),
            "load by layer": (lambda: pool.load_layers(work.page_ids, work.chunks), self._dma_in),
        }
        return [
            figure(
                self._setting,
                f"{name}, {self._label}",
                lambda step=step: self._device.seconds(step),
                lambda limit=limit: self._device.seconds(limit),
                OF_LINK,
                work.nbytes,
            )
            for name, (step, limit) in steps.items()
        ]

    def both(self) -> Figure:
        """Half of the chunks each way."""
        work, pool = self._work, self._pool
        half = len(work.page_ids) // 2
        ids, chunks, nbytes = work.page_ids, work.chunks, half * len(work.chunks[0])
        out, back = (torch.cuda.Stream(work.device.torch) if work.device.is_gpu else None for _ in range(2))

        def move() -> None:
            pool.save_into(ids[:half], chunks[:half])
            pool.load_from(ids[half : 2 * half], chunks[half : 2 * half])

        def dma() -> None:
            with torch.cuda.stream(out):
                work.host[:nbytes].copy_(work.flat[:nbytes], non_blocking=True)
            with torch.cuda.stream(back):
                work.flat[nbytes : 2 * nbytes].copy_(work.host[nbytes : 2 * nbytes], non_blocking=True)

        seconds = self._device.seconds
        name = f"both at once, {self._label}"
        return figure(self._setting, name, lambda: seconds(move), lambda: seconds(dma), OF_BOTH, 2 * nbytes)

    def close(self) -> None:
        self._transfers.close()

    def _dma_out(self) -> None:
        self._work.host.copy_(self._work.flat, non_blocking=True)

    def _dma_in(self) -> None:
        self._work.flat.copy_(self._work.host, non_blocking=True)


def codec_kernels(setting: Setting, work: Work, codec: Codec, goals: dict[str, Goal]) -> list[Figure]:
    """Encoding and decoding within the device's memory."""
    coder, device, count = Coder(codec), work.device, work.page_ids.shape[1]
    ids = work.pages.ids(work.page_ids)
    buffers = [device.bytes(coder.bound(work.pages, count, 1)) for _ in work.page_ids]
    target = device.bytes(work.nbytes)

    def encode() -> list[torch.Tensor]:
        return [
            coder.encode(work.pages, each, buffer, 1, programs=device.programs)
            for each, buffer in zip(ids, buffers, strict=True)
        ]

    heads = [coder.header(work.pages, count, 1, int(length)) for length in encode()]

    def decode() -> None:
        for head, each, buffer in zip(heads, ids, buffers, strict=True):
            _decode(head, buffer, work, each)

    steps: dict[str, Callable[[], object]] = {"encode": encode, "decode": decode}
    return [
        figure(
            setting,
            f"{codec.name.lower()}, {name}, kernels",
            lambda step=step: device.seconds(step),
            lambda: device.seconds(lambda: target.copy_(work.flat)),
            goals.get(name),
            work.nbytes,
        )
        for name, step in steps.items()
    ]


def _decode(head: Header, buffer: torch.Tensor, work: Work, ids: torch.Tensor) -> None:
    coding.decode(head, b"", buffer[: head.payload_bytes], work.pages, ids, programs=work.device.programs)


def codec_transfers(setting: Setting, work: Work, codec: Codec) -> list[Figure]:
    """Encoded on the way to the host and decoded on the way back."""
    coder, device = Coder(codec), work.device
    transfers = Transfers(device.torch)
    pool = DevicePool(work.pages, transfers)
    positions = range(1, len(work.page_ids) + 1)
    lengths = pool.encode_into(coder, work.page_ids, work.chunks, positions).lengths()
    if 0 in lengths:
        raise RuntimeError(f"{codec.name.lower()} refuses these numbers")
    nbytes = sum(lengths)
    sources = [chunk[:length] for chunk, length in zip(work.chunks, lengths, strict=True)]
    on_device, on_host = device.bytes(nbytes), device.host_bytes(nbytes)
    steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "saved": (
            lambda: pool.encode_into(coder, work.page_ids, work.chunks, positions),
            lambda: on_host.copy_(on_device, non_blocking=True),
        ),
        "loaded": (
            lambda: pool.decode_from(work.page_ids, sources, [codec] * len(sources)),
            lambda: on_device.copy_(on_host, non_blocking=True),
        ),
    }
    figures = [
        figure(
            setting,
            f"{codec.name.lower()}, {name}, encoded bytes",
            lambda step=step: device.seconds(step),
            lambda limit=limit: device.seconds(limit),
            OF_LINK,
            nbytes,
        )
        for name, (step, limit) in steps.items()
    ]
    transfers.close()
    return figures
