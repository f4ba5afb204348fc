"""`lmpipe bench gpu` without a GPU: its arithmetic on invented times, and its driving code in the interpreter, tiny."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_runtime import FakeRuntime

from lmpipe.bench import gpu, gpu_ipc, gpu_model, gpu_transfers
from lmpipe.bench.gpu_device import Device, Work, checksum
from lmpipe.bench.gpu_llama import LLAMA_8B, TINY, Llama
from lmpipe.bench.harness import Measured, Setting
from lmpipe.bench.report import Figure
from lmpipe.cuda.ipc import ExportedPages
from lmpipe.handles import Codec
from lmpipe.layout import CHUNK_TOKENS, KVLayout

TOKENS = 2 * CHUNK_TOKENS


@pytest.fixture
def machine(device: torch.device) -> Device:
    """The CPU, or the GPU with --gpu."""
    return Device(device)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """A quick run."""
    return Setting(quick=True, disk=tmp_path)


def names(figures: list[Figure]) -> set[str]:
    """Of figures that have values."""
    assert all(figure.value > 0 for figure in figures)
    return {figure.name for figure in figures}


def test_rates_are_of_each_side_s_own_bytes(setting: Setting) -> None:
    """2 GB in 1 s beside 3 GB in 2 s; each time is a median."""
    mine, limit = iter([1.0, 9.0, 1.0]), iter([2.0, 2.0, 7.0])
    found = gpu_transfers.figure(
        setting, "", lambda: next(mine), lambda: next(limit), gpu_transfers.OF_LINK, 2 * 10**9, 3 * 10**9
    )
    # The first of three is a warm-up; of two the median is the middle: 2/9 and 2 GB/s, 1.5 and 3/7 GB/s.
    assert found.value == pytest.approx((2 / 9 + 2) / 2) and found.limit == pytest.approx((1.5 + 3 / 7) / 2)
    assert found.ratio == pytest.approx(found.value / (found.limit or 0)) and found.met is True


def test_prompts_that_there_is_room_for() -> None:
    weights, each = LLAMA_8B.weight_bytes, LLAMA_8B.kv_bytes(1)
    assert 15e9 < weights < 17e9 and each == 128 << 10
    wanted, much = (4096, 32768, 131072), 1e15
    fitting = gpu_model.sizes_that_fit
    assert fitting(LLAMA_8B, wanted, much, much) == list(wanted)
    assert fitting(LLAMA_8B, wanted, weights + 2 * 32768 * each, much) == [4096, 32768]
    assert fitting(LLAMA_8B, wanted, much, 1.7 * 4096 * each) == [4096]
    assert fitting(LLAMA_8B, wanted, weights, much) == []


def test_a_checksum_knows_where_a_page_is(machine: Device) -> None:
    memory = machine.numbers(2, 3, 4, 1, 8)
    assert checksum(memory) == checksum(memory.clone()) != checksum(memory[:, [1, 0, 2]])


def test_kernels_and_transfers(machine: Device, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_transfers, "CODECS", {})
    figures = gpu_transfers.run(setting, machine, TOKENS)
    wanted = {f"{name}, 512 tokens" for name in ("save", "load", "load by layer", "both at once")}
    wanted |= {f"{name}, {grid}" for name in ("gather", "scatter") for grid in ("full grid", "16 programs")}
    assert names(figures) == wanted


def test_by_ipc(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake device in two processes, of which this test is both."""
    in_turns = Setting.alternate

    def figure_last(self: Setting, name: str, figure: Measured, limit: Measured) -> tuple[list[float], list[float]]:
        found = in_turns(self, name, figure, limit)
        figure()  # what it copied is there to be looked at
        return found

    monkeypatch.setattr(Setting, "alternate", figure_last)
    layout = gpu_transfers.layout_of(setting)
    engine, gather = FakeRuntime(tmp_path), FakeRuntime(tmp_path)
    nbytes, pages = layout.chunk_bytes(TOKENS), TOKENS // layout.page_tokens
    base, own = engine.malloc(nbytes), gather.malloc(nbytes)
    planes = [base + plane * pages * layout.page_bytes for plane in range(layout.plane_count)]
    exported = ExportedPages(engine, planes, layout.page_bytes, layout.page_bytes, pages)
    stream = engine.new_stream(urgent=True)
    exported.mark(stream)
    engine.finish(stream)
    engine.view(base, nbytes)[:] = np.random.default_rng(0).integers(0, 255, nbytes, np.uint8)
    figures = gpu_ipc.run(setting, gather, exported.source, layout, TOKENS, own)
    wanted = {"pages opened by IPC", "save by IPC, 512 tokens", "chunks out of device memory by IPC, 512 tokens"}
    assert names(figures) == wanted
    assert gather.opens == setting.warm_ups + setting.runs + 2 and gather.pageable == 0 and not gather.open_now
    assert (gather.view(own, nbytes) == engine.view(base, nbytes)).all()


def test_codecs(machine: Device, setting: Setting) -> None:
    work = Work.of(machine, KVLayout.paged(1, 1, 16, "bfloat16", 16), CHUNK_TOKENS)
    figures = gpu_transfers.codec_kernels(setting, work, Codec.INT4H, gpu_transfers.CODECS[Codec.INT4H])
    assert [figure.goal for figure in figures] == ["value >= 188", None]
    figures += gpu_transfers.codec_transfers(setting, work, Codec.SPLIT)
    assert names(figures) == {
        "int4h, encode, kernels",
        "int4h, decode, kernels",
        "split, saved, encoded bytes",
        "split, loaded, encoded bytes",
    }


def test_a_model_that_decodes_and_first_tokens(machine: Device, setting: Setting) -> None:
    figures = gpu_model.run(setting, machine, TINY, [TOKENS])
    warm = {f"warm from {place}" for place in ("DRAM, raw", "DRAM, int4h", "SSD, raw")}
    assert names(figures) == {f"decode step after {TOKENS} tokens, beside saves"} | {
        f"first token after {TOKENS} tokens, {what}" for what in {"cold", *warm}
    }
    assert list(setting.disk.iterdir()) == []


def test_the_model_computes_the_same_with_a_cache(machine: Device) -> None:
    """All tokens at once, and all but the last one before it."""
    model = Llama(TINY, machine.torch)
    prompt, cache, other = model.prompt(40), model.cache(40), model.cache(40)
    whole = model.forward(prompt, cache, 0)
    model.forward(prompt[:-1], other, 0)
    layers: list[int] = []
    last = model.forward(prompt[-1:], other, 39, layers.append)
    assert layers == [0, 1]
    torch.testing.assert_close(whole, last, atol=0.1, rtol=0.1)
    torch.testing.assert_close(cache, other, atol=0.1, rtol=0.1)


def test_torch_without_a_gpu_is_said(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    no: Callable[[], bool] = lambda: False  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", no)
    with pytest.raises(SystemExit, match="sees none"):
        gpu.run(setting)
