"""Holds: what is taken is in the table, what is not committed is not taken, and nobody reads what is overwritten."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmpipe import native

COMMITTED = 2
STRIDE_BYTES = 128


class Arena:
    """Slot headers, committed in generation slot + 5, and a table of holds."""

    def __init__(self, slots: int, entries: int) -> None:
        self.memory = mmap.mmap(-1, slots * STRIDE_BYTES + 64)
        self.states = native.Words(self.memory, 64, slots * STRIDE_BYTES // 8)
        for slot in range(slots):
            self.set(slot, slot + 5, COMMITTED)
        self.headers = native.Headers(self.memory, 64, STRIDE_BYTES, slots)
        self.entries = np.zeros((entries + 1, 2), np.uint64)
        self.table = native.HoldTable(self.entries, 16, entries)

    def set(self, slot: int, generation: int, state: int) -> None:
        self.states.store(slot * STRIDE_BYTES // 8, generation << 8 | state)

    def take(self, slots: list[int], generations: list[int] | None = None, request: int = 77) -> list[int]:
        generations = [slot + 5 for slot in slots] if generations is None else generations
        return self.table.take(
            self.headers, np.array(slots, np.uint32), np.array(generations, np.uint32), COMMITTED, request
        ).tolist()

    def held(self) -> list[tuple[int, int, int]]:
        """(slot, generation, request) of what a scan finds."""
        rows = self.entries[1:].tolist()
        return sorted((w >> 32, w & 0xFFFFFFFF, request) for w, request in rows if w)


def test_take_publishes_and_release_clears() -> None:
    arena = Arena(10, 4)
    entries = arena.take([7, 3])
    assert arena.held() == [(3, 8, 77), (7, 12, 77)] and arena.table.free == 2
    assert arena.entries[1 + entries[0], 0] == 7 << 32 | 12
    arena.table.release(np.array(entries, np.uint32))
    assert arena.held() == [] and arena.table.free == 4


def test_take_stops_at_the_first_slot_that_changed() -> None:
    arena = Arena(300, 300)
    arena.set(150, 155, COMMITTED + 1)
    assert len(arena.take(list(range(300)))) == 150
    assert [slot for slot, _, _ in arena.held()] == list(range(150))
    arena.set(1, 7, COMMITTED)
    assert len(arena.take([0, 1, 2])) == 1
    assert arena.table.free == 149


def test_take_stops_when_the_table_is_full() -> None:
    arena = Arena(200, 100)
    assert len(arena.take(list(range(200)))) == 100
    assert arena.take([0]) == [] and arena.table.free == 0


def test_only_the_low_half_of_a_generation_counts() -> None:
    arena = Arena(2, 2)
    arena.set(0, (3 << 32) + 9, COMMITTED)
    assert len(arena.take([0], [9])) == 1
    arena.set(1, 1 << 32, COMMITTED)
    assert arena.take([1], [0]) == []  # 0 is no generation, and slot 0's entry would read as free


def test_nothing_to_take() -> None:
    arena = Arena(2, 2)
    assert arena.take([]) == []
    arena.table.release(np.zeros(0, np.uint32))


def test_a_bad_release_releases_nothing() -> None:
    arena = Arena(8, 8)
    entries = arena.take([0, 1, 2])
    spare = next(e for e in range(8) if e not in entries)
    for bad in ([*entries, spare], [*entries, 8], [entries[0], entries[1], entries[0]]):
        with pytest.raises(ValueError, match=rf"entries\[{len(bad) - 1}\]"):
            arena.table.release(np.array(bad, np.uint32))
        assert len(arena.held()) == 3 and arena.table.free == 5
    arena.table.release(np.array(entries, np.uint32))
    assert arena.table.free == 8


def test_entries_in_use_stay_in_use() -> None:
    arena = Arena(4, 4)
    entries = arena.take([2])
    again = native.HoldTable(arena.entries, 16, 4)
    assert again.free == 3
    again.release(np.array(entries, np.uint32))
    assert arena.held() == []


def test_bad_arguments() -> None:
    arena = Arena(4, 4)
    with pytest.raises(ValueError, match=r"slots\[1\]"):
        arena.take([0, 4])
    with pytest.raises(ValueError, match="generations"):
        arena.take([0, 1], [5])
    with pytest.raises(TypeError, match="uint32"):
        arena.table.take(arena.headers, np.array([0]), np.array([5], np.uint32), COMMITTED, 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="committed_state"):
        arena.table.take(arena.headers, np.zeros(1, np.uint32), np.ones(1, np.uint32), 256, 1)
    with pytest.raises(ValueError, match="stride_bytes"):
        native.Headers(bytearray(64), 0, 12, 4)
    with pytest.raises(ValueError, match=r"count|offset_bytes"):
        native.Headers(bytearray(64), 8, 8, 8)
    with pytest.raises(ValueError, match=r"entries|offset_bytes"):
        native.HoldTable(bytearray(64), 0, 5)
    with pytest.raises(ValueError, match="read-only"):
        native.HoldTable(bytes(64), 0, 4)
    assert arena.held() == []


def test_no_torn_read_between_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    path.touch()
    script = [sys.executable, Path(__file__).with_name("holds_torture.py")]
    subprocess.run([*script, "prepare", path, "0"], check=True, timeout=60)
    evictor = subprocess.Popen([*script, "evictor", path, "20000"], stdout=subprocess.PIPE)
    try:
        done = subprocess.run([*script, "reader", path, "20000"], stdout=subprocess.PIPE, check=True, timeout=60)
        evictions, _ = evictor.communicate(timeout=60)
    finally:
        evictor.kill()
        evictor.wait()
    reader, writer = json.loads(done.stdout), json.loads(evictions)
    assert reader["torn"] == 0 and reader["held"] == 20_000
    assert writer["evicted"] > 0
