"""Sockets: messages between processes, in bounded queues, without a blocking send. The only importer of zmq.

A server binds two ROUTERs, a client connects a DEALER to each: channel "load" for what somebody waits for (loads,
cancels, pings), channel "save" for the rest. What the socket options buy:

    ROUTER_MANDATORY   a reply to a peer that is gone or full is an answer (False); without it, it vanishes silently
    IMMEDIATE          a client queues only for a server that is there: False means "nobody", and nothing is sent late
    SNDHWM, RCVHWM     1024 messages at most on either side of each connection
    MAXMSGSIZE         a frame larger than any message may have ends the connection, before memory is taken for it
    LINGER 0           closing never waits

A peer that reconnects has another identity: an answer to its former life is not delivered. Messages reach a peer once
or not at all. Knows no stage, and of messages only that they can be encoded, decoded and refused.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import zmq

from lmpipe.errors import MessageError, NodeError
from lmpipe.handles import SessionId
from lmpipe.messages import MAX_FRAME_BYTES, Message, decode, encode, refusal
from lmpipe.socket_file import SocketFile
from lmpipe.wire import MAX_FRAMES, Frame

Channel = Literal["load", "save"]
CHANNELS: tuple[Channel, ...] = ("load", "save")
Endpoints = Mapping[Channel, str]

HWM = 1024
RECONNECT_MS, RECONNECT_MAX_MS = 25, 100
CONNECT_TIMEOUT_MS = 2000
BAD_FRAMES_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Peer:
    """Who sent a message, and where the answer goes."""

    channel: Channel
    identity: bytes


class _Contexts:
    """One zmq context, thus one I/O thread, for a process that has sockets open; never one that came through a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._users = 0
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    def open(self, kind: zmq.SocketType) -> zmq.Socket[bytes]:
        """A socket with the options that all of ours have."""
        with self._lock:
            if self._context is None or self._pid != os.getpid():
                self._context, self._pid, self._users = zmq.Context(), os.getpid(), 0
            self._users += 1
            socket = self._context.socket(kind)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, HWM)
        socket.set(zmq.RCVHWM, HWM)
        socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.set(zmq.TCP_KEEPALIVE, 1)
        socket.set(zmq.TCP_KEEPALIVE_IDLE, 10)
        socket.set(zmq.TCP_KEEPALIVE_INTVL, 5)
        socket.set(zmq.TCP_KEEPALIVE_CNT, 3)
        return socket

    def close(self, socket: zmq.Socket[bytes]) -> None:
        """Closes a socket of ours, and with the last one the context."""
        if socket.closed:
            return
        socket.close()
        with self._lock:
            if self._pid != os.getpid() or self._context is None:
                return
            self._users -= 1
            if not self._users:
                self._context.term()
                self._context = None


_contexts = _Contexts()


_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)  # as numbers: or-ing enums takes a microsecond


def _send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> bool:
    last, sent = len(frames) - 1, True
    for at, frame in enumerate(frames):
        try:
            socket.send(frame, _LAST if at == last else _MORE)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            if at == 0:
                return False
            sent = False  # the connection broke inside the message; libzmq swallows what is left of it, so give it that
    return sent


def _recv(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    try:
        frames = [socket.recv(_LAST)]
    except zmq.Again:
        return None
    while socket.getsockopt(zmq.RCVMORE):
        frame = socket.recv()
        if len(frames) < MAX_FRAMES + 2:  # the rest is not kept: no message has as many
            frames.append(frame)
    return frames


class Server:
    """A stage's bound end. `bad_frames` counts what could not be decoded."""

    def __init__(self, endpoints: Endpoints, session: SessionId) -> None:
        """Binds.

        Args:
            endpoints: `ipc:///path` or `tcp://host:port` for each channel.
            session: the sender named in refusals.

        Raises:
            NodeError: an endpoint is taken or cannot be bound.
        """
        self.session = session
        self.bad_frames = 0
        self.sockets: dict[Channel, zmq.Socket[bytes]] = {}
        self._files: list[SocketFile] = []
        try:
            for channel in CHANNELS:
                self.sockets[channel] = router = _contexts.open(zmq.ROUTER)
                router.set(zmq.ROUTER_MANDATORY, 1)
                self._bind(router, endpoints[channel])
        except BaseException:
            self.close()
            raise

    def _bind(self, router: zmq.Socket[bytes], endpoint: str) -> None:
        try:
            if endpoint.startswith("ipc://"):
                file, listener = SocketFile.listen(Path(endpoint.removeprefix("ipc://")))
                self._files.append(file)
                router.set(zmq.USE_FD, listener)
            router.bind(endpoint)
        except (OSError, zmq.ZMQError) as error:
            raise NodeError(f"{endpoint}: cannot be bound: {error}") from error

    @property
    def endpoints(self) -> dict[Channel, str]:
        """As bound: a port that was `*` is now a number."""
        found: dict[Channel, str] = {}
        for channel, router in self.sockets.items():
            endpoint = router.get(zmq.LAST_ENDPOINT)
            assert isinstance(endpoint, bytes)
            found[channel] = endpoint.rstrip(b"\0").decode()
        return found

    def recv(self, channel: Channel) -> tuple[Peer, Message] | None:
        """The next message of a channel, or None. What cannot be decoded is answered with `Refused`, and counted."""
        router = self.sockets[channel]
        for _ in range(BAD_FRAMES_AT_ONCE):
            frames = _recv(router)
            if frames is None:
                return None
            peer = Peer(channel, frames[0])
            try:
                return peer, decode(frames[1:])
            except MessageError as error:
                self.bad_frames += 1
                self.send(peer, refusal(frames[1:], self.session, error))
        return None

    def send(self, peer: Peer, message: Message) -> bool:
        """Never blocks; False when the peer is gone or takes no more."""
        return _send(self.sockets[peer.channel], [peer.identity, *encode(message)])

    def close(self) -> None:
        """Closes the sockets and removes their files."""
        for router in self.sockets.values():
            _contexts.close(router)
        for file in self._files:
            file.remove()
        self._files.clear()


class Client:
    """The connecting end. Finds its server again after a restart. Like every socket, not for two threads at once."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.bad_frames = 0
        self.sockets: dict[Channel, zmq.Socket[bytes]] = {}
        for channel in CHANNELS:
            self.sockets[channel] = dealer = _contexts.open(zmq.DEALER)
            dealer.set(zmq.IMMEDIATE, 1)
            dealer.set(zmq.RECONNECT_IVL, RECONNECT_MS)
            dealer.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
            dealer.set(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
            dealer.connect(endpoints[channel])

    def send(self, channel: Channel, message: Message) -> bool:
        """Never blocks; False when nobody is there or takes no more."""
        return _send(self.sockets[channel], encode(message))

    def recv(self, channel: Channel | None = None) -> Message | None:
        """The next message, of the load channel first, or None. What cannot be decoded is counted and dropped."""
        for dealer in (self.sockets[channel],) if channel else self.sockets.values():
            for _ in range(BAD_FRAMES_AT_ONCE):
                frames = _recv(dealer)
                if frames is None:
                    break
                try:
                    return decode(frames)
                except MessageError:
                    self.bad_frames += 1
        return None

    def close(self) -> None:
        """Closes the sockets; what was not yet written to the wire is lost."""
        for dealer in self.sockets.values():
            _contexts.close(dealer)


class Wakeup:
    """Ends a poll from another thread."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Readable after `wake`."""
        return self._fd

    def wake(self) -> None:
        """From any thread; never blocks."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Call before looking for what the waker has left."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """Frees the descriptor; no `wake` may come after it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Pollable(Protocol):
    """A `Wakeup`, a signal pipe, a file."""

    def fileno(self) -> int:
        """Readable when there is something to do."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """What has something to read; `channel` is None for a `Pollable`."""

    source: Server | Client | Pollable
    channel: Channel | None


class Poller:
    """Waits for servers, clients and wake-ups. Not for two threads at once."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._ready: dict[zmq.Socket[bytes] | int, tuple[int, Ready]] = {}
        self._paused: set[zmq.Socket[bytes]] = set()

    def register(self, source: Server | Client | Pollable) -> None:
        """Waits for `source` from now on."""
        if not isinstance(source, Server | Client):
            self._add(source.fileno(), 0, Ready(source, None))
            return
        # Wake-ups, loads, answers from below (they free what saves need), and new saves last.
        ranks = {"load": 1, "save": 4} if isinstance(source, Server) else {"load": 2, "save": 3}
        for channel, socket in source.sockets.items():
            self._add(socket, ranks[channel], Ready(source, channel))

    def _add(self, key: zmq.Socket[bytes] | int, rank: int, ready: Ready) -> None:
        self._ready[key] = rank, ready
        self._poller.register(key, zmq.POLLIN)

    def unregister(self, source: Server | Client | Pollable) -> None:
        """Forgets `source`; call before it is closed."""
        for key in [key for key, (_, ready) in self._ready.items() if ready.source is source]:
            del self._ready[key]
            if key in self._paused:
                self._paused.remove(key)
            else:
                self._poller.unregister(key)

    def pause(self, server: Server, channel: Channel, paused: bool) -> None:
        """Leaves a channel unread, so that its senders run full; or reads it again."""
        socket = server.sockets[channel]
        if paused and socket not in self._paused:
            self._paused.add(socket)
            self._poller.unregister(socket)
        elif not paused and socket in self._paused:
            self._paused.remove(socket)
            self._poller.register(socket, zmq.POLLIN)

    def poll(self, timeout_ms: int | None) -> list[Ready]:
        """What is ready, most urgent first; nothing when `timeout_ms` has passed (None: no limit)."""
        events = self._poller.poll(timeout_ms)
        if len(events) == 1:
            return [self._ready[events[0][0]][1]]
        return [ready for _, ready in sorted((self._ready[key] for key, _ in events), key=lambda pair: pair[0])]
