"""Holds against eviction, the bounded table, grants."""

from __future__ import annotations

import errno
import random
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from slot_content import commit

from lmpipe.errors import ProtocolViolation, SegmentError
from lmpipe.handles import BLOCK_BYTES, Slot
from lmpipe.lifecycle import SlotEvent, SlotState
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.hold import Holds, HoldScanner, HoldSet
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import Session, SessionDir
from lmpipe.shm.slots import SlotOwner

KEY = b"0123456789abcdef"
SLOTS = 12


@pytest.fixture
def owner(run_dir: Path) -> Iterator[SlotOwner]:
    made = SlotOwner.create(run_dir / "arena.shm", SLOTS * 2 * BLOCK_BYTES, SLOTS)
    yield made
    made.close()


@pytest.fixture
def session(run_dir: Path) -> Iterator[Session]:
    with Session.create(run_dir, entries=8, grants=2) as made:
        yield made


@pytest.fixture
def holds(session: Session) -> Iterator[Holds]:
    made = Holds(session)
    yield made
    made.close()


@pytest.fixture
def scanner(run_dir: Path) -> Iterator[HoldScanner]:
    made = HoldScanner(SessionDir(run_dir))
    yield made
    made.close()


def committed(owner: SlotOwner, count: int) -> list[Slot]:
    slots = [commit(owner, KEY, 4096) for _ in range(count)]
    return [slot for slot in slots if slot is not None]


def take(holds: Holds, owner: SlotOwner, slots: list[Slot], request: int = 5) -> HoldSet:
    indices = np.array([slot.index for slot in slots], np.uint32)
    return holds.take(owner, indices, np.array([slot.generation for slot in slots], np.uint32), request)


def test_the_evictor_sees_what_is_held(owner: SlotOwner, holds: Holds, scanner: HoldScanner) -> None:
    slots = committed(owner, 3)
    assert scanner.held() == frozenset()
    with take(holds, owner, slots) as held:
        assert len(held) == 3 and not held.lost
        assert scanner.held() == {slot.place for slot in slots}
    assert scanner.held() == frozenset()
    held.release()
    holds.release(held)


def test_holds_are_a_prefix(owner: SlotOwner, holds: Holds, scanner: HoldScanner) -> None:
    slots = committed(owner, 4)
    assert owner.advance(slots[2], SlotEvent.DOOM)
    held = take(holds, owner, slots)
    assert len(held) == 2 and scanner.held() == {slots[0].place, slots[1].place}
    stale = take(holds, owner, [Slot(slots[0].index, slots[0].generation + 1), slots[1]])
    assert len(stale) == 0 and not stale.lost
    stale.release()


def test_a_session_that_comes_later_is_seen(
    run_dir: Path, owner: SlotOwner, holds: Holds, scanner: HoldScanner
) -> None:
    slots = committed(owner, 2)
    take(holds, owner, slots[:1])
    scanner.refresh()
    with Session.create(run_dir, entries=4, grants=0) as late:
        other = Holds(late)
        take(other, owner, slots[1:])
        assert scanner.held() == {slot.place for slot in slots}
        assert scanner.granted(late.id, 0) == 0 and other.grant(1) is None
        other.close()
        assert scanner.held() == {slots[0].place}
    scanner.refresh()
    assert scanner.held() == {slots[0].place}


def test_a_full_table_loses_the_oldest(owner: SlotOwner, holds: Holds, scanner: HoldScanner) -> None:
    slots = committed(owner, 10)
    first, second = take(holds, owner, slots[:3]), take(holds, owner, slots[3:6])
    third = take(holds, owner, slots[6:9])
    assert (first.lost, second.lost, third.lost, holds.lost) == (True, False, False, 1)
    assert scanner.held() == {slot.place for slot in slots[3:9]}
    first.release()
    assert scanner.held() == {slot.place for slot in slots[3:9]}
    everything = take(holds, owner, slots)  # ten, and there are eight
    assert len(everything) == 8 and second.lost and third.lost and holds.lost == 3


def test_holds_end_with_their_request(owner: SlotOwner, holds: Holds, scanner: HoldScanner) -> None:
    slots = committed(owner, 3)
    for slot, request in zip(slots, (1, 2, 1), strict=True):
        take(holds, owner, [slot], request)
    assert holds.release_request(1) == 2 and scanner.held() == {slots[1].place}
    assert holds.release_request(1) == 0


def test_close_gives_everything_back(owner: SlotOwner, session: Session, scanner: HoldScanner) -> None:
    holds = Holds(session)
    held = take(holds, owner, committed(owner, 2))
    holds.close()
    assert held.lost and scanner.held() == frozenset()
    held.release()


def test_threads_share_a_table(owner: SlotOwner, holds: Holds, scanner: HoldScanner) -> None:
    slots = committed(owner, 6)
    done: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            with take(holds, owner, rng.sample(slots, 3)):
                pass
        done.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4 and scanner.held() == frozenset() and len(take(holds, owner, slots)) == 6


def test_grants(holds: Holds, session: Session, scanner: HoldScanner) -> None:
    first, second = holds.grant(71), holds.grant(72)
    assert first and second and holds.grant(73) is None
    assert scanner.granted(session.id, first.index) == 71 and scanner.granted(session.id, second.index) == 72
    first.revoke()
    assert scanner.granted(session.id, first.index) == 0 and holds.grant(73) is None
    first.release()
    third = holds.grant(73)
    assert third and third.index == first.index and third.save_id == 73
    first.release()
    first.revoke()  # it is another save's by now
    assert scanner.granted(session.id, third.index) == 73 and holds.grant(74) is None
    for index in (-1, 2, 1 << 40):
        assert scanner.granted(session.id, index) == 0
    with pytest.raises(ProtocolViolation, match="save 0"):
        holds.grant(0)


def test_a_grant_of_nobody_is_revoked(run_dir: Path, scanner: HoldScanner) -> None:
    session = Session.create(run_dir, entries=1, grants=1)
    holds, number = Holds(session), session.id
    assert holds.grant(9) and scanner.granted(number, 0) == 9
    holds.close()
    session.close()
    scanner.refresh()
    assert scanner.granted(number, 0) == 0


def test_a_hold_segment_that_is_too_short(run_dir: Path, scanner: HoldScanner) -> None:
    path = run_dir / "sessions" / f"{7:016x}.holds"
    with Segment.create(path, SegmentKind.HOLDS, 8192, count=10_000), pytest.raises(SegmentError, match="do not fit"):
        scanner.held()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_holds_that_cannot_be_looked_at_may_be_of_any_slot(
    owner: SlotOwner, holds: Holds, scanner: HoldScanner, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    slots = committed(owner, 2)
    take(holds, owner, slots[:1])

    def no_more(*_: object, **__: object) -> Segment:
        raise SegmentError("no descriptor") from OSError(number, "")

    with monkeypatch.context() as patched:
        patched.setattr(Segment, "attach", no_more)
        held = scanner.held()
        assert held and all(slot.place in held for slot in slots) and slots[1].place in held | {7}
        scanner.refresh()
    assert scanner.held() == {slots[0].place}


def test_without_descriptors_nothing_that_is_held_is_freed(
    run_dir: Path, owner: SlotOwner, holds: Holds, scanner: HoldScanner
) -> None:
    """A session that came last, and an evictor that cannot open its table, nor list the directory."""
    slots = committed(owner, 1)
    with take(holds, owner, slots):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            held = scanner.held()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert slots[0].place in held and Slot(9, 9).place in held
    assert scanner.held() == frozenset()


def test_eviction_against_readers(run_dir: Path, owner: SlotOwner, scanner: HoldScanner, spawn: Callable) -> None:
    """Slots change their content as fast as they can under two processes that hold, read and check them."""
    readers = [spawn("hold_reader.py", run_dir, seed, 1500) for seed in range(2)]
    rng, spared, evicted = random.Random(3), 0, 0
    doomed: list[Slot] = []
    living = [slot for _ in range(SLOTS) if (slot := commit(owner, rng.randbytes(16), 8192))]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        reader.stdin.write("go\n")
        reader.stdin.flush()
    while any(reader.poll() is None for reader in readers):
        if living:
            victim = living.pop(rng.randrange(len(living)))
            assert owner.advance(victim, SlotEvent.DOOM)
            doomed.append(victim)
        held = scanner.held()
        spared += sum(slot.place in held for slot in doomed)
        for slot in [slot for slot in doomed if slot.place not in held]:
            doomed.remove(slot)
            assert owner.free(slot)
            evicted += 1
        while slot := commit(owner, rng.randbytes(16), 8192):
            living.append(slot)
    assert [reader.stdout.read() for reader in readers] == ["0 1500\n"] * 2
    assert spared > 0 and evicted > SLOTS


def test_holds_die_with_their_process(run_dir: Path, owner: SlotOwner, scanner: HoldScanner, spawn: Callable) -> None:
    slots = committed(owner, 2)
    child = spawn("holder.py", run_dir, slots[0].index, slots[0].generation)
    assert child.stdout.readline() == "1\n"
    assert owner.advance(slots[0], SlotEvent.DOOM) and scanner.held() == {slots[0].place}
    child.kill()
    child.wait()
    scanner.refresh()
    assert len(list((run_dir / "sessions").iterdir())) == 2  # nobody has swept yet
    assert scanner.held() == frozenset() and owner.free(slots[0])
    assert owner.state(slots[0].index)[1] is SlotState.FREE
