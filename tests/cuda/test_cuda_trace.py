"""Transfers in the trace of an engine's process: what the device does, on tracks of its own. With --gpu on a card."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deferred_lanes import DeferredDevice
from engine_pages import numbers

from lmpipe.cuda import timeline
from lmpipe.cuda.coding import Coder
from lmpipe.cuda.lanes import lane_of
from lmpipe.cuda.pages import DevicePages
from lmpipe.cuda.pool import DevicePool
from lmpipe.cuda.transfers import Transfers
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout
from lmpipe.spans import Spans, read_trace

LAYOUT = KVLayout.paged(2, 1, 32, "bfloat16", 4)
CHUNKS, PAGES = 4, 2
CHUNK = LAYOUT.plane_count * PAGES * LAYOUT.page_bytes
IDS = np.random.default_rng(1).permutation(CHUNKS * PAGES).astype(np.int32).reshape(CHUNKS, PAGES)
SLACK_NS = timeline.PATIENCE_NS + 1_000_000


def memory(device: torch.device) -> torch.Tensor:
    """All pages, of numbers as models have them."""
    content = torch.frombuffer(bytearray(numbers(LAYOUT, CHUNKS * PAGES)), dtype=torch.uint8)
    return content.view(LAYOUT.plane_count, CHUNKS * PAGES, -1).to(device)


def hosts(device: torch.device) -> list[torch.Tensor]:
    """A place for each chunk, with its header."""
    return [torch.zeros(CHUNK + 64, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(CHUNKS)]


def rows_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Spans of each track, in the order of the file."""
    events = read_trace(path)
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("tid") in tracks and event["ph"] == "X":
            found.setdefault(tracks[event["tid"]], []).append(event)
    return found


@pytest.mark.parametrize("lanes", ["at once", 0, 1])
def test_kernels_and_copies_of_every_lane(lanes: str | int, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda" and lanes != "at once":
        pytest.skip("deferred lanes are of the host")
    path = tmp_path / "trace.json"
    spans = Spans("engine", path)
    made = lane_of if lanes == "at once" else DeferredDevice(int(lanes)).lane
    transfers = Transfers(device, piece_bytes=CHUNK, staging_bytes=2 * CHUNK, lanes=made, spans=spans, programs=3)
    pool, places = DevicePool(DevicePages.of(LAYOUT, list(memory(device))), transfers), hosts(device)
    pool.save_into(IDS, places).synchronize()  # compiles, on a GPU
    spans.flush()
    shown = sum(map(len, rows_of(path).values()))
    before_ns = time.monotonic_ns()
    saved = pool.save_into(IDS, places)
    spans.flush()  # whatever is done by now
    saved.synchronize()
    pool.load_from(IDS, places).synchronize()
    lengths = pool.encode_into(Coder(Codec.SPLIT), IDS, places, range(1, CHUNKS + 1)).lengths()
    sources = [place[:length] for place, length in zip(places, lengths, strict=True)]
    assert pool.decode_from(IDS, sources, [Codec.SPLIT] * CHUNKS).failed() == {}
    after_ns = time.monotonic_ns()
    transfers.close()
    spans.close()
    rows = rows_of(path)
    name = f"GPU {torch.cuda.current_device()}" if device.type == "cuda" else "host"
    assert set(rows) == {f"{name}: {way}, lane {lane}" for way in ("saves", "loads") for lane in (1, 2)}
    assert shown == 2 * CHUNKS and sum(map(len, rows.values())) > 3 * shown and not spans.dropped
    nbytes: dict[tuple[str, str], int] = {}
    for row, events in rows.items():
        for event, following in pairwise(events):
            assert event["ts"] + event["dur"] <= following["ts"] + 1e-3, "a lane does one thing after the other"
        for event in events:
            key = row.split(",")[0].split()[-1], event["name"]
            nbytes[key] = nbytes.get(key, 0) + event["args"]["bytes"]
    encoded = sum(lengths) - CHUNKS * 64
    assert nbytes == {
        ("saves", "gather"): 2 * CHUNKS * CHUNK,
        ("saves", "encode"): CHUNKS * CHUNK,
        ("saves", "copy to host"): 2 * CHUNKS * CHUNK + encoded,
        ("loads", "copy from host"): CHUNKS * CHUNK + encoded,
        ("loads", "scatter"): CHUNKS * CHUNK,
        ("loads", "decode"): CHUNKS * CHUNK,
    }
    if lanes == "at once":  # deferred lanes have a clock that counts
        late = [event for events in rows.values() for event in events if event["ts"] * 1000 >= before_ns - SLACK_NS]
        assert len(late) >= 3 * CHUNKS
        assert all((event["ts"] + event["dur"]) * 1000 <= after_ns + SLACK_NS for event in late)


def test_without_a_trace_nothing_is_timed(device: torch.device) -> None:
    """Nor is there a lane for it."""
    gpu = DeferredDevice(0)
    transfers = Transfers(device, lanes=gpu.lane, spans=Spans("engine"))
    assert len(gpu.lanes) == 6
    staged = transfers.saves.next(16)
    staged.run("gather", 16, 1, lambda: None)
    assert sum(len(lane.steps) for lane in gpu.lanes) == 1
    transfers.close()
