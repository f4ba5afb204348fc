"""Real sockets, real processes, bad frames, full queues, dead servers."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from lmpipe.bus import HWM, Channel, Client, Poller, Server, Wakeup
from lmpipe.errors import NodeError
from lmpipe.handles import CHUNK, SessionId
from lmpipe.messages import MAX_FRAME_BYTES, Cancel, Message, Ping, Pong, Refused, Save, Saved, Touch, encode
from lmpipe.socket_file import PATH_BYTES

ME, YOU = SessionId(1), SessionId(2)
Endpoints = dict[Channel, str]

ECHO = """
import sys
from lmpipe.bus import Poller, Server
from lmpipe.messages import Pong
server = Server({"load": sys.argv[1], "save": sys.argv[2]}, int(sys.argv[3]))
poller = Poller()
poller.register(server)
while True:
    for ready in poller.poll(None):
        found = server.recv(ready.channel)
        if found is not None:
            server.send(found[0], Pong(int(sys.argv[3]), found[1].sent_ns, "echo", [int(sys.argv[3])]))
"""


@pytest.fixture(params=["ipc", "tcp"])
def endpoints(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoints:
    return ipc(tmp_path) if request.param == "ipc" else {"load": "tcp://127.0.0.1:*", "save": "tcp://127.0.0.1:*"}


def ipc(directory: Path) -> Endpoints:
    return {"load": f"ipc://{directory}/s.load", "save": f"ipc://{directory}/s.save"}


@pytest.fixture
def closing() -> Iterator[Callable[[Server | Client], None]]:
    opened: list[Server | Client] = []
    yield opened.append
    for thing in opened:
        thing.close()


def until(condition: Callable[[], object], what: str = "") -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail(f"never came true: {what}")


class Pair:
    """A server and a client that have found each other."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.server = Server(endpoints, ME)
        self.client = Client(self.server.endpoints)
        self.poller = Poller()
        self.poller.register(self.server)
        for channel in ("load", "save"):
            until(lambda channel=channel: self.client.send(channel, Ping(YOU, 1)))
            self.get(channel)

    def get(self, channel: Channel) -> Message:
        found = None
        while found is None:
            found = self.server.recv(channel)
            if found is None:
                assert self.poller.poll(5000), "nothing came"
        self.peer = found[0]
        return found[1]

    def answer(self) -> Message:
        poller = Poller()
        poller.register(self.client)
        answer = self.client.recv()
        while answer is None:
            assert poller.poll(5000), "nothing came"
            answer = self.client.recv()
        return answer

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def pair(endpoints: Endpoints) -> Iterator[Pair]:
    made = Pair(endpoints)
    yield made
    made.close()


def chunks(count: int) -> np.ndarray:
    found = np.zeros(count, CHUNK)
    found["shards"] = 1
    found["position"] = np.arange(count)
    return found


def test_messages_go_and_answers_come(pair: Pair) -> None:
    save = Save(YOU, 7, "arena", chunks(16))
    assert pair.client.send("save", save)
    assert pair.get("save") == save
    assert pair.server.send(pair.peer, Saved(ME, 7, save.chunks))
    assert pair.answer() == Saved(ME, 7, save.chunks)
    assert pair.client.recv() is None and pair.server.recv("save") is None


def test_large_messages_go(pair: Pair) -> None:
    save = Save(YOU, 7, "pages", chunks(4096), np.arange(4096 * 64, dtype=np.int32).reshape(4096, 64), 1)
    assert pair.client.send("save", save)
    assert pair.get("save") == save


def test_loads_are_ready_before_saves(pair: Pair) -> None:
    wakeup = Wakeup()
    pair.poller.register(wakeup)
    for channel in ("save", "load"):
        assert pair.client.send(channel, Cancel(YOU, 1))
    wakeup.wake()
    until(lambda: len(pair.poller.poll(0)) == 3)
    assert [(ready.source, ready.channel) for ready in pair.poller.poll(0)] == [
        (wakeup, None),
        (pair.server, "load"),
        (pair.server, "save"),
    ]
    pair.poller.unregister(wakeup)
    wakeup.close()


def test_a_paused_channel_is_not_read_until_resumed(pair: Pair) -> None:
    pair.poller.pause(pair.server, "save", True)
    pair.poller.pause(pair.server, "save", True)
    assert pair.client.send("save", Touch(YOU, chunks(1)))
    assert pair.client.send("load", Cancel(YOU, 1))
    assert pair.get("load") == Cancel(YOU, 1)
    assert pair.poller.poll(50) == []
    pair.poller.pause(pair.server, "save", False)
    assert [ready.channel for ready in pair.poller.poll(5000)] == ["save"]
    pair.poller.pause(pair.server, "save", True)
    pair.poller.unregister(pair.server)


def test_bad_frames_are_refused_and_counted_and_hurt_nobody(pair: Pair) -> None:
    """One malformed message must not end the service for everybody."""
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.linger = 0
    raw.connect(pair.server.endpoints["save"])
    header, *rest = encode(Save(YOU, 7, "arena", chunks(2)))
    bad = [
        [b"\x80\x04K*."],
        [b""],
        [b"{}"],
        [header],
        [header, b"short", *rest],
        [b"x"] * 3000,
        [header, *rest, b"more"],
    ]
    for frames in bad:
        raw.send_multipart(frames)
    raw.send_multipart([header, *rest])
    assert isinstance(pair.get("save"), Save)
    assert pair.server.bad_frames == len(bad)
    raw.rcvtimeo = 5000
    client = Client(pair.server.endpoints)
    answers = [raw.recv_multipart() for _ in bad]
    client.close()
    assert [b'"Refused"' in frames[0] for frames in answers] == [True] * len(bad)
    assert b'"about":"Save","ref":7' in answers[3][0]
    assert pair.client.send("save", Cancel(YOU, 1)) and pair.get("save") == Cancel(YOU, 1)
    raw.close()
    context.term()


def test_many_bad_frames_do_not_hold_the_loop(pair: Pair) -> None:
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(pair.server.endpoints["load"])
    for _ in range(100):
        raw.send(b"junk")
    until(lambda: pair.server.recv("load") is None and pair.server.bad_frames == 100)
    raw.close(linger=0)
    context.term()


def test_bad_frames_from_a_server_are_counted_by_the_client(pair: Pair) -> None:
    pair.client.send("load", Ping(YOU, 1))
    pair.get("load")
    pair.server.sockets["load"].send_multipart([pair.peer.identity, b"junk"])
    pair.server.send(pair.peer, Refused(ME, "", 0, "end"))
    assert pair.answer() == Refused(ME, "", 0, "end")
    assert pair.client.bad_frames == 1


def test_a_frame_too_large_ends_the_connection_and_nothing_else(pair: Pair) -> None:
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    monitor = raw.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    raw.connect(pair.server.endpoints["save"])
    raw.send(b"x" * (MAX_FRAME_BYTES + 1))
    assert monitor.poll(5000)
    raw.disable_monitor()
    monitor.close()
    raw.close(linger=0)
    context.term()
    assert pair.client.send("save", Cancel(YOU, 1)) and pair.get("save") == Cancel(YOU, 1)
    assert pair.server.bad_frames == 0


def test_an_answer_to_a_peer_that_left_is_false(pair: Pair) -> None:
    pair.client.send("load", Ping(YOU, 1))
    pair.get("load")
    pair.client.close()
    until(lambda: not pair.server.send(pair.peer, Pong(ME, 1, "s", [ME])))


def test_a_peer_that_does_not_read_is_full_not_waited_for(pair: Pair) -> None:
    pair.client.send("load", Ping(YOU, 1))
    pair.get("load")
    sent = 0
    while pair.server.send(pair.peer, Touch(ME, chunks(200))):
        sent += 1
        assert sent < 100 * HWM
    assert sent >= HWM // 2


def test_a_server_that_does_not_read_is_full_not_waited_for(pair: Pair) -> None:
    sent = 0
    while pair.client.send("save", Touch(YOU, chunks(200))):
        sent += 1
        assert sent < 100 * HWM
    assert sent >= HWM // 2
    assert pair.client.send("load", Cancel(YOU, 1))  # the other channel has room
    assert pair.get("load") == Cancel(YOU, 1)


def test_nobody_there_is_false(tmp_path: Path, closing: Callable[[Server | Client], None]) -> None:
    client = Client(ipc(tmp_path))
    closing(client)
    assert not client.send("load", Ping(YOU, 1))
    assert client.recv() is None


def test_a_killed_server_is_found_again_by_the_same_client(
    tmp_path: Path, closing: Callable[[Server | Client], None]
) -> None:
    where = ipc(tmp_path)
    client = Client(where)
    closing(client)

    def pong_from(session: int) -> bool:
        client.send("load", Ping(YOU, session))
        time.sleep(0.005)
        return client.recv() == Pong(SessionId(session), session, "echo", [SessionId(session)])

    for session in (11, 12, 13):
        process = subprocess.Popen([sys.executable, "-c", ECHO, where["load"], where["save"], str(session)])
        until(lambda session=session: pong_from(session))
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not client.send("load", Ping(YOU, 1)))
        while client.recv() is not None:
            pass
        assert (tmp_path / "s.load").is_socket()  # left behind, and replaced by the next one
    for path in tmp_path.iterdir():
        path.unlink()


def test_socket_files_are_private_and_removed_at_close(tmp_path: Path) -> None:
    server = Server(ipc(tmp_path), ME)
    for name in ("s.load", "s.save"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    server.close()
    server.close()
    assert list(tmp_path.iterdir()) == []


def test_a_successors_file_is_not_removed(tmp_path: Path) -> None:
    first = Server(ipc(tmp_path), ME)
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(".moved" + path.suffix))
    second = Server(ipc(tmp_path), ME)
    first.close()
    assert (tmp_path / "s.load").is_socket() and (tmp_path / "s.save").is_socket()
    second.close()
    for path in tmp_path.iterdir():
        path.unlink()


def test_a_living_servers_socket_is_not_taken(tmp_path: Path) -> None:
    server = Server(ipc(tmp_path), ME)
    with pytest.raises(NodeError, match="another process is listening"):
        Server(ipc(tmp_path), YOU)
    client = Client(ipc(tmp_path))
    until(lambda: client.send("load", Ping(YOU, 1)))
    client.close()
    server.close()
    assert list(tmp_path.iterdir()) == []


def test_endpoints_that_cannot_be_bound(tmp_path: Path) -> None:
    (tmp_path / "s.load").write_text("precious")
    with pytest.raises(NodeError, match="no socket is in the way"):
        Server(ipc(tmp_path), ME)
    assert (tmp_path / "s.load").read_text() == "precious"
    deep = tmp_path / ("x" * PATH_BYTES)
    deep.mkdir()
    with pytest.raises(NodeError, match="shorter run_dir"):
        Server(ipc(deep), ME)
    with pytest.raises(NodeError, match="No such file"):
        Server(ipc(tmp_path / "absent"), ME)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NodeError, match="in use"):
            Server({"load": f"tcp://127.0.0.1:{port}", "save": "tcp://127.0.0.1:*"}, ME)


def test_wakeup_from_a_thread_ends_a_poll() -> None:
    wakeup, poller = Wakeup(), Poller()
    poller.register(wakeup)
    assert poller.poll(0) == []
    thread = threading.Thread(target=lambda: [wakeup.wake() for _ in range(3)])
    thread.start()
    assert [ready.source for ready in poller.poll(5000)] == [wakeup]
    thread.join()
    wakeup.clear()
    assert poller.poll(0) == []
    wakeup.clear()
    poller.unregister(wakeup)
    wakeup.close()


def test_a_forked_child_may_open_its_own_client(pair: Pair) -> None:
    child = os.fork()
    if not child:
        sent = False
        try:
            client = Client(pair.server.endpoints)
            for _ in range(1000):
                sent = client.send("load", Cancel(YOU, 5))
                if sent:
                    break
                time.sleep(0.005)
            time.sleep(0.1)  # linger is 0: let the I/O thread write
        finally:
            os._exit(0 if sent else 1)
    assert pair.get("load") == Cancel(YOU, 5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
