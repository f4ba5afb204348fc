"""Death of the owner at any instruction, and headers that nobody could have written."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from slot_content import commit, fill, intact, no_overlap, record

from lmpipe.errors import ProtocolViolation
from lmpipe.handles import BLOCK_BYTES, SessionId, Slot
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.native import Words
from lmpipe.shm import slots
from lmpipe.shm.descriptor import HEADER_BYTES, S_OWNER, SLOT_HEADER, SLOT_HEADER_BYTES, SegmentKind
from lmpipe.shm.segment import Segment
from lmpipe.shm.slots import SlotOwner, SlotTable

ALIVE, DEAD = SessionId(11), SessionId(22)
KEY = b"0123456789abcdef"


def reopened(path: Path) -> SlotOwner:
    return SlotOwner(Segment.attach(path, SegmentKind.SLOTS))


def test_what_a_restart_finds(run_dir: Path) -> None:
    path = run_dir / "arena.shm"
    with Segment.create(path, SegmentKind.SLOTS, 4096 * 65, count=16) as segment:
        old = SlotOwner(segment)
        assert commit(old, KEY, 32) == Slot(0, 1)
        for owner in (ALIVE, DEAD):
            leased, writing, ready = (old.lease(5000, owner) for _ in range(3))
            assert leased and writing and ready
            fill(old, writing, KEY, 16, close=False)
            fill(old, ready, KEY, 16)
        kept, gone = commit(old, KEY, 16), commit(old, KEY, 16)
        assert kept and gone
        assert old.advance(kept, SlotEvent.DOOM) and old.advance(gone, SlotEvent.DOOM)
        asked: list[SessionId] = []

        def alive(session: SessionId) -> bool:
            asked.append(session)
            return session == ALIVE

        new = reopened(path)
        with pytest.raises(ProtocolViolation, match="recover"):
            new.lease(1, ALIVE)
        old.set_pending(0, 1)
        found = new.recover(alive, {kept.place}, pending=3)
        assert [new.pending(index) for index in found.committed] == [1, 3, 3]
        assert found.committed == [0, 3, 6] and found.leased == {ALIVE: [1, 2]} and found.doomed == [7]
        assert (found.freed, found.damaged) == (3, 0) and sorted(asked) == [ALIVE, DEAD]
        assert new.used_bytes == sum(new.capacity(i) for i in (0, 1, 2, 3, 6, 7)) and new.slots_free == 10
        assert new.state(4) == (2, SlotState.FREE) and not new.advance(Slot(4, 1), SlotEvent.OPEN)
        again = new.recover(alive, {kept.place})
        assert (again.committed, again.leased, again.freed) == (found.committed, found.leased, 0)
        assert new.lease(BLOCK_BYTES, ALIVE) == Slot(4, 2)
        assert new.free(kept)  # the hold is gone
        del old
        new.close()


LEASED = slots._LEASED


class Died(BaseException):
    pass


class MortalWords:
    """A slot table's words; the n-th store kills the process before it is done."""

    def __init__(self, words: Words, stores_left: int) -> None:
        self._words, self._left = words, stores_left

    def _spend(self) -> None:
        if self._left == 0:
            raise Died
        self._left -= 1

    def store(self, i: int, value: int) -> None:
        self._spend()
        self._words.store(i, value)

    def cas(self, i: int, expected: int, desired: int) -> bool:
        self._spend()
        return self._words.cas(i, expected, desired)

    def load(self, i: int) -> int:
        return self._words.load(i)

    def snapshot(self) -> np.ndarray:
        return self._words.snapshot()


class MortalStruct:
    """What a lease writes before the state word; dying in it leaves a part of it."""

    def __init__(self, words: MortalWords) -> None:
        self._words = words

    def pack_into(self, buffer: memoryview, at: int, *fields: object) -> None:
        whole = LEASED.pack(*fields)
        for part in range(0, len(whole), 48):
            self._words._spend()
            piece = whole[part : part + 48]
            buffer[at + part : at + part + len(piece)] = piece


def a_life(owner: SlotOwner, sizes: list[int]) -> None:
    """Leases, commits and frees in which ranges change hands and sizes."""
    first = [commit(owner, KEY, nbytes, DEAD) for nbytes in sizes]
    for slot in first[::2]:
        assert slot and owner.advance(slot, SlotEvent.DOOM) and owner.free(slot)
    for nbytes in sizes:
        commit(owner, KEY[::-1], nbytes + 4096, DEAD)
    unused = owner.lease(16, DEAD)
    assert unused and owner.free(unused)


def test_death_at_every_store(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner dies before its n-th store, for every n, and some of its heirs while they recover."""
    path, sizes = run_dir / "arena.shm", [16, 8192, 4112, 20_000]
    deaths = 0
    while True:
        owner = SlotOwner.create(path, 32 * BLOCK_BYTES, 16)
        mortal = MortalWords(owner._words, deaths)
        owner._words = mortal  # type: ignore[assignment]
        monkeypatch.setattr(slots, "_LEASED", MortalStruct(mortal))
        try:
            a_life(owner, sizes)
            survived = True
        except Died:
            survived = False
        for patience in (0, 1, 2, 100):
            heir = reopened(path)
            heir._words = MortalWords(heir._words, patience)  # type: ignore[assignment]
            try:
                found = heir.recover(lambda _: False)
            except Died:
                assert patience < 100
                continue
            assert not found.damaged and not found.leased and not found.doomed
            assert no_overlap(heir, found.committed) and all(intact(heir, i) for i in found.committed)
            assert heir.used_bytes == sum(heir.capacity(i) for i in found.committed)
            heir.close()
        owner.close()
        owner.segment.unlink()
        if survived:
            break
        deaths += 1
    assert deaths > 60


def test_a_half_written_lease_is_no_slot(run_dir: Path) -> None:
    """Of a FREE slot the header is not believed, whatever it holds."""
    owner = SlotOwner.create(run_dir / "arena.shm", 16 * BLOCK_BYTES, 8)
    slot = commit(owner, KEY, 8192)
    for index in range(1, 8):
        at = HEADER_BYTES + index * SLOT_HEADER_BYTES
        garbage = random.Random(index).randbytes(SLOT_HEADER_BYTES - S_OWNER)
        owner.segment.buf[at + S_OWNER : at + SLOT_HEADER_BYTES] = garbage
    found = owner.recover(lambda _: True)
    assert slot and found.committed == [slot.index] and not found.damaged and owner.used_bytes == 8192
    owner.close()


def _spoil(field: str, value: int) -> Callable[[np.ndarray], None]:
    def spoil(headers: np.ndarray) -> None:
        headers[field][1] = value

    return spoil


def _overlap(headers: np.ndarray) -> None:
    headers["capacity"][1] = 3 * BLOCK_BYTES


def _too_long(headers: np.ndarray) -> None:
    headers["record"]["nbytes"][1] = 4097


def _empty(headers: np.ndarray) -> None:
    headers["record"]["nbytes"][1] = 0


@pytest.mark.parametrize(
    ("spoil", "lost"),
    [
        (_spoil("word", 1 << 8 | 99), {1}),
        (_spoil("word", 4), {1}),
        (_spoil("word", 1 << 63 | 4), {1}),
        (_spoil("offset", 12_345), {1}),
        (_spoil("offset", 0), {1}),
        (_spoil("offset", 1 << 62), {1}),
        (_spoil("offset", (1 << 64) - 4096), {1}),
        (_spoil("capacity", 0), {1}),
        (_spoil("capacity", 5000), {1}),
        (_spoil("capacity", (1 << 64) - 4096), {1}),
        (_overlap, {1, 2, 3}),
        (_too_long, {1}),
        (_empty, {1}),
    ],
)
def test_a_header_that_makes_no_sense_is_given_up(
    run_dir: Path, spoil: Callable[[np.ndarray], None], lost: set[int]
) -> None:
    path = run_dir / "arena.shm"
    old = SlotOwner.create(path, 16 * BLOCK_BYTES, 8)
    for _ in range(5):
        commit(old, KEY, 4096)
    spoil(np.frombuffer(old.segment.buf, SLOT_HEADER, 8, HEADER_BYTES))
    new = reopened(path)
    found = new.recover(lambda _: True)
    assert found.damaged == len(lost) and set(found.committed) == set(range(5)) - lost
    assert all(new.state(index)[1] is SlotState.FREE and new.state(index)[0] > 0 for index in lost)
    assert new.used_bytes == (5 - len(lost)) * BLOCK_BYTES
    while slot := new.lease(4096, ALIVE):
        fill(new, slot, KEY[::-1], 4096)
    assert all(intact(new, index) for index in found.committed)
    old.close()
    new.close()


def test_a_state_that_does_not_exist_is_a_violation(run_dir: Path) -> None:
    owner = SlotOwner.create(run_dir / "arena.shm", 16 * BLOCK_BYTES, 8)
    Words(owner.segment.buf, HEADER_BYTES, 1).store(0, 1 << 8 | 99)
    with pytest.raises(ProtocolViolation, match="state 99"):
        owner.state(0)
    assert not owner.advance(Slot(0, 1), SlotEvent.DOOM)
    with pytest.raises(ProtocolViolation):
        owner.lease(1, ALIVE)
    owner.close()


def test_a_lease_of_the_living_survives_its_owners_restart(run_dir: Path) -> None:
    path = run_dir / "arena.shm"
    old = SlotOwner.create(path, 16 * BLOCK_BYTES, 8)
    writer = SlotTable(Segment.attach(path, SegmentKind.SLOTS))
    slot = old.lease(4096, ALIVE)
    assert slot and writer.advance(slot, SlotEvent.OPEN)
    new = reopened(path)
    assert new.recover(lambda session: session == ALIVE).leased == {ALIVE: [slot.index]}
    writer.payload(slot.index, 4096)[:] = KEY * 256
    writer.set_record(slot.index, record(KEY, 4096))
    assert writer.advance(slot, SlotEvent.CLOSE) and new.advance(slot, SlotEvent.COMMIT) and intact(new, slot.index)
    for table in (old, writer, new):
        table.close()


def test_sigkill_at_random_moments(run_dir: Path, spawn: Callable) -> None:
    """Each child recovers what the one before it left when it was killed, and checks every byte."""
    SlotOwner.create(run_dir / "arena.shm", 256 * BLOCK_BYTES, 128).close()
    rng = random.Random(5)
    most = 0
    for turn in range(12):
        child = spawn("crash_loop.py", run_dir, turn)
        word, committed, _ = child.stdout.readline().split() or ("died", "0", "0")
        assert word == "ready"
        most = max(most, int(committed))
        time.sleep(rng.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert most > 10
