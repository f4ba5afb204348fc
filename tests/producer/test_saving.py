"""Saves as an engine sees them: every chunk has an end, and pages are given back only when nobody reads them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rig import BIG, WAIT_S, Engine, assert_nothing_leaks, until

from lmpipe.engines.paged import PagedEngine
from lmpipe.handles import Slot
from lmpipe.testing import Node

Make = Callable[..., Engine]


class GatedCopies:
    """A producer's copies that wait in the middle until they are let go."""

    def __init__(self, engine: Engine) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self._copies = engine.producer._saver._copies
        engine.producer._saver._copies = self  # type: ignore[assignment]

    def save(self, *arguments: Any) -> None:
        self.inside.set()
        assert self.go.wait(WAIT_S)
        self._copies.save(*arguments)


def test_saved_means_found_by_every_producer(make_engine: Make, mapped: bool) -> None:
    one, other = make_engine(mapped=mapped), make_engine(mapped=not mapped)
    prompt = one.prompt(1, 20)
    ticket = one.save(prompt)
    assert (ticket.saved, ticket.known, ticket.dropped) == (20, 0, {})
    assert ticket.copied.is_set()
    assert other.load(other.prompt(1, 20)).chunks == 20


def test_what_is_known_is_not_saved_again(make_engine: Make, mapped: bool) -> None:
    engine = make_engine(mapped=mapped)
    prompt = engine.prompt(2, 6)
    assert engine.save(prompt).saved == 6
    again = engine.save(prompt)
    assert (again.saved, again.known) == (0, 6)
    prompt.extend(np.arange(4 * 16, dtype=np.uint32))
    more = engine.save(prompt)
    assert (more.saved, more.known) == (4, 6)
    assert engine.load(prompt).chunks == 10


def test_only_the_new_chunks_of_a_grown_prompt_need_pages(make_engine: Make, mapped: bool) -> None:
    engine = make_engine(mapped=mapped)
    prompt = engine.prompt(3, 5)
    assert engine.save(prompt).saved == 5
    for turn in range(4):
        first = len(prompt.keys)
        prompt.extend(np.full(24, turn, np.uint32))  # one chunk and a half: sometimes one more is whole, sometimes two
        ids = engine.prefill(prompt, first)
        ticket = engine.send(prompt, ids, first)
        assert ticket.wait(WAIT_S)
        assert ticket.saved == len(prompt.keys) - first > 0
    assert engine.load(prompt).chunks == len(prompt.keys) == 11


def test_tokens_without_a_whole_chunk_save_nothing(make_engine: Make) -> None:
    engine = make_engine()
    prompt = engine.producer.prompt([1, 2, 3])
    ticket = engine.send(prompt, np.empty((0, 4), np.int32))
    assert ticket.wait(0)
    assert ticket.copied.is_set()
    assert engine.found(prompt) == 0


@pytest.mark.parametrize("end", ["cancel", "close", "node"])
def test_pages_are_not_given_back_while_they_are_read(end: str, make_engine: Make, node: Node) -> None:
    """However a save ends: an engine that writes into its pages early would have rubbish kept under a good key."""
    engine, other = make_engine(), make_engine()
    prompt = engine.prompt(4, 3)
    gate = GatedCopies(engine)
    ids = engine.prefill(prompt)
    ticket = engine.send(prompt, ids)
    assert gate.inside.wait(WAIT_S)
    ending = threading.Thread(target=lambda: None)
    if end == "cancel":
        engine.producer.cancel(ticket)
    elif end == "close":
        ending = threading.Thread(target=engine.producer.close)
    else:
        gather = node.kill("gather")
        node.wait_restarted("gather", gather)
    ending.start()
    if end != "close":
        until(lambda: ticket.done, "the save is over")
    assert not ticket.copied.wait(0.1)
    gate.go.set()
    assert ticket.copied.wait(WAIT_S)
    engine.memory.memory[:, ids.ravel()] = 0xEE  # the engine's again
    ending.join(WAIT_S)
    assert ticket.done
    assert other.load(other.prompt(4, 3)).chunks in (0, 3)  # load checks every byte


def test_a_cancelled_save_says_so_and_the_next_one_works(make_engine: Make, mapped: bool) -> None:
    engine = make_engine(mapped=mapped, layout=BIG, pages=64)
    for seed in range(10, 20):
        prompt = engine.prompt(seed, 2)
        ids = engine.prefill(prompt)
        ticket = engine.send(prompt, ids)
        engine.producer.cancel(ticket)
        assert ticket.copied.wait(WAIT_S)
        assert ticket.done
        assert ticket.saved + ticket.known + sum(ticket.dropped.values()) == 2
        engine.memory.memory[:, ids.ravel()] = 0xEE
        engine.memory.free(ids)
        engine.load(prompt)
    assert engine.save(engine.prompt(20, 2)).wait(0)


def test_a_revoked_save_of_mapped_pages_keeps_nothing_of_what_came_after(make_engine: Make) -> None:
    engine = make_engine(mapped=True, layout=BIG, pages=64)
    dropped = 0
    for seed in range(30, 60):
        prompt = engine.prompt(seed, 4)
        ids = engine.prefill(prompt)
        ticket = engine.send(prompt, ids)
        time.sleep(seed % 10 * 0.0003)  # any moment will do: before the message, in the copy, after the commit
        ticket.revoke()
        engine.memory.memory[:, ids.ravel()] = 0xEE
        ticket.wait(WAIT_S)
        assert ticket.done
        dropped += ticket.dropped.get("revoked", 0)
        assert sum(ticket.dropped.values()) == ticket.dropped.get("revoked", 0)
        assert engine.load(prompt).chunks == ticket.saved
        engine.memory.free(ids)
    assert dropped


def test_a_caller_s_mistake_is_told_to_the_caller_and_breaks_nothing(make_engine: Make, mapped: bool) -> None:
    engine = make_engine(mapped=mapped)
    prompt = engine.prompt(70, 2)
    ids = engine.prefill(prompt)
    wrong: list[Any] = [ids[:, :2], ids.astype(np.int64), ids - 10_000, ids + 10_000, ids[:, 0]]
    for mistake in wrong:
        with pytest.raises(ValueError, match="page"):
            engine.send(prompt, mistake)
    with pytest.raises(ValueError, match="whole chunks"):
        engine.send(prompt, ids, first=1)
    with pytest.raises(ValueError, match="whole chunks"):
        engine.send(prompt, ids, first=-1)
    assert engine.save(prompt).wait(0)
    found = engine.producer.lookup(prompt)
    with pytest.raises(ValueError, match="page ids"):
        engine.producer.load(found, engine.memory.pool, ids + 10_000)
    assert found.holds is None
    assert engine.load(prompt).chunks == 2


def test_a_pool_of_another_layout_is_refused_before_it_is_copied(make_engine: Make) -> None:
    engine = make_engine()
    prompt = engine.prompt(71, 1)
    with PagedEngine(BIG, 8) as big, pytest.raises(ValueError, match="layout"):
        engine.producer.save(prompt, big.pool, np.zeros((1, 4), np.int32))
    with pytest.raises(ValueError, match="no pool"):
        engine.producer.save(prompt, None, np.zeros((1, 4), np.int32))


def test_a_lease_that_goes_back_is_not_taken_again(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """gather may say once more that it is lent, in a message that overtakes the one that gives it back."""
    engine = make_engine()
    leases, taken = engine.producer._leases, list[Slot]()
    take = leases.take
    monkeypatch.setattr(leases, "take", lambda *wanted: taken.extend(slots := take(*wanted)) or slots)
    monkeypatch.setattr(engine.producer._saver, "_copies", None)
    assert engine.save(engine.prompt(90, 2)).dropped == {"a bug in lmpipe": 2}
    gone = set(taken)
    leases.reset(taken)
    leases.give(taken)
    assert not gone & set(take(64, 0.0))


def test_a_bug_costs_the_save_it_hits_and_no_other(make_engine: Make, node: Node) -> None:
    """There is no supervisor for a thread of the engine's process: the save ends, its leases go back."""
    engine = make_engine()
    copies = engine.producer._saver._copies
    for seed in range(2):
        prompt = engine.prompt(seed, 8)
        engine.producer._saver._copies = None  # type: ignore[assignment]
        ticket = engine.save(prompt)
        assert ticket.dropped == {"a bug in lmpipe": 8}
        assert ticket.copied.is_set()
        engine.producer._saver._copies = copies
        again = engine.save(prompt)
        assert again.saved == 8, again.dropped
        assert engine.load(prompt).chunks == 8
    assert_nothing_leaks(node, leases=8)


def test_page_ids_may_change_after_the_call(make_engine: Make) -> None:
    engine = make_engine()
    gate = GatedCopies(engine)
    first, second = engine.prompt(72, 2), engine.prompt(73, 2)
    tickets = []
    for prompt in (first, second):
        ids = engine.prefill(prompt)
        tickets.append(engine.send(prompt, ids))
        ids[:] = 0
    gate.go.set()
    assert all(ticket.wait(WAIT_S) for ticket in tickets)
    assert [engine.load(prompt).chunks for prompt in (first, second)] == [2, 2]


def test_the_counters_of_a_producer_add_up(make_engine: Make, mapped: bool, node: Node) -> None:
    engine = make_engine(mapped=mapped)
    prompts = [engine.prompt(80 + i, 4) for i in range(6)]
    engine.save(prompts[0])
    engine.save(prompts[0])
    tickets = [engine.send(prompt, engine.prefill(prompt)) for prompt in prompts]
    engine.producer.cancel(tickets[-1])
    gather = node.kill("gather")
    node.wait_restarted("gather", gather)
    for ticket in tickets:
        ticket.wait(WAIT_S)
        assert ticket.done
    engine.producer.wait_ready(WAIT_S)
    engine.save(engine.prompt(90, 4))
    stats = engine.producer.stats()
    ends = [stats.get(name, 0) for name in ("saved_chunks", "known_chunks", "save_dropped_chunks")]
    assert sum(ends) == stats["save_chunks"] == 9 * 4


def test_no_ticket_is_left_without_an_end_when_the_producer_closes(make_engine: Make, mapped: bool) -> None:
    engine = make_engine(mapped=mapped)
    tickets = []
    for seed in range(100, 110):
        prompt = engine.prompt(seed, 4)
        tickets.append(engine.send(prompt, engine.prefill(prompt)))
    engine.producer.close()
    assert all(ticket.done for ticket in tickets)
    assert all(ticket.wait(0) for ticket in tickets), "what was queued was saved before the end"
    late = engine.send(engine.prompt(100, 4), np.zeros((4, 4), np.int32))
    assert late.done
    assert late.dropped == {"lmpipe absent": 4}


def test_a_chunk_is_valid_for_its_time_to_live_and_can_be_saved_again(make_engine: Make, mapped: bool) -> None:
    short, long = make_engine(mapped=mapped, ttl_s=1), make_engine(mapped=mapped)
    prompt = short.prompt(120, 2)
    assert short.save(prompt).wait(0)
    until(lambda: long.found(prompt) == 0, "the chunks expire")
    assert long.save(prompt).saved == 2
    assert long.load(prompt).chunks == 2
