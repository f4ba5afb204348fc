"""What transfers are worth to a model, and what they cost it: an 8B Llama's shape, bf16, random weights.

decode step    one token after 4K, launched as one CUDA graph, while another thread saves other pages without a pause;
               against the same step alone, in turns
first token    a prompt of N tokens and one more. Cold: all of them computed. Warm: N are loaded into the empty cache,
               from pinned memory (raw layer by layer, each layer awaited where it is needed; or int4h), or from files
               read past the page cache by two threads, each chunk loaded as it comes; then one token is computed.
               Until its logits are there, on the host's clock

The cache of a raw load must be the one that was saved, bit by bit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lmpipe.bench.gpu_device import Device, Work, checksum
from lmpipe.bench.gpu_llama import LLAMA_8B as LLAMA_8B
from lmpipe.bench.gpu_llama import TINY as TINY
from lmpipe.bench.gpu_llama import Llama, Shape
from lmpipe.bench.harness import Setting, scaled
from lmpipe.bench.report import Figure, Goal
from lmpipe.codecs.header import HEADER_BYTES
from lmpipe.cuda.coding import Coder
from lmpipe.cuda.lanes import Event
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.transfers import Transfers
from lmpipe.handles import Codec
from lmpipe.layout import CHUNK_TOKENS
from lmpipe.tiers.segment_file import open_direct, read_at, write_at

SLOWDOWN = Goal("ratio", "<=", 1.05)
DECODE_TOKENS, SAVED_TOKENS = 4 << 10, 16 << 10
STEPS = 50
READERS = 2
SPARE_DISK_BYTES = 1 << 30
DEVICE_BYTES, HOST_BYTES = 2.0, 1.7
"""For a byte of a prompt's KV: what a prefill computes with; encoded chunks, in memory that comes in powers of two."""


def sizes_that_fit(shape: Shape, wanted: Sequence[int], device_room: float, host_room: float) -> list[int]:
    """The first of the sizes, smallest first, for which there is room beside the weights."""
    room = min((device_room - shape.weight_bytes) / DEVICE_BYTES, host_room / HOST_BYTES)
    return [tokens for tokens in wanted if shape.kv_bytes(tokens) <= room]


def run(setting: Setting, device: Device, shape: Shape, sizes: Sequence[int]) -> list[Figure]:
    """Decoding beside saves, then first tokens."""
    setting.say("building the model")
    model = Llama(shape, device.torch)
    figures = [decode_step(setting, device, model)]
    device.forget()
    for tokens in sizes:
        figures += _First(setting, device, model, tokens).figures()
        device.forget()
    return figures


def decode_step(setting: Setting, device: Device, model: Llama) -> Figure:
    """ms of a step while pages are saved."""
    tokens = setting.size(DECODE_TOKENS, 2 * CHUNK_TOKENS)
    work = Work.of(device, model.shape.layout, setting.size(SAVED_TOKENS, 2 * CHUNK_TOKENS))
    transfers, cache = Transfers(device.torch), model.cache(tokens + 1)
    pool = DevicePool(work.pages, transfers)
    token = model.prompt(1)
    step = _captured(device, lambda: model.forward(token, cache, tokens))
    steps = setting.size(STEPS, 2)
    stream = torch.cuda.current_stream(device.torch) if device.is_gpu else None

    def alone() -> float:
        def some() -> None:
            for _ in range(steps):
                step()
            if stream is not None:
                stream.synchronize()

        return device.seconds_alone(some) / steps

    def beside() -> float:
        stop, begun = threading.Event(), threading.Event()

        def save() -> None:
            try:
                while not stop.is_set():
                    saved = pool.save_into(work.page_ids, work.chunks)
                    begun.set()
                    saved.synchronize()
            finally:
                begun.set()

        with ThreadPoolExecutor(1) as thread:
            saving = thread.submit(save)
            begun.wait()
            try:
                seconds = alone()
            finally:
                stop.set()
            saving.result()
        return seconds

    values, limits = setting.alternate("decode step", beside if device.is_gpu else alone, alone)
    transfers.close()
    name = f"decode step after {tokens} tokens, beside saves"
    return Figure.of(name, scaled(values, 1e3), "ms", limits=scaled(limits, 1e3), goal=SLOWDOWN)


def _captured(device: Device, step: Callable[[], object]) -> Callable[[], object]:
    """As one CUDA graph: what the CPU does between kernels is not what is measured."""
    if not device.is_gpu:
        return step
    side = torch.cuda.Stream(device.torch)
    side.wait_stream(torch.cuda.current_stream(device.torch))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device.torch).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _First:
    """Prompts of one length."""

    def __init__(self, setting: Setting, device: Device, model: Llama, tokens: int) -> None:
        layout = model.shape.layout
        self._setting, self._device, self._model, self._tokens = setting, device, model, tokens
        self._cache = model.cache(tokens + 1)
        self._prompt = model.prompt(tokens + 1)
        self._transfers = Transfers(device.torch)
        self._pool = DevicePool(model.pages(self._cache), self._transfers)
        count = tokens // CHUNK_TOKENS
        each = layout.chunk_pages(CHUNK_TOKENS)
        self._page_ids = np.arange(count * each, dtype=np.int32).reshape(count, each)
        self._raw = list(device.host_bytes(count * layout.chunk_bytes(CHUNK_TOKENS)).view(count, -1))

    def figures(self) -> list[Figure]:
        """Cold, then warm from each place against it."""
        cold = self._times("cold", self._cold)
        self._pool.save_into(self._page_ids, self._raw).synchronize()
        coder, positions = Coder(Codec.INT4H), range(len(self._raw))
        nbytes = [coder.header(self._pool.pages, self._page_ids.shape[1], each, 0).payload_bytes for each in positions]
        encoded = [self._device.host_bytes(HEADER_BYTES + each) for each in nbytes]
        lengths = self._pool.encode_into(coder, self._page_ids, encoded, positions).lengths()
        wanted = checksum(self._kept())
        figures = [Figure.of(self._name("cold"), cold, "ms")]

        def warm(name: str, step: Callable[[], object], *, exact: bool) -> None:
            values = self._times(name, step)
            if exact and checksum(self._kept()) != wanted:
                raise RuntimeError(f"{name}: what was loaded is not what was saved")
            figures.append(Figure.of(self._name(name), values, "ms", limits=cold))

        warm("warm from DRAM, raw", self._from_dram, exact=True)
        if not all(lengths):
            raise RuntimeError("int4h refuses the KV of random weights")
        warm("warm from DRAM, int4h", lambda: self._from_encoded(encoded), exact=False)
        disk = _made(self._setting.disk)
        if shutil.disk_usage(disk).free > self._model.shape.kv_bytes(self._tokens) + SPARE_DISK_BYTES:
            with tempfile.TemporaryDirectory(prefix="lmpipe-bench-gpu-", dir=disk) as directory:
                paths = self._write(Path(directory))
                warm("warm from SSD, raw", lambda: self._from_files(paths), exact=True)
        else:
            self._setting.say(f"{self._name('warm from SSD, raw')}: left out, {disk} has no room")
        self._transfers.close()
        return figures

    def _name(self, what: str) -> str:
        return f"first token after {self._tokens} tokens, {what}"

    def _kept(self) -> torch.Tensor:
        """What is saved of the cache: all but the last token's page, `[planes, pages, …]`."""
        pages = self._tokens // self._model.shape.layout.page_tokens
        return self._cache.flatten(0, 1)[:, :pages]

    def _times(self, name: str, step: Callable[[], object]) -> list[float]:
        """ms of each run into an empty cache, which is not inside the clock."""
        values: list[float] = []
        for turn in range(-self._setting.warm_ups, self._setting.runs):
            self._setting.say(f"{self._name(name)}: {'warming up' if turn < 0 else turn + 1}")
            self._cache.zero_()
            values.append(self._device.seconds(step) * 1e3)
        return values[self._setting.warm_ups :]

    def _cold(self) -> None:
        self._model.forward(self._prompt, self._cache, 0)

    def _last(self, layers: Sequence[Event] = ()) -> None:
        """The token after the ones that are loaded, each layer when its event has come."""
        self._model.forward(self._prompt[-1:], self._cache, self._tokens, lambda layer: self._await(layers[layer]))

    def _await(self, event: Event) -> None:
        if self._device.is_gpu:
            assert isinstance(event, torch.cuda.Event)
            torch.cuda.current_stream(self._device.torch).wait_event(event)

    def _from_dram(self) -> None:
        self._last(self._pool.load_layers(self._page_ids, self._raw))

    def _from_encoded(self, encoded: list[torch.Tensor]) -> None:
        decoded = self._pool.decode_from(self._page_ids, encoded, [Codec.INT4H] * len(encoded))
        self._last([decoded.done] * self._model.shape.layers)
        if failed := decoded.failed():
            raise RuntimeError(f"chunks did not arrive: {failed}")

    def _write(self, directory: Path) -> list[Path]:
        paths = [directory / f"{chunk}.kv" for chunk in range(len(self._raw))]
        for path, chunk in zip(paths, self._raw, strict=True):
            descriptor, _ = open_direct(path, os.O_WRONLY | os.O_CREAT)
            try:
                write_at(descriptor, [chunk.numpy().data], 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return paths

    def _from_files(self, paths: list[Path]) -> None:
        event: Event | None = None
        with ThreadPoolExecutor(READERS) as readers:
            for chunk, _ in enumerate(readers.map(_read, paths, self._raw)):
                ids, host = self._page_ids[chunk : chunk + 1], self._raw[chunk : chunk + 1]
                event = self._pool.load_from(ids, host)
        assert event is not None
        self._last([event] * self._model.shape.layers)


def _read(path: Path, into: torch.Tensor) -> None:
    descriptor, _ = open_direct(path, os.O_RDONLY)
    try:
        if read_at(descriptor, [into.numpy().data], 0) != len(into):
            raise RuntimeError(f"{path} is shorter than what was written")
    finally:
        os.close(descriptor)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
