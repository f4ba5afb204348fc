"""A stage's place in a runner: its sockets, its worker threads, and what is known of the stages below.

Implements `Context`. Keeps the heartbeat with the stage below, and notices by its session's lock when it dies. Knows
no concrete stage and no other seat.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from lmpipe import failpoints
from lmpipe.bus import Channel, Client, Server
from lmpipe.handles import SessionId
from lmpipe.messages import Drained, Message, Ping, Pong
from lmpipe.shm.counters import Counters
from lmpipe.shm.session import Session
from lmpipe.spans import Span, Spans
from lmpipe.stages.base import Peer, Stage
from lmpipe.stages.pool import Job, Pool

T = TypeVar("T")

MISSED_PINGS = 3
SEARCH_S = 0.25
"""How often a stage without an answer from below asks again."""
EAGER_S, EAGER_SEARCH_S = 10.0, 0.02
"""So long after the start, or after the death of a stage below, it asks more often; and how often."""
LOOK_S = 0.05
"""Whether the stages below live is looked at in every turn, but not more often than this."""

MAX_PINGERS = 16

log = logging.getLogger(__name__)


class Seat:
    """What the runner keeps for one stage. `stage` is set when the runner runs."""

    stage: Stage

    def __init__(
        self,
        name: str,
        session: Session,
        server: Server,
        client: Client | None,
        pool: Pool,
        counters: Counters,
        spans: Spans,
        heartbeat_s: float,
        alive: Callable[[SessionId], bool],
    ) -> None:
        self.name, self.server, self.client, self.pool = name, server, client, pool
        self.chain: dict[str, SessionId] = {}
        self.draining = False
        self.drained = False
        self.saves_over = False
        self.step_due_s = 0.0
        self.touched = True
        self.bad_frames = 0
        self._session, self._id = session, session.id
        self._counters, self._spans, self._heartbeat_s, self._alive = counters, spans, heartbeat_s, alive
        self._look_at_s, self._eager_until_s = 0.0, self.now_s() + EAGER_S
        self._ping_due_s = 0.0 if client else float("inf")
        self._beaten_s = 0.0
        self._prompted = False
        self._missed = 0
        self._pingers: dict[Peer, None] = {}
        self._drainers: list[tuple[Peer, int]] = []

    # What the stage sees (`Context`).

    @property
    def session(self) -> Session:
        """The session of the stage's process."""
        return self._session

    @property
    def has_down(self) -> bool:
        """Whether the topology has a stage below this one."""
        return self.client is not None

    @property
    def backlog(self) -> int:
        """Jobs submitted whose callbacks have not run yet."""
        return self.pool.backlog

    def now_s(self) -> float:
        """CLOCK_MONOTONIC."""
        return time.monotonic()

    def reply(self, peer: Peer, message: Message) -> bool:
        """Answer; False: the peer is gone or full."""
        if failpoints.on:
            return failpoints.carry(f"{self.name}.up", message, lambda: self.server.send(peer, message))
        return self.server.send(peer, message)

    def down(self, channel: Channel, message: Message) -> bool:
        """Send to the stage below; False: nobody there, or full."""
        client = self.client
        if client is not None and failpoints.on:
            return failpoints.carry(f"{self.name}.down", message, lambda: client.send(channel, message))
        return client is not None and client.send(channel, message)

    def submit(
        self,
        fn: Callable[[], T],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
        name: str,
        *,
        urgent: bool = False,
        nbytes: int = 0,
        chunks: int = 0,
    ) -> None:
        """Run `fn` on a worker thread, then `done` or `failed` on the runner's."""
        self._counters.add("jobs")
        self.pool.submit(Job(fn, done, failed, name, nbytes, chunks), urgent=urgent)

    def count(self, name: str, n: int = 1) -> None:
        """Add to one of the stage's counters."""
        self._counters.add(f"{self.name}_{name}", n)

    def gauge(self, name: str, value: int) -> None:
        """Set one of the stage's gauges."""
        self._counters.set(f"{self.name}_{name}", value)

    def span(self, name: str, nbytes: int = 0, chunks: int = 0) -> Span:
        """Mark a part of the work in profiles."""
        return self._spans.span(name, nbytes, chunks)

    # What the runner does with it.

    @property
    def due_s(self) -> float:
        """When the seat wants a turn though nothing has come."""
        return min(self.step_due_s, self._ping_due_s)

    def pinged(self, peer: Peer, sent_ns: int, now_s: float) -> None:
        """Answer, and beat in the same turn where a beat is near: one wake-up instead of two."""
        self._pingers.pop(peer, None)
        self._pingers[peer] = None
        if len(self._pingers) > MAX_PINGERS:
            del self._pingers[next(iter(self._pingers))]
        self.reply(peer, self._pong(sent_ns))
        if self.chain:
            # Our beats come to lie on those from above: now, or else with the next one, but never half a beat late.
            near = now_s - self._beaten_s > 0.75 * self._heartbeat_s
            late_s = min(now_s + 1.25 * self._heartbeat_s, self._beaten_s + 1.5 * self._heartbeat_s)
            self._ping_due_s = now_s if near else late_s
            self._prompted = True

    def _pong(self, sent_ns: int) -> Pong:
        state = "draining" if self.draining else "ready"
        return Pong(self._id, sent_ns, self.name, [self._id, *self.chain.values()], state, list(self.chain))

    def beat(self, now_s: float) -> None:
        """Ping the stage below when it is time. Unanswered pings count, not time: we may have been stopped."""
        failpoints.deliver()
        if self.client is None:
            return
        if self.chain and now_s >= self._look_at_s:
            self._look(now_s)
        if now_s < self._ping_due_s:
            return
        if self.chain and self._missed >= MISSED_PINGS:
            self._below({})
        self.client.send("load", Ping(self._id, time.monotonic_ns()))
        self._missed += 1
        self._beaten_s = now_s
        beat_s = self._heartbeat_s * (1.25 if self._prompted else 1.0)
        search_s = EAGER_SEARCH_S if now_s < self._eager_until_s else SEARCH_S
        self._ping_due_s = now_s + (beat_s if self.chain else min(self._heartbeat_s, search_s))
        self._prompted = False

    def _look(self, now_s: float) -> None:
        """Search for the successor of a dead stage at once; when it is further down, let the stage above it look."""
        self._look_at_s = now_s + LOOK_S
        dead = [session for session in self.chain.values() if not self._alive(session)]
        if not dead or self.client is None:
            return
        if dead[0] == next(iter(self.chain.values())):
            self._ping_due_s, self._eager_until_s = now_s, now_s + EAGER_S
            self._below({})
        else:
            self.client.send("load", Ping(self._id, 0))  # not one that counts when it is not answered

    def ponged(self, pong: Pong) -> None:
        """The stage below lives, and says what is below it."""
        self._missed = 0
        chain = dict(zip([pong.stage, *pong.below], pong.sessions, strict=True))
        if chain != self.chain:
            self._below(chain)

    def _below(self, chain: dict[str, SessionId]) -> None:
        log.info("below %s: %s", self.name, {stage: f"{session:016x}" for stage, session in chain.items()} or "nobody")
        self.chain = chain
        self.touched = True
        self.count("below_changes")
        for peer in list(self._pingers):  # those above learn it now, not a heartbeat for each stage between
            if not self.reply(peer, self._pong(0)):
                del self._pingers[peer]
        self.stage.below_changed(dict(chain))

    def drain(self, peer: Peer | None = None, ref: int = 0) -> None:
        """Let no new saves in from the moment the socket is empty, and say so when nothing is left."""
        self.draining = True
        if peer is not None:
            self._drainers.append((peer, ref))

    def check_drained(self) -> None:
        """Answer who asked for the end, once it is there."""
        self.drained = self.drained or (self.saves_over and not self.backlog and not self.stage.busy())
        if self.drained:
            for peer, ref in self._drainers:
                self.reply(peer, Drained(self._id, ref))
            self._drainers.clear()
