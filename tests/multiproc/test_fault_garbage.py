"""Garbage on every socket of a running node: frames that are no message, and bytes that are not even ZeroMQ."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from rig import WAIT_S, Engine, all_tiers, counters, until, until_whole

from lmpipe import messages as m
from lmpipe.errors import MessageError
from lmpipe.handles import SessionId
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
