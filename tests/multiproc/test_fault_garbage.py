"""Garbage on every socket of a running node: frames that are no message, messages that make no sense, and bytes that
are not even ZeroMQ.
"""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from rig import WAIT_S, Engine, all_tiers, counters, until, until_whole

from lmpipe import messages as m
from lmpipe.errors import MessageError
from lmpipe.handles import CHUNK, Codec, SessionId, Tier
from lmpipe.testing import Node

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

from targets import Frames, inputs

STAGES = ("gather", "compress", "persist", "replicate")
CHANNELS = ("load", "save")
EVERY_SOCKET = pytest.mark.parametrize(("stage", "channel"), [(s, c) for s in STAGES for c in CHANNELS])
FRAMES = 400


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(all_tiers(tmp_path_factory.mktemp("remote"))) as node:
        until_whole(node)
        yield node


def serves(node: Node, seed: int) -> None:
    """An engine that comes now saves and loads, and no process of the node has died."""
    with Engine(node.run_dir, tenant=f"garbage-{seed}") as engine:
        until_whole(node, engine)
        prompt = engine.prompt(seed, 4)
        assert engine.save(prompt).wait(0)
        assert engine.load(prompt).chunks == 4
        until(lambda: engine.producer.stats().get("persisted_chunks", 0) >= 8, "both tiers below take them")
    assert [(p.state, p.restarts) for p in node.status().processes] == [("ready", 0)] * len(STAGES)


def no_messages(seed: int) -> Iterator[list[bytes]]:
    """Damaged frames that are no message any more: one that still is, is an order, and orders are obeyed."""
    target = Frames(Path("unused"))
    draw = random.Random(seed)
    for _, frames in inputs(target, seed, 0, FRAMES):
        try:
            m.decode(frames)
        except MessageError:
            yield frames or [b""]
        else:
            yield [draw.randbytes(draw.randrange(200)) for _ in range(draw.randrange(1, 12))]


@EVERY_SOCKET
def test_frames_that_are_no_message_are_refused_on_every_socket(node: Node, stage: str, channel: str) -> None:
    seed = STAGES.index(stage) * 2 + CHANNELS.index(channel)
    context: zmq.Context[Any] = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.linger = 0
    stranger.connect(node.info.endpoints[stage][channel])
    before = counters(node, stage).get(f"{stage}_bad_frames", 0)
    sent = refused = 0
    try:
        for frames in no_messages(seed):
            stranger.send_multipart(frames)
            sent += 1
            while stranger.poll(0):
                refused += isinstance(m.decode(stranger.recv_multipart()), m.Refused)
        stranger.send_multipart([bytes(frame) for frame in m.encode(m.Ping(SessionId(1), 1))])
        while True:
            assert stranger.poll(1000 * WAIT_S), "the stage answers no more"
            answer = m.decode(stranger.recv_multipart())
            if isinstance(answer, m.Pong):
                break
            assert isinstance(answer, m.Refused) and answer.reason
            refused += 1
    finally:
        stranger.close()
        context.term()
    assert refused == sent == FRAMES
    until(lambda: counters(node, stage)[f"{stage}_bad_frames"] >= before + sent, "each is counted")


def absurd(me: SessionId) -> Iterator[m.Message]:
    """Messages of good form about chunks and slots that do not exist, from a session that does not either."""
    plain = np.zeros(3, CHUNK)
    plain["shards"], plain["place"] = 1, np.arange(3, dtype=np.uint64) << np.uint64(32) | np.uint64(1)
    plain["raw_bytes"] = plain["nbytes"] = 8192
    encoded, huge, empty = plain.copy(), plain.copy(), plain.copy()
    encoded["codec"] = Codec.ZSTD
    huge["place"], huge["nbytes"], huge["raw_bytes"] = 2**64 - 1, 2**32 - 1, 2**32 - 1
    empty["nbytes"] = empty["raw_bytes"] = 0
    for chunks in (plain, encoded, huge, empty):
        for segment in ("arena", "ring.compress", "ring.persist", "nonsense"):
            yield m.Save(me, 1, segment, chunks)
            yield m.Load(me, 2, chunks, segment, 0)
            yield m.Loaded(me, 3, segment, chunks)
        yield from (m.Load(me, 4, chunks, "arena", deadline_ns) for deadline_ns in (1, 2**62))
        yield from (m.Prefetch(me, chunks), m.LoadFailed(me, 5, "", chunks), m.Touch(me, chunks))
        yield from (m.Persisted(me, Tier.SSD, chunks), m.Evicted(me, Tier.SSD, chunks), m.Saved(me, 0, chunks))
        yield from (m.SaveDropped(me, 0, Tier.SSD, "", chunks), m.Pin(me, 6, True, chunks, 1e9))
    places = np.array([2**64 - 1, 0], np.uint64)
    yield from (m.Release(me, segment, places) for segment in ("arena", "ring.compress", "ring.persist"))
    yield from (m.Cancel(me, 99), m.Invalidated(me, 8, 1), m.Credit(me, places), m.Drained(me, 1))
    yield from (m.Pong(me, 1, "persist", [me]), m.Invalidate(me, 7, 12345, [Tier.REMOTE, Tier.SSD]))


@EVERY_SOCKET
def test_absurd_messages_of_good_form_end_no_stage(node: Node, stage: str, channel: str) -> None:
    context: zmq.Context[Any] = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.linger = 0
    stranger.connect(node.info.endpoints[stage][channel])
    me = SessionId(5)
    try:
        for message in absurd(me):
            for each in (message, m.Ping(me, 1)):
                stranger.send_multipart([bytes(frame) for frame in m.encode(each)])
            answer: m.Message | None = None
            while not isinstance(answer, m.Pong):
                assert stranger.poll(1000 * WAIT_S), f"no answer after {message}"
                answer = m.decode(stranger.recv_multipart())
    finally:
        stranger.close()
        context.term()
    serves(node, 200 + 10 * STAGES.index(stage) + CHANNELS.index(channel))


def test_bytes_that_are_no_zeromq_end_nothing(node: Node) -> None:
    """Greetings that are none, cut short, or followed by a frame of 2^63 bytes; some stay connected meanwhile."""
    draw = random.Random(7)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    openings = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff", greeting[:11], greeting, draw.randbytes(4096), b"\0" * 100_000]
    openings += [
        greeting + b"\x04\x26\x05READY",
        greeting + b"\x02" + b"\xff" * 8 + b"x" * 100,
        greeting + b"\x07" * 90,
    ]
    open_ones: list[socket.socket] = []
    try:
        for stage in STAGES:
            for channel in CHANNELS:
                path = node.info.endpoints[stage][channel].removeprefix("ipc://")
                for at, opening in enumerate(openings):
                    peer = socket.socket(socket.AF_UNIX)
                    peer.settimeout(WAIT_S)
                    open_ones.append(peer)
                    peer.connect(path)
                    try:
                        peer.sendall(opening)
                    except (BrokenPipeError, ConnectionResetError):
                        continue  # it has seen enough
                    if at % 2:
                        open_ones.pop().close()
        serves(node, 100)
    finally:
        for peer in open_ones:
            peer.close()


def test_after_all_that_the_node_serves(node: Node) -> None:
    serves(node, 101)
