"""Three cases in which memory could be written or read by who has no right to it any more. Each process is stopped at
the worst of moments, by a failpoint, and goes on when everybody else has gone on long ago. With mapped pages, on CPU;
CUDA IPC has the same protocol.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from rig import (
    CHUNK_TOKENS,
    WAIT_S,
    Engine,
    PageIds,
    all_tiers,
    assert_nothing_leaks,
    counters,
    slot_states,
    until,
    until_whole,
)

from lmpipe import messages as m
from lmpipe.failpoints import Control
from lmpipe.handles import Slot, Tier
from lmpipe.keys import Prompt
from lmpipe.lifecycle import SlotState
from lmpipe.producer import SaveTicket
from lmpipe.testing import Node

CHUNKS = 8
LEASES = 8


@pytest.fixture(scope="module")
def shared(control: Control, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Who is stopped here is not taken for hung."""
    changes = all_tiers(tmp_path_factory.mktemp("remote"), codec="raw") | {"watchdog_ms": 120_000}
    with Node(changes) as node:
        yield node


@pytest.fixture
def node(shared: Node, control: Control) -> Iterator[Node]:
    until_whole(shared)
    yield shared
    control.clear()
    assert_nothing_leaks(shared, LEASES)


@pytest.fixture
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(node.run_dir, tenant=request.node.name, pages_in=node.directory) as engine:
        until_whole(node, engine)
        yield engine


def stopped_at(control: Control, name: str) -> int:
    """Wait until a process stands still at a failpoint; its pid."""
    until(control.fired, f"{name} is reached")
    ((_, _, pid),) = control.fired()
    until(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text(), "it is stopped")
    return pid


def reused_at(engine: Engine, control: Control, moment: str) -> tuple[Prompt, PageIds, SaveTicket]:
    """A save whose grant is revoked, and whose pages somebody else gets, while gather stands at a failpoint."""
    prompt = engine.prompt(1, CHUNKS)
    ids = engine.prefill(prompt)
    control.arm(f"{moment}=stop*1")
    ticket = engine.send(prompt, ids)
    pid = stopped_at(control, moment)
    ticket.revoke()
    engine.memory.memory[:, ids.ravel()] = 0xEE
    os.kill(pid, signal.SIGCONT)
    return prompt, ids, ticket


@pytest.mark.parametrize("moment", ["gather.save.leased", "gather.save.copied"])
def test_pages_that_are_reused_while_gather_stands_still_are_never_committed(
    node: Node, engine: Engine, control: Control, moment: str
) -> None:
    """Before the copy and after it: the grant is read last."""
    dropped = counters(node)["gather_dropped_chunks"]
    prompt, ids, ticket = reused_at(engine, control, moment)
    assert ticket.wait(WAIT_S) is False
    assert ticket.dropped == {"revoked": CHUNKS}
    assert engine.found(prompt) == 0
    assert counters(node)["gather_dropped_chunks"] == dropped + CHUNKS
    engine.memory.fill(prompt.keys, ids)
    assert engine.send(prompt, ids).wait(WAIT_S), "the same chunks are saved with the pages of now"
    assert engine.load(prompt).chunks == CHUNKS
    engine.memory.free(ids)


@pytest.mark.parametrize("moment", ["gather.save.granted", "gather.save.closed"])
def test_what_was_copied_while_the_grant_stood_is_right_whatever_the_pages_are_by_now(
    node: Node, engine: Engine, control: Control, moment: str
) -> None:
    prompt, ids, ticket = reused_at(engine, control, moment)
    assert ticket.wait(WAIT_S)
    assert engine.load(prompt).chunks == CHUNKS  # every byte is that of the keys
    engine.memory.free(ids)


@pytest.mark.parametrize(
    "moment", ["landing.opened", "ssd.read.verified", "gather.load.landed", "gather.load.committed"]
)
def test_a_load_that_comes_after_its_deadline_leaves_the_pages_alone(
    node: Node, engine: Engine, control: Control, moment: str
) -> None:
    """The engine has given the pages to another request by then; the chunks are there for the next load."""
    prompt = engine.prompt(1, CHUNKS)
    assert engine.save(prompt).wait(0)
    assert engine.producer.flush(prompt, tiers=("ssd",))
    engine.drop_from(prompt, Tier.DRAM)
    control.arm(f"{moment}=stop*1")
    found = engine.producer.lookup(prompt)
    assert found.chunks == CHUNKS
    ids = engine.memory.allocate(CHUNKS, CHUNK_TOKENS)
    result = engine.producer.load(found, engine.memory.pool, ids, deadline_ms=200)
    pid = stopped_at(control, moment)
    assert result.chunks < CHUNKS and "deadline" in result.reason
    mine = ids[result.chunks :]
    engine.memory.memory[:, mine.ravel()] = 0x77
    os.kill(pid, signal.SIGCONT)
    until(lambda: _in_dram(engine, prompt), "what came late is there for the next one")
    assert (engine.memory.memory[:, mine.ravel()] == 0x77).all()
    assert engine.load(prompt).chunks == CHUNKS
    engine.memory.free(ids)


def _in_dram(engine: Engine, prompt: object) -> int:
    with engine.producer.lookup(prompt) as found:  # type: ignore[arg-type]
        return found.by_tier.get(Tier.DRAM, 0)


def test_a_late_answer_is_not_the_next_load_s(node: Node, engine: Engine, control: Control) -> None:
    first, second = engine.prompt(1, CHUNKS), engine.prompt(2, CHUNKS)
    for prompt in (first, second):
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd",))
        engine.drop_from(prompt, Tier.DRAM)
    control.arm("gather.up.Loaded=late:0.5*2")
    assert engine.load(first, deadline_ms=200).chunks < CHUNKS
    control.arm("persist.down.Load=sleep:0.01", "landing.opened=sleep:0.1")
    assert engine.load(second).chunks == CHUNKS
    assert engine.load(first).by_tier == {Tier.DRAM: CHUNKS}


def test_what_a_session_said_is_not_taken_for_its_successor_s(node: Node, control: Control) -> None:
    """The same engine by name, in its next life: the words of the former one, delivered now, move none of its slots."""
    control.clear()
    with Engine(node.run_dir, tenant="former", pages_in=None) as engine:
        until_whole(node, engine)
        former = _session(engine)
        kept = engine.prompt(1, CHUNKS)
        assert engine.save(kept).wait(0)
        records = engine.producer._records(kept)
    with Engine(node.run_dir, tenant="former") as engine, Engine(node.run_dir, pages_in=node.directory) as mapped:
        until_whole(node, engine, mapped)
        assert _session(engine) != former
        before = slot_states(node)
        leased = np.array([slot.place for slot in list(engine.producer._leases._free)], np.uint64)
        assert len(leased)
        stale = records.copy()
        stale["place"][: len(leased)] = leased[: len(stale)]
        ids = np.zeros((len(records), mapped.producer.chunk_pages), np.int32)
        words: list[m.Message] = [
            m.Save(former, 1, "arena", stale),
            m.Save(former, 2, "pages", records, ids, 0),
            m.Release(former, "arena", leased),
            m.Cancel(former, 1),
            m.Loaded(former, 3, "arena", stale),
            m.Persisted(former, Tier.SSD, stale),
        ]
        answers = _say(node, words)
        assert not any(isinstance(answer, m.Saved | m.Loaded) for answer in answers)
        assert slot_states(node)[SlotState.LEASED] == before[SlotState.LEASED]
        for place in leased.tolist():
            assert engine.producer._link.attachment is not None
            state = engine.producer._link.attachment.arena.state(Slot.from_place(place).index)
            assert state == (Slot.from_place(place).generation, SlotState.LEASED)
        fresh = engine.prompt(2, CHUNKS)
        assert engine.save(fresh).wait(0)
        assert engine.load(fresh).chunks == engine.load(kept).chunks == CHUNKS


def _session(engine: Engine) -> int:
    attachment = engine.producer._link.attachment
    assert attachment is not None
    return attachment.session.id


def _say(node: Node, words: list[m.Message]) -> list[m.Message]:
    """Say it to gather, on a socket of its own; everything that it answers until it has answered a last ping."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    answers: list[m.Message] = []
    try:
        for channel in ("load", "save"):
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            socket.connect(node.info.endpoints["gather"][channel])
            for message in [*words, m.Ping(words[0].session, 7)]:
                socket.send_multipart([bytes(frame) for frame in m.encode(message)])
            while not answers or not isinstance(answers[-1], m.Pong):
                assert socket.poll(WAIT_S * 1000)
                answers.append(m.decode(socket.recv_multipart()))
            answers.append(m.Refused(words[0].session, "", 0, ""))  # not a Pong: the next channel has its own
            socket.close()
    finally:
        context.term()
    return answers


def test_a_stage_that_answers_the_former_gather_leaves_nothing_with_the_next(
    node: Node, engine: Engine, control: Control
) -> None:
    """The slots of a load belong to the stage that fills them, which goes on though gather, who lent them, is dead."""
    prompts = [engine.prompt(seed, CHUNKS) for seed in (1, 2)]
    for prompt in prompts:
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd",))
        engine.drop_from(prompt, Tier.DRAM)
    control.arm("landing.opened=sleep:0.4")
    assert engine.producer.prefetch(prompts[0]) == CHUNKS
    until(lambda: slot_states(node)[SlotState.WRITING], "a slot is being written")
    pid = node.kill("gather")
    node.wait_restarted("gather", pid)
    control.clear()
    until_whole(node, engine)
    assert_nothing_leaks(node, LEASES)
    started_s = time.monotonic()
    for prompt in prompts:
        until(lambda p=prompt: engine.load(p).chunks == CHUNKS, "it is loaded from where it lies")
    assert time.monotonic() - started_s < WAIT_S
