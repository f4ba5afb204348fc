"""The slot law: what holds for every path through the table."""

from __future__ import annotations

from lmpipe.lifecycle import ACTORS, LEASED_STATES, TRANSITIONS, Actor, SlotEvent, SlotState


def test_a_slot_is_visible_only_after_it_was_written_whole() -> None:
    into_committed = {(state, event) for (state, event), after in TRANSITIONS.items() if after is SlotState.COMMITTED}
    assert into_committed == {(SlotState.READY, SlotEvent.COMMIT)}
    assert {state for (state, _), after in TRANSITIONS.items() if after is SlotState.READY} == {SlotState.WRITING}


def test_a_committed_slot_is_doomed_before_it_is_free() -> None:
    assert (SlotState.COMMITTED, SlotEvent.FREE) not in TRANSITIONS
    assert (SlotState.COMMITTED, SlotEvent.OPEN) not in TRANSITIONS


def test_every_state_leads_back_to_free_and_every_event_has_an_actor() -> None:
    for state in SlotState:
        seen, reach = set(), {state}
        while reach - seen:
            seen |= reach
            reach = {after for (before, _), after in TRANSITIONS.items() if before in seen} | seen
        assert SlotState.FREE in reach
    assert ACTORS.keys() == set(SlotEvent)
    assert {event for event, actor in ACTORS.items() if actor is Actor.WRITER} == {SlotEvent.OPEN, SlotEvent.CLOSE}


def test_only_the_owner_takes_a_lease_back() -> None:
    for state in LEASED_STATES:
        assert (state, SlotEvent.FREE) in TRANSITIONS
    assert ACTORS[SlotEvent.FREE] is Actor.OWNER
