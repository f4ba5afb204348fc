"""What a slot table and its owner do while nobody dies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slot_content import commit, fill, intact, no_overlap, record

from lmpipe.errors import ProtocolViolation, SegmentError
from lmpipe.handles import BLOCK_BYTES, SessionId, Slot
from lmpipe.lifecycle import ACTORS, TRANSITIONS, Actor, SlotEvent, SlotState
from lmpipe.native import Words
from lmpipe.shm.allocator import size_class
from lmpipe.shm.descriptor import GENERATION_MASK, HEADER_BYTES, SegmentKind
from lmpipe.shm.segment import Segment
from lmpipe.shm.slots import SlotOwner, SlotTable, default_slots

ME = SessionId(77)
KEY = b"0123456789abcdef"


@pytest.fixture
def owner(run_dir: Path) -> Iterator[SlotOwner]:
    made = SlotOwner.create(run_dir / "arena.shm", 64 * BLOCK_BYTES, 16)
    yield made
    made.close()


def lease(owner: SlotOwner, nbytes: int = BLOCK_BYTES) -> Slot:
    slot = owner.lease(nbytes, ME)
    assert slot is not None
    return slot


def test_the_number_of_slots_follows_from_the_capacity() -> None:
    assert [default_slots(n) for n in (0, 1 << 30, 1 << 40)] == [64, 4096, 262_144]


def test_another_process_sees_what_the_owner_does(owner: SlotOwner, run_dir: Path) -> None:
    other = SlotTable(Segment.attach(run_dir / "arena.shm", SegmentKind.SLOTS, id=owner.segment.id))
    slot = owner.lease(5000, ME, record(KEY, 16))
    assert slot == Slot(0, 1) and other.owner(0) == ME and other.state(0) == (1, SlotState.LEASED)
    assert other.record(0) == record(KEY, 16) and other.pending(0) == 0 and other.checksum(0) == bytes(16)
    assert other.capacity(0) == 8192 and other.offset(0) % BLOCK_BYTES == 0 and len(other.payload(0)) == 8192
    fill(other, slot, KEY, 4992)
    other.set_checksum(0, KEY)
    owner.set_pending(0, 3)
    assert owner.advance(slot, SlotEvent.COMMIT) and intact(other, 0) and owner.checksum(0) == KEY
    assert (owner.clear_pending(0, 2), owner.clear_pending(0, 2), owner.clear_pending(0, 1)) == (1, 1, 0)
    assert other.region.nbytes == other.segment.nbytes and other.slots == 16
    assert other.records([0, 0])["key"].tobytes() == KEY * 2
    other.close()
    other.close()


def test_a_record_is_a_copy(owner: SlotOwner) -> None:
    slot = owner.lease(16, ME, record(KEY, 16))
    assert slot is not None
    mine = owner.record(slot.index)
    mine["nbytes"] = 99
    assert owner.record(slot.index)["nbytes"] == 16


def test_a_new_life_shows_nothing_of_the_last(owner: SlotOwner) -> None:
    slot = commit(owner, KEY, 4096)
    assert slot is not None
    owner.set_pending(slot.index, 3)
    owner.set_checksum(slot.index, KEY)
    assert owner.advance(slot, SlotEvent.DOOM) and owner.free(slot)
    again = lease(owner)
    assert again == Slot(slot.index, slot.generation + 1)
    assert owner.record(again.index).tobytes() == bytes(72)
    assert owner.pending(again.index) == 0 and owner.checksum(again.index) == bytes(16)


def _bring(owner: SlotOwner, state: SlotState) -> Slot:
    """A slot in a state."""
    slot = lease(owner)
    if state is SlotState.FREE:
        assert owner.free(slot)
        return Slot(slot.index, slot.generation + 1)
    for event in (SlotEvent.OPEN, SlotEvent.CLOSE, SlotEvent.COMMIT, SlotEvent.DOOM)[: state - 1]:
        assert owner.advance(slot, event)
    assert owner.state(slot.index) == (slot.generation, state)
    return slot


@pytest.mark.parametrize("state", SlotState)
@pytest.mark.parametrize("event", [event for event in SlotEvent if event is not SlotEvent.LEASE])
def test_the_law_is_the_table(owner: SlotOwner, state: SlotState, event: SlotEvent) -> None:
    slot = _bring(owner, state)
    wanted = TRANSITIONS.get((state, event))
    assert owner.advance(Slot(slot.index, slot.generation + 1), event) is False
    assert owner.advance(Slot(slot.index, slot.generation - 1), event) is False
    assert owner.advance(slot, event) is (wanted is not None)
    generation = slot.generation + (event is SlotEvent.FREE and wanted is not None)
    assert owner.state(slot.index) == (generation, state if wanted is None else wanted)


@pytest.mark.parametrize("event", [event for event in SlotEvent if ACTORS[event] is Actor.OWNER])
def test_a_writer_cannot_fire_the_owners_events(owner: SlotOwner, event: SlotEvent) -> None:
    slot = lease(owner)
    table = SlotTable(owner.segment)
    with pytest.raises(ProtocolViolation, match="owner's"):
        table.advance(slot, event)


def test_a_lease_is_made_by_lease(owner: SlotOwner) -> None:
    with pytest.raises(ProtocolViolation, match="lease"):
        owner.advance(Slot(0, 1), SlotEvent.LEASE)
    with pytest.raises(ProtocolViolation, match="0 bytes"):
        owner.lease(0, ME)


def test_a_slot_is_freed_once(owner: SlotOwner) -> None:
    slot = lease(owner)
    assert owner.used_bytes == BLOCK_BYTES and owner.slots_free == 15
    assert owner.free(slot) and not owner.free(slot) and not owner.advance(slot, SlotEvent.OPEN)
    assert owner.used_bytes == 0 and owner.slots_free == 16


def test_a_strangers_index_is_no_slot(owner: SlotOwner) -> None:
    for index in (16, 1 << 31, -1):
        assert owner.state(index) == (0, SlotState.FREE)
        assert not owner.advance(Slot(index, 0), SlotEvent.OPEN) and not owner.free(Slot(index, 0))
        with pytest.raises(ProtocolViolation):
            owner.record(index)


def test_a_payload_stays_in_its_slot(owner: SlotOwner) -> None:
    slot = lease(owner)
    with pytest.raises(ProtocolViolation, match="has no 4097 bytes"):
        owner.payload(slot.index, 4097)
    with pytest.raises(ProtocolViolation):
        owner.payload(9)[0]


def test_full_is_an_answer(owner: SlotOwner) -> None:
    assert owner.lease(owner.capacity_bytes + 1, ME) is None
    slots = [lease(owner) for _ in range(16)]
    assert owner.lease(1, ME) is None and owner.free_bytes == 48 * BLOCK_BYTES  # no header left
    for slot in slots:
        owner.free(slot)
    whole = lease(owner, owner.capacity_bytes)
    assert (owner.free_bytes, owner.largest_free) == (0, 0) and owner.lease(1, ME) is None
    owner.free(whole)
    assert owner.largest_free == owner.capacity_bytes


def test_generations_wrap_and_skip_zero(owner: SlotOwner) -> None:
    words = Words(owner.segment.buf, HEADER_BYTES, 1)
    words.store(0, GENERATION_MASK << 8)
    slot = lease(owner)
    assert slot == Slot(0, GENERATION_MASK)
    assert owner.free(slot)
    assert lease(owner) == Slot(0, 1)


def test_a_slot_segment_is_wanted(run_dir: Path) -> None:
    with Segment.create(run_dir / "a", SegmentKind.PAGES, 8192) as pages, pytest.raises(SegmentError, match="SLOTS"):
        SlotTable(pages)
    for count in (0, 1000):
        with (
            Segment.create(run_dir / f"b{count}", SegmentKind.SLOTS, 8192, count=count) as short,
            pytest.raises(SegmentError, match=f"{count} slots do not fit"),
        ):
            SlotTable(short)


def test_payloads_outlive_close(run_dir: Path) -> None:
    owner = SlotOwner.create(run_dir / "a", 1 << 20)
    slot = lease(owner)
    view = owner.payload(slot.index)
    owner.close()
    view[:4] = b"late"
    assert bytes(view[:4]) == b"late"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.integers(1, 60_000), st.integers(0, 3)), max_size=40), wanted=st.integers(1, 200_000)
)
def test_leases_never_overlap_and_windows_make_room(run_dir: Path, steps: list[tuple[int, int]], wanted: int) -> None:
    (run_dir / "h.shm").unlink(missing_ok=True)
    owner = SlotOwner.create(run_dir / "h.shm", 64 * BLOCK_BYTES, 32)
    living: list[Slot] = []
    for nbytes, what in steps:
        if what == 3 and living:
            slot = living.pop(nbytes % len(living))
            owner.advance(slot, SlotEvent.DOOM)
            assert owner.free(slot)
        else:
            nbytes = nbytes // 16 * 16 + 16
            slot = commit(owner, KEY, nbytes) if what else owner.lease(nbytes, ME)
            if slot is not None:
                living.append(slot)
        assert owner.free_bytes + owner.used_bytes == owner.capacity_bytes
        assert owner.used_bytes == sum(owner.capacity(slot.index) for slot in living)
    assert no_overlap(owner, [slot.index for slot in living])
    assert all(intact(owner, s.index) for s in living if owner.state(s.index)[1] is SlotState.COMMITTED)
    _check_windows(owner, living, wanted)
    owner.close()


def _check_windows(owner: SlotOwner, living: list[Slot], wanted: int) -> None:
    size = size_class(wanted)
    in_order = sorted((slot.index for slot in living), key=owner.offset)
    committed = {index for index in in_order if owner.state(index)[1] is SlotState.COMMITTED}
    ends = [owner.payload_start, *(owner.offset(i) + owner.capacity(i) for i in in_order)]
    starts = [*(owner.offset(i) for i in in_order), owner.payload_start + owner.capacity_bytes]

    def room(first: int, count: int) -> int:
        return starts[first + count] - ends[first]

    # Brute force: runs of committed slots that suffice, and of which no shorter run does.
    enough = [
        in_order[first : first + count]
        for first in range(len(in_order))
        for count in range(1, len(in_order) - first + 1)
        if owner.largest_free < size <= room(first, count)
        and set(in_order[first : first + count]) <= committed
        and room(first, count - 1) < size
        and room(first + 1, count - 1) < size
    ]
    windows = owner.window(wanted)
    assert windows == enough
    assert owner.window(wanted, limit=1) == enough[:1]
    if windows:
        by_index = {slot.index: slot for slot in living}
        for index in windows[-1]:
            assert owner.advance(by_index[index], SlotEvent.DOOM) and owner.free(by_index[index])
        assert owner.lease(wanted, ME) is not None


def test_windows_are_spread_over_the_memory(owner: SlotOwner) -> None:
    slots = [commit(owner, KEY, 4 * BLOCK_BYTES) for _ in range(16)]
    assert None not in slots
    windows = owner.window(8 * BLOCK_BYTES, limit=4)
    assert len(windows) == 4 and all(b[0] - a[0] == 4 for a, b in pairwise(windows))
    assert owner.window(65 * BLOCK_BYTES) == []
    assert np.unique(np.concatenate(windows)).size == 8


@pytest.mark.parametrize("state", list(SlotState))
def test_only_a_lease_that_was_not_opened_is_taken_back(owner: SlotOwner, state: SlotState) -> None:
    slot = _bring(owner, state)
    free = owner.free_bytes
    assert owner.take_back(slot) is (state is SlotState.LEASED)
    assert (owner.free_bytes > free) is (state is SlotState.LEASED)
    assert owner.state(slot.index)[1] is (SlotState.FREE if state is SlotState.LEASED else state)
    assert not owner.take_back(slot) and not owner.take_back(Slot(99, 1))
    if state is SlotState.LEASED:
        assert not owner.advance(slot, SlotEvent.OPEN)
        assert lease(owner) == Slot(slot.index, slot.generation + 1)
