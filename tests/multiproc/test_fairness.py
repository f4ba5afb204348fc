"""Floods: loads come before saves, nobody starves, every queue has its bound, and what does not fit is counted."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import CALM, WAIT_S, Engine, assert_nothing_leaks, counters, until, until_whole

from lmpipe import messages as m
from lmpipe.handles import Tier
from lmpipe.keys import Prompt
from lmpipe.producer import LoadResult, SaveTicket
from lmpipe.producer.link import OUTBOX_MESSAGES
from lmpipe.producer.saving import QUEUED_SAVES
from lmpipe.testing import Node

MIB = 1 << 20
FLOOD = 300
GROWTH_BYTES = 32 * MIB
"""That a process may have for itself in a flood; what flows through it meanwhile is several times that."""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    tiers = {"dram": {"capacity": "8MiB", "slots": 1024}, "ssd": {"capacity": "1GiB"}}
    with Node({"tiers": tiers, "rings": {"persist": "8MiB"}, **CALM, "heartbeat_ms": 1000}) as node:
        yield node


def only_on_ssd(engine: Engine, prompt: Prompt) -> None:
    """Save a prompt, and let DRAM forget it."""
    assert engine.save(prompt).wait(0)
    producer = engine.producer
    assert producer.flush(prompt, timeout_s=WAIT_S, tiers=[Tier.SSD])
    ref = next(producer._ids)
    forget = m.Invalidate(producer._session(), ref, 0, [Tier.DRAM], producer._records(prompt))
    assert isinstance(producer._link.ask(ref, forget, WAIT_S), m.Invalidated)


def private_bytes(node: Node, process: str) -> int:
    """Memory that is this process's alone."""
    status = Path(f"/proc/{node.pid(process)}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


def all_answered(tickets: list[SaveTicket]) -> None:
    """Every chunk has an end, and what was dropped a reason."""
    until(lambda: all(ticket.done for ticket in tickets), "every save ends")
    assert all(ticket.open_chunks() == 0 and "" not in ticket.dropped for ticket in tickets)


def test_a_load_comes_before_the_saves_that_were_there_first(node: Node) -> None:
    with (
        Engine(node.run_dir, tenant="greedy", pages_in=node.directory, pages=4096) as greedy,
        Engine(node.run_dir, tenant="modest") as modest,
    ):
        until_whole(node, greedy, modest)
        wanted = modest.prompt(1, 4)
        only_on_ssd(modest, wanted)
        pages = greedy.prefill(greedy.prompt(0, 16))
        results: list[LoadResult] = []
        loading = threading.Thread(target=lambda: results.append(modest.load(wanted)))
        os.kill(node.pid("gather"), signal.SIGSTOP)
        try:
            tickets: list[SaveTicket] = []
            for seed in range(60):
                prompt = greedy.prompt(seed, 16)
                greedy.memory.fill(prompt.keys, pages)
                tickets.append(greedy.send(prompt, pages))
            until(greedy.producer._saver._jobs.empty)
            loading.start()
            until(lambda: modest.producer._link._answers and not modest.producer._link._outbox, "it has asked")
        finally:
            os.kill(node.pid("gather"), signal.SIGCONT)
        loading.join(WAIT_S)
        waiting = sum(not ticket.done for ticket in tickets)
        assert [(result.chunks, result.by_tier) for result in results] == [(4, {Tier.SSD: 4})]
        assert waiting > len(tickets) // 4, "it came last and did not wait for all that came before"
        for ticket in tickets:
            ticket.revoke()
        all_answered(tickets)
    assert_nothing_leaks(node, 0)


@pytest.mark.parametrize("greedy_pages", ["private", "mapped"])
@pytest.mark.parametrize("modest_pages", ["private", "mapped"])
def test_who_wants_little_gets_it_beside_a_flood(node: Node, greedy_pages: str, modest_pages: str) -> None:
    """One saves new prompts without a pause; the other saves and loads its few, and none of it is dropped."""
    where = {"private": None, "mapped": node.directory}
    pair = f"{greedy_pages}-{modest_pages}"
    with (
        Engine(node.run_dir, tenant=f"greedy-{pair}", pages_in=where[greedy_pages], pages=1024) as greedy,
        Engine(node.run_dir, tenant=f"modest-{pair}", pages_in=where[modest_pages]) as modest,
    ):
        until_whole(node, greedy, modest)
        ids = greedy.prefill(greedy.prompt(0, 16))
        over = threading.Event()
        tickets: list[SaveTicket] = []

        def flood() -> None:
            while not over.is_set():
                open_ones = [ticket for ticket in tickets[-QUEUED_SAVES:] if not ticket.done]
                if len(open_ones) < QUEUED_SAVES // 2:
                    tickets.append(greedy.send(greedy.prompt(len(tickets) + 1000, 16), ids))
                else:
                    open_ones[0].wait(WAIT_S)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            for seed in range(8):
                prompt = modest.prompt(seed, 8)
                ticket = modest.save(prompt)
                assert (ticket.saved, ticket.dropped) == (8, {})
                until(lambda p=prompt: modest.save(p).done and modest.load(p).chunks == 8, "before it is evicted again")
        finally:
            over.set()
            flooding.join(WAIT_S)
        all_answered(tickets)
        assert sum(ticket.saved for ticket in tickets) > 0
    assert_nothing_leaks(node, 0)


def test_a_flood_over_a_tier_that_stands_still_takes_no_more_memory(node: Node) -> None:
    """Everything is saved, DRAM keeps the latest, and neither gather nor the engine keeps what it cannot get rid of."""
    with Engine(node.run_dir, tenant="flood", pages=1024) as engine:
        until_whole(node, engine)
        ids = engine.prefill(engine.prompt(0, 16))
        tickets = [engine.send(engine.prompt(seed, 16), ids) for seed in range(10)]
        all_answered(tickets)
        before = private_bytes(node, "gather")
        os.kill(node.pid("persist"), signal.SIGSTOP)
        try:
            for seed in range(10, FLOOD):
                ticket = engine.send(engine.prompt(seed, 16), ids)
                ticket.wait(WAIT_S)
                tickets.append(ticket)
            grown = private_bytes(node, "gather") - before
        finally:
            os.kill(node.pid("persist"), signal.SIGCONT)
        all_answered(tickets)
        assert sum(ticket.saved for ticket in tickets) > 16 * FLOOD // 2
        assert grown < GROWTH_BYTES < 16 * FLOOD * engine.producer.chunk_bytes
        found = counters(node)
        assert found["gather_evicted_chunks"] and found["gather_dram_used_bytes"] <= found["gather_dram_capacity_bytes"]
        last = engine.prompt(FLOOD - 1, 16)
        assert engine.producer.flush(last, timeout_s=WAIT_S, tiers=[Tier.SSD]), "what is still there goes on down"
    assert_nothing_leaks(node, 0)


def test_an_engine_that_floods_a_gather_that_stands_still_keeps_its_bounds(node: Node) -> None:
    with Engine(node.run_dir, tenant="unheard", pages=1024) as engine:
        until_whole(node, engine)
        ids = engine.prefill(engine.prompt(0, 4))
        producer = engine.producer
        tickets: list[SaveTicket] = []
        os.kill(node.pid("gather"), signal.SIGSTOP)
        try:
            for seed in range(10 * QUEUED_SAVES):
                tickets.append(engine.send(engine.prompt(seed, 4), ids))
                producer.touch(engine.prompt(seed, 4))
                assert producer._saver._jobs.qsize() <= QUEUED_SAVES
                assert len(producer._link._outbox) <= OUTBOX_MESSAGES
                assert sum(not ticket.done for ticket in tickets) <= 2 * QUEUED_SAVES + 8
            reasons = Counter[str]()
            for ticket in tickets:
                reasons.update(ticket.dropped)
            assert reasons["save queue full"] > 0, "and the engine is told so at once"
        finally:
            os.kill(node.pid("gather"), signal.SIGCONT)
        all_answered(tickets)
        dropped = sum(sum(ticket.dropped.values()) for ticket in tickets)
        assert producer.stats()["save_dropped_chunks"] == dropped
        until_whole(node, engine)
        prompt = engine.prompt(10_000, 4)
        until(lambda: engine.save(prompt).wait(0), "it saves again")
        assert engine.load(prompt).chunks == 4
    assert_nothing_leaks(node, 0)


def test_a_load_whose_time_is_over_fails_and_nothing_is_evicted_for_it(node: Node) -> None:
    with Engine(node.run_dir, tenant="late") as engine:
        until_whole(node, engine)
        prompt = engine.prompt(1, 4)
        only_on_ssd(engine, prompt)
        before = counters(node, "persist").get("persist_read_chunks", 0)
        producer = engine.producer
        ref = next(producer._ids)
        answers = producer._link.request(
            ref, "load", m.Load(producer._session(), ref, producer._records(prompt), "arena", 1)
        )
        answer = answers.get(timeout=WAIT_S)
        producer._link.forget(ref)
        assert isinstance(answer, m.LoadFailed) and answer.reason == "deadline" and len(answer.chunks) == 4
        assert counters(node, "persist").get("persist_read_chunks", 0) == before
        assert engine.load(prompt).chunks == 4
    assert_nothing_leaks(node, 0)
