"""The models of the protocol: they hold, each of their steps is needed, and their law is the code's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import check_models as check
import pytest

from lmpipe.handles import BLOCK_BYTES, SessionId, Slot
from lmpipe.lifecycle import ACTORS, TRANSITIONS, SlotEvent, SlotState
from lmpipe.shm.slots import SlotOwner

LAW = (Path(__file__).parent / "law.pml").read_text()
EVENTS = {("FREE_IT" if event is SlotEvent.FREE else event.name): event for event in SlotEvent}
"""By their names in the model, where a state is called FREE already."""

needs_spin = pytest.mark.skipif(bool(check.missing()), reason=check.missing())


def modelled() -> dict[tuple[SlotState, SlotEvent], SlotState]:
    """The model's transitions."""
    lines = re.findall(r":: state == (\w+)\s+&& event == (\w+)\s+-> after = (\w+)", LAW)
    table = {(SlotState[before], EVENTS[event]): SlotState[after] for before, event, after in lines}
    assert len(table) == len(lines)
    return table


def test_the_models_law_is_the_codes() -> None:
    states = {
        SlotState[name]: int(number) for name, number in re.findall(r"#define ([A-Z]+)\s+(\d)$", LAW, re.MULTILINE)
    }
    assert states == {state: state.value for state in SlotState}
    assert modelled() == TRANSITIONS
    actors = re.findall(r":: event == (\w+)\s+-> assert\(actor == (\w+)\)", LAW)
    assert {EVENTS[event]: actor for event, actor in actors} == {event: who.name for event, who in ACTORS.items()}


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[SlotOwner]:
    tmp_path.chmod(0o700)
    made = SlotOwner.create(tmp_path / "arena.shm", 16 * BLOCK_BYTES, 64)
    yield made
    made.close()


@pytest.mark.parametrize("state", SlotState)
@pytest.mark.parametrize("event", [event for event in SlotEvent if event is not SlotEvent.LEASE])
def test_shared_memory_follows_the_models_law(owner: SlotOwner, state: SlotState, event: SlotEvent) -> None:
    """What the real state word does at each event in each state, in this life of the slot and in another."""
    slot = owner.lease(BLOCK_BYTES, SessionId(1))
    assert slot is not None
    for step in (SlotEvent.OPEN, SlotEvent.CLOSE, SlotEvent.COMMIT, SlotEvent.DOOM, SlotEvent.FREE):
        if owner.state(slot.index)[1] is not state:
            assert owner.advance(slot, step)
    life = Slot(slot.index, owner.state(slot.index)[0])
    assert not owner.advance(Slot(life.index, life.generation + 1), event)
    assert owner.state(slot.index) == (life.generation, state)
    after = modelled().get((state, event))
    assert owner.advance(life, event) is (after is not None)
    next_life = life.generation + (event is SlotEvent.FREE and after is not None)
    assert owner.state(slot.index) == (next_life, state if after is None else after)


@needs_spin
@pytest.mark.parametrize("whole", check.QUICK, ids=lambda whole: whole.model)
def test_the_protocol_holds(whole: check.Whole) -> None:
    found = check.check(whole.model, whole.size)
    assert not found.broken
    assert found.states > 100_000, "too few to have been all"


@needs_spin
@pytest.mark.parametrize(("model", "step"), [(model, step) for model, step, _ in check.STEPS])
def test_no_step_can_be_left_out(model: str, step: str) -> None:
    assert check.check_without(model, step).broken


def test_each_step_that_can_be_left_out_is() -> None:
    for model in ("slots", "grants", "law"):
        text = (Path(__file__).parent / f"{model}.pml").read_text()
        named = set(re.findall(r"#if(?:n)?def WITHOUT_(\w+)", text))
        assert named <= {step for _, step, _ in check.STEPS}
