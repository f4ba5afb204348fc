"""The thread that talks to gather: registers, keeps the session alive, carries what other threads post, hands out what
comes back.

    absent ── node.json found, maps attached ──▶ registering ── Registered ──▶ ready
      ▲ ▲                                           │ Refused                     │
      │ │                                           ▼                            │
      │ └────────── another node.json ────────── refused      gather's session changed: register again
      └── gather's lock is gone, or no Pong for three heartbeats

Losing gather loses nothing that is mapped: the attachment stays and DRAM hits go on. Only messages stop: saves are
dropped and loads from below fail at once, each with its reason. While somebody waits for gather its lock is looked at
`LOOK_S` apart, and a gather that has died is soon back: its successor is looked for `CONNECTING_S` apart. No thread of
the engine ever waits on a socket. Owns the sockets; knows no pages.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from lmpipe import failpoints
from lmpipe import messages as m
from lmpipe.bus import CHANNELS, Channel, Client, Poller, Wakeup
from lmpipe.errors import LmpipeError
from lmpipe.handles import Slot, Tier
from lmpipe.producer.attachment import Attachment
from lmpipe.rundir import RunDir
from lmpipe.topology import NodeInfo

log = logging.getLogger("lmpipe.producer")

MISSED_BEATS = 3
CONNECTING_S = 0.02
EAGER_S = 10.0
"""So long the successor of a gather that died is looked for more often than at every heartbeat."""
LOOK_S = 0.05
OUTBOX_MESSAGES = 4096

Answer = m.Loaded | m.LoadFailed | m.Pinned | m.Invalidated | m.Found


class LeasePool:
    """Arena slots lent to this producer. Slots in use are remembered, so that a renewed grant cannot name one twice."""

    def __init__(self) -> None:
        self._free: deque[Slot] = deque()
        self._in_use: set[Slot] = set()
        self._closed = False
        self._changed = threading.Condition()

    def give(self, slots: Iterable[Slot]) -> None:
        """New leases from gather."""
        with self._changed:
            self._free.extend(slot for slot in slots if slot not in self._in_use)
            self._changed.notify_all()

    def reset(self, slots: Iterable[Slot] = ()) -> None:
        """Start over with exactly these: what gather says after a registration is the truth."""
        with self._changed:
            self._free.clear()
        self.give(slots)

    def take(self, most: int, timeout_s: float) -> list[Slot]:
        """One to `most` leases; empty when none came in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed, timeout_s)
            taken = [self._free.popleft() for _ in range(min(most, len(self._free)))]
            self._in_use.update(taken)
            return taken

    def put_back(self, slots: Iterable[Slot]) -> None:
        """These were not used after all; those that are stale by now are found out when they are opened."""
        with self._changed:
            slots = list(slots)
            self._in_use.difference_update(slots)
            self._free.extendleft(reversed(slots))

    def close(self) -> None:
        """Nobody waits for leases any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def done(self, slots: Iterable[Slot]) -> None:
        """These went to gather, or are lost."""
        with self._changed:
            self._in_use.difference_update(slots)


class Link:
    """One producer's connection. `hello` makes the Register message; `on_message` gets what answers no request."""

    def __init__(
        self,
        run_dir: Path,
        hello: Callable[[Attachment], m.Register],
        on_message: Callable[[m.Message], None],
        on_ready: Callable[[Attachment, m.Registered], None],
        on_lost: Callable[[str], None],
        on_beat: Callable[[Attachment | None], None],
    ) -> None:
        self._run_dir = run_dir
        self._hello, self._on_message, self._on_ready = hello, on_message, on_ready
        self._on_lost, self._on_beat = on_lost, on_beat
        self.state = "absent"
        self.reason = "not attached yet"
        self.loss = "lmpipe lost"
        """Why gather was lost the last time."""
        self.saves_open: Callable[[], bool] = lambda: False
        """Whether saves wait for an answer; set by who makes them."""
        self.saves_overdue: Callable[[float], bool] = lambda _: False
        """Whether one of them, or a lease, has been waited for so many seconds that a message must be lost."""
        self.asked: Callable[[bool], None] = lambda _: None
        """Told of each lookup by message, whether it was answered; set by who counts them."""
        self.heard_s = 0.0
        """When gather was last heard of (monotonic)."""
        self.attachment: Attachment | None = None
        self._former: list[Attachment] = []
        self.registered: m.Registered | None = None
        self._node: tuple[float, str] | None = None
        self._complained = False
        self._refusal = ""
        self._mark: tuple[int, int] | None = None
        self._client: Client | None = None
        self._poller = Poller()
        self._wakeup = Wakeup()
        self._poller.register(self._wakeup)
        self._outbox: deque[tuple[Channel, m.Message]] = deque()
        self._answers: dict[int, queue.SimpleQueue[Answer | None]] = {}
        self._answers_lock = threading.Lock()
        self._changed = threading.Condition()
        self._stop = False
        self._beat_s, self._answer_s = 1.0, math.inf
        self._next_beat_s = 0.0
        self._next_look_s = 0.0
        self._eager_until_s = 0.0
        self._last_pong_s = 0.0
        self._unanswered = 0
        self._thread = threading.Thread(target=self._run, name="lmpipe-link", daemon=True)

    def start(self) -> None:
        """Look for the node. From here on the callbacks are called, from a thread of the link's own."""
        self._thread.start()

    # Any thread.

    def post(self, channel: Channel, message: m.Message) -> bool:
        """Send when possible. False: too much is waiting, or nobody is there."""
        if self.state != "ready" or len(self._outbox) >= OUTBOX_MESSAGES:
            return False
        self._outbox.append((channel, message))
        self._wakeup.wake()
        return True

    def request(self, ref: int, channel: Channel, message: m.Message) -> queue.SimpleQueue[Answer | None]:
        """Send and get a queue of the answers; None in it means that gather is lost. End with `forget(ref)`."""
        answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        with self._answers_lock:
            self._answers[ref] = answers
        if not self.post(channel, message):
            answers.put(None)
        return answers

    def ask(self, ref: int, message: m.Message, timeout_s: float) -> m.Message | None:
        """Send on the load channel and wait for the one answer. None: nobody is there, or there was none in time."""
        answers = self.request(ref, "load", message)
        try:
            return answers.get(timeout=timeout_s)
        except queue.Empty:
            return None
        finally:
            self.forget(ref)

    def forget(self, ref: int) -> None:
        """No more answers are wanted."""
        with self._answers_lock:
            self._answers.pop(ref, None)

    def gather_died(self) -> bool:
        """Whether the gather of this registration is dead, not only silent. Takes microseconds; then the link knows."""
        registered, attachment = self.registered, self.attachment
        if registered is None or attachment is None:
            return False  # lost already, and said so
        try:
            died = not attachment.sessions.alive(registered.session)
        except OSError:  # no descriptor to be had: nothing is known
            return False
        if died and threading.current_thread() is not self._thread:
            self._next_look_s = 0.0
            self._wakeup.wake()
        return died

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until registered (or refused)."""
        with self._changed:
            self._changed.wait_for(lambda: self.state != "absent" or self._stop, timeout_s)
        return self.state == "ready"

    def close(self, goodbye: m.Message | None) -> None:
        """Send a last message, stop the thread, drop the maps."""
        if goodbye is not None:
            self.post("save", goodbye)
        self._stop = True
        self._wakeup.wake()
        self._thread.join()
        self._wakeup.close()  # not by the thread: it may end before it is woken

    # The link's thread.

    def _run(self) -> None:
        try:
            while not self._stop:
                now_s = time.monotonic()
                if now_s >= self._next_beat_s:
                    self._next_beat_s = now_s + self._beat_s
                    self._look(now_s)
                    self._beat(now_s)
                elif now_s >= self._next_look_s and self._is_waited_for():
                    self._look(now_s)
                self._send()
                failpoints.deliver()
                self._poller.poll(self._wait_ms())
                self._wakeup.clear()
                self._receive()
            self._send()
        finally:
            self._set_state("absent", "closed")
            self._fail_all()
            self._on_lost("closed")
            self._close_client()
            for attachment in (*self._former, *([self.attachment] if self.attachment else [])):
                attachment.retire(abandon=True)

    def _is_waited_for(self) -> bool:
        return self.state == "ready" and (bool(self._answers) or self.saves_open())

    def _wait_ms(self) -> int:
        if self._outbox:
            return 0
        due_s = min(self._next_beat_s, self._next_look_s) if self._is_waited_for() else self._next_beat_s
        return max(0, math.ceil((due_s - time.monotonic()) * 1000))

    def _look(self, now_s: float) -> None:
        self._next_look_s = now_s + LOOK_S
        if self.state != "ready" or not self.gather_died():
            return
        self._receive()  # what it said before
        if self.registered is not None:
            self._lost("gather died")
        self._close_client()  # what is said from now on is for its successor
        self._eager_until_s, self._next_beat_s = now_s + EAGER_S, now_s

    def _set_state(self, state: str, reason: str) -> None:
        with self._changed:
            self.state, self.reason = state, reason
            self._changed.notify_all()

    def _beat(self, now_s: float) -> None:
        # Unanswered pings count, and time beside them: this thread may have been the one that did not run.
        silent = now_s - self._last_pong_s > MISSED_BEATS * self._beat_s
        if self.state == "ready" and silent and self._unanswered >= MISSED_BEATS:
            self._lost("no answer from gather")
        if self.state == "refused":
            if self._note_mark() in (None, self._mark):
                return
            self._set_state("absent", "another node came")  # what did not fit the last one may fit this one
        if self.state == "absent":
            self._attach()
            if self.attachment is not None and self._client is not None:
                said = self._carry(self._client, "load", self._hello(self.attachment))
                if not said and now_s < self._eager_until_s:  # the socket is still connecting, or nobody is there
                    self._next_beat_s = now_s + CONNECTING_S
        elif self._client is not None and self.attachment is not None:
            self._client.send("load", m.Ping(session=self.attachment.session.id, sent_ns=time.monotonic_ns()))
            self._unanswered += 1
            if self.saves_overdue(self._answer_s):  # to enter again is to hear what is lent, and what is not waited for
                self._carry(self._client, "load", self._hello(self.attachment))
        self._on_beat(self.attachment)

    def _attach(self) -> None:
        """Map the node that is there now, and connect; keep the maps when it is still the same one."""
        self._mark = self._note_mark()
        try:
            info = NodeInfo.read(self._run_dir)
            if self.attachment is not None and (info.created, info.arena_id) == self._node:
                if self._client is None:
                    self._connect(info)
                return
            fresh = Attachment(info, self)
        except (LmpipeError, OSError) as error:
            self._cannot_attach(str(error))
            return
        self._complained = False
        self._node = (info.created, info.arena_id)
        old, self.attachment = self.attachment, fresh
        if old is not None:
            old.retire()  # finds of it may still be loaded: its maps are what they were
            self._former = [former for former in (*self._former, old) if not former.closed]
        self._beat_s, self._answer_s = info.topology.heartbeat_ms / 1000, info.topology.answer_s
        self._eager_until_s = max(self._eager_until_s, time.monotonic() + self._beat_s)
        self._connect(info)

    def _cannot_attach(self, reason: str) -> None:
        """No node is nothing to warn of; one that is there and cannot be used is, once."""
        if RunDir(self._run_dir).node_json.exists() and not self._complained:
            self._complained = True
            log.warning("lmpipe cannot be used, nothing will be cached: %s", reason)
        elif reason != self.reason:
            log.info("lmpipe is not there: %s", reason)
        if reason != self.reason:
            self._set_state("absent", reason)

    def _note_mark(self) -> tuple[int, int] | None:
        """Tells one node's note from the next one's without reading it; None: there is none."""
        try:
            status = RunDir(self._run_dir).node_json.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _connect(self, info: NodeInfo) -> None:
        self._close_client()
        self._client = Client({channel: info.endpoints["gather"][channel] for channel in CHANNELS})
        self._poller.register(self._client)

    def _close_client(self) -> None:
        if self._client is not None:
            self._poller.unregister(self._client)
            self._client.close()
            self._client = None

    def _send(self) -> None:
        while self._outbox and self._client is not None and self.state == "ready":
            channel, message = self._outbox.popleft()
            if not self._carry(self._client, channel, message):
                self._refuse(message)

    @staticmethod
    def _carry(client: Client, channel: Channel, message: m.Message) -> bool:
        return failpoints.carry("producer", message, lambda: client.send(channel, message))

    def _refuse(self, message: m.Message) -> None:
        """A message could not leave: whoever waits for its answer learns it at once."""
        session = message.session
        if isinstance(message, m.Save):
            self._on_message(m.SaveDropped(session, message.save_id, Tier.DRAM, "gather busy", message.chunks))
        elif isinstance(message, m.Load):
            self._answer(message.load_id, m.LoadFailed(session, message.load_id, "gather busy", message.chunks))

    def _receive(self) -> None:
        while self._client is not None:
            message = self._client.recv()
            if message is None:
                return
            self.heard_s = time.monotonic()
            self._dispatch(message)

    def _dispatch(self, message: m.Message) -> None:
        match message:
            case m.Pong():
                self._last_pong_s, self._unanswered = time.monotonic(), 0
                if self.registered is not None and message.session != self.registered.session:
                    self._lost("gather was restarted")
                    self._next_beat_s = 0.0
            case m.Registered() if self.attachment is not None:
                self._last_pong_s, self._unanswered = time.monotonic(), 0
                self.registered = message
                self._on_ready(self.attachment, message)
                self._refusal = ""
                self._set_state("ready", "")
            case m.Refused(about="Register"):
                if message.reason != self._refusal:
                    log.warning("lmpipe refused this engine, nothing will be cached: %s", message.reason)
                self._refusal = message.reason
                self._set_state("refused", message.reason)
            case m.Refused():
                self._answer(message.ref, None)
                self._on_message(message)
            case m.Loaded() | m.LoadFailed():
                self._answer(message.load_id, message)
            case m.Invalidated() | m.Pinned() | m.Found():
                self._answer(message.ref, message)
            case _:
                self._on_message(message)

    def _answer(self, ref: int, answer: Answer | None) -> None:
        with self._answers_lock:
            waiting = self._answers.get(ref)
        if waiting is not None:
            waiting.put(answer)

    def _fail_all(self) -> None:
        self._outbox.clear()
        with self._answers_lock:
            waiting = list(self._answers.values())
        for answers in waiting:
            answers.put(None)

    def _lost(self, reason: str) -> None:
        log.info("lmpipe is gone (%s); the engine computes on", reason)
        self.registered, self.loss = None, reason
        self._set_state("absent", reason)
        self._fail_all()
        self._on_lost(reason)


def slots_of(places: Iterable[int]) -> list[Slot]:
    """Places of a message as slots."""
    return [Slot.from_place(int(place)) for place in places]
