"""Fault 1 of a peer: one malformed message kills the server for everybody, and its health check says all is well."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from rig import DRAM_ONLY, LAYOUT, WAIT_S, Engine, counters, until

from lmpipe import messages as m
from lmpipe.handles import CHUNK, SessionId, Tier
from lmpipe.shm.session import Session
from lmpipe.testing import Node


class Stranger:
    """A raw socket on gather, with a session that lives, so that what it sends is judged by its content alone."""

    def __init__(self, node: Node, context: zmq.Context[Any], channel: str) -> None:
        self.session = Session.create(node.run_dir, entries=64, grants=64)
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(node.info.endpoints["gather"][channel])

    def send(self, frames: list[bytes]) -> None:
        self.socket.send_multipart(frames)

    def hear(self) -> m.Message:
        assert self.socket.poll(WAIT_S * 1000), "no answer"
        return m.decode(self.socket.recv_multipart())

    def still_answered(self) -> m.Message:
        """Pings until the Pong of this ping comes; whatever else came before it is dropped."""
        self.send([bytes(f) for f in m.encode(m.Ping(self.session.id, 7))])
        while not isinstance(answer := self.hear(), m.Pong):
            pass
        return answer

    def close(self) -> None:
        self.socket.close()
        self.session.close()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(DRAM_ONLY) as node:
        yield node


@pytest.fixture(params=["load", "save"])
def stranger(node: Node, request: pytest.FixtureRequest) -> Iterator[Stranger]:
    context: zmq.Context[Any] = zmq.Context()
    stranger = Stranger(node, context, request.param)
    yield stranger
    stranger.close()
    context.term()


def serves(node: Node, seed: int) -> None:
    """An engine that comes now saves, finds and loads; gather is the one that was started, and says so."""
    with Engine(node.run_dir) as engine:
        prompt = engine.prompt(seed, 4)
        assert engine.save(prompt).wait(0)
        assert engine.load(prompt).chunks == 4
    assert [(p.state, p.restarts) for p in node.status().processes] == [("ready", 0)]


def frames(message: m.Message) -> list[bytes]:
    return [bytes(frame) for frame in m.encode(message)]


def hello(session: SessionId, **changes: Any) -> m.Register:
    layout = asdict(LAYOUT)
    return replace(m.Register(session, [1], "producer", "stranger", 1, layout, 16, 0, 1, "ab" * 32, 8, None), **changes)


def some_chunks(count: int = 3) -> np.ndarray[Any, Any]:
    chunks = np.zeros(count, CHUNK)
    chunks["shards"] = 1
    chunks["raw_bytes"] = chunks["nbytes"] = 8192
    chunks["place"] = np.arange(count, dtype=np.uint64) << np.uint64(32) | np.uint64(1)
    return chunks


def test_fault_01_a_message_that_is_none_is_refused_and_counted(node: Node, stranger: Stranger) -> None:
    save = frames(m.Save(stranger.session.id, 3, "arena", some_chunks()))
    bad: list[list[bytes]] = [
        [b""],
        [b"\0"],
        [b"{}"],
        [b"null", b""],
        [b"[" * 100_000],
        [pickle.dumps({"type": "Save"})],
        [save[0]],
        [*save, b"one frame too many"],
        [save[0], save[1][:-1], *save[2:]],
        [save[0].replace(b'"v":2', b'"v":3'), *save[1:]],
        [save[0].replace(b'"Save"', b'"Format"'), *save[1:]],
        [save[0].replace(b'"save_id":3', b'"save_id":-3'), *save[1:]],
        [b"x"] * 300,
        [b"{" + b" " * (2 << 20) + b"}"],
    ]
    before = counters(node).get("gather_bad_frames", 0)
    for wrong in bad:
        stranger.send(wrong)
        assert isinstance(stranger.hear(), m.Refused)
    until(lambda: counters(node)["gather_bad_frames"] >= before + len(bad), "each is counted")
    serves(node, 1)


def test_fault_01_random_damage_never_ends_gather(node: Node, stranger: Stranger) -> None:
    draw = random.Random(node.info.arena_id)
    samples = [
        frames(m.Save(stranger.session.id, 3, "arena", some_chunks())),
        frames(m.Load(stranger.session.id, 3, some_chunks())),
        frames(hello(stranger.session.id)),
        frames(m.Pin(stranger.session.id, 3, True, some_chunks(), 1.0)),
    ]
    for _ in range(300):
        damaged = [bytearray(frame) for frame in draw.choice(samples)]
        for _ in range(draw.randint(1, 4)):
            frame = draw.choice(damaged)
            if frame:
                frame[draw.randrange(len(frame))] = draw.randrange(256)
        stranger.send([bytes(frame) for frame in damaged])
    stranger.still_answered()
    serves(node, 2)


def test_fault_01_a_message_of_good_form_and_absurd_content_hurts_nobody(node: Node, stranger: Stranger) -> None:
    me, chunks = stranger.session.id, some_chunks()
    words = np.zeros(LAYOUT.plane_count, np.uint64)
    pages = m.PageSource("/etc/passwd", "00" * 16, words, words, words, 1)
    absurd: list[m.Message] = [
        hello(me, chunk_tokens=0),
        hello(me, chunk_tokens=2**31 - 1),
        hello(me, layout=None),
        hello(me, pages=pages),
        hello(SessionId(12345)),
        hello(me),
        m.Registered(me, 1, 16, 8192, np.zeros(0, np.uint64)),
        m.Save(me, 1, "arena", chunks),
        m.Save(me, 2, "ring.compress", chunks),
        m.Save(me, 3, "pages", chunks, np.zeros((3, 4), np.int32), 2),
        m.Persisted(me, Tier.DRAM, chunks),
        m.Persisted(me, Tier.SSD, chunks),
        m.SaveDropped(me, 0, Tier.DRAM, "", chunks),
        m.Loaded(me, 4, "arena", chunks),
        m.LoadFailed(me, 4, "", chunks),
        m.Load(me, 5, chunks, "ring.persist", 1),
        m.Prefetch(me, chunks),
        m.Cancel(me, 99),
        m.Touch(me, chunks),
        m.Pin(me, 6, True, chunks, 1e9),
        m.Invalidate(me, 7, 2**64 - 1, [Tier.REMOTE, Tier.SSD]),
        m.Invalidated(me, 8, 1),
        m.Release(me, "arena", np.array([2**64 - 1, 0], np.uint64)),
        m.Credit(me, np.array([2**64 - 1], np.uint64)),
        m.Evicted(me, Tier.DRAM, chunks),
        m.Pong(me, 1, "persist", [me]),
        m.Drained(me, 1),
    ]
    for message in absurd:
        stranger.send(frames(message))
        stranger.still_answered()
    serves(node, 3)


def test_fault_01_whoever_is_served_meanwhile_notices_nothing(node: Node, stranger: Stranger) -> None:
    with Engine(node.run_dir) as engine:
        prompt = engine.prompt(4, 8)
        for turn in range(50):
            stranger.send([b"\xff" * 64] * (turn % 3 + 1))
            assert engine.save(prompt).wait(0)
            assert engine.load(prompt).chunks == 8
    assert isinstance(stranger.hear(), m.Refused)


def test_fault_01_pages_of_a_wrong_shape_never_become_a_hit(node: Node, stranger: Stranger, tmp_path: Path) -> None:
    """Fewer pages than a chunk has, or a record of another size: the rest of the slot was never written."""
    tmp_path.chmod(0o700)
    with Engine(node.run_dir, pages_in=tmp_path, pages=64) as engine:
        attachment = engine.producer._link.attachment
        assert attachment is not None
        prompt = engine.prompt(5, 2)
        ids = engine.prefill(prompt)
        records = engine.producer._records(prompt)
        short, other = records.copy(), records.copy()
        other["nbytes"] = other["raw_bytes"] = 4096
        for save_id, (chunks, pages) in enumerate([(short, ids[:, :1]), (other, ids), (records, ids + 10_000)], 1):
            grant = attachment.holds.grant(save_id)
            assert grant is not None
            stranger.send(frames(m.Save(attachment.session.id, save_id, "pages", chunks, pages.copy(), grant.index)))
            stranger.still_answered()
            answers = [stranger.hear()] if stranger.socket.poll(200) else []
            assert not any(isinstance(answer, m.Saved) for answer in answers)
            grant.release()
        assert engine.found(prompt) == 0
    serves(node, 6)
