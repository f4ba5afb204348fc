"""Runs stages in one thread: owns the loop, time, signals and errors, so that stages need none of them.

One turn of the loop:

    wait until something is ready or due
    loads, answers from below, then at most `saves_at_once` saves, and none while the stage does not accept them
    callbacks of finished jobs, heartbeats, one `step` of each stage that was touched or is due

Every part is bounded. Without work a turn is taken only for heartbeats. An expected error is answered and counted; any
other ends the process with status 70, traceback in the log: its supervisor starts it again. Knows no concrete stage.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lmpipe.bus import Channel, Client, Peer, Poller, Server, Wakeup
from lmpipe.errors import LmpipeError, ProtocolViolation
from lmpipe.handles import SessionId
from lmpipe.messages import Drain, Message, Ping, Pong, Refused, chunk_count, id_of
from lmpipe.shm.counters import Counters
from lmpipe.shm.session import Session
from lmpipe.signals import SignalPipe
from lmpipe.spans import Spans
from lmpipe.stages.base import Stage
from lmpipe.stages.pool import Pool
from lmpipe.stages.seat import Seat

EX_SOFTWARE = 70
LOADS_AT_ONCE = 64
SAVES_AT_ONCE = 4
JOBS_AT_ONCE = 64
DRAIN_STEP_S = 0.05
STEP_RETRY_S = 1.0
POOL_CLOSE_S = 5.0
LONGEST_WAIT_S = 3600.0

log = logging.getLogger(__name__)


class Runner:
    """The loop of one process. Make a seat for each stage, then the stages, then `run`.

    Takes ownership of servers and clients; counters, sessions and spans stay the caller's.
    """

    def __init__(
        self,
        counters: Counters,
        spans: Spans,
        *,
        heartbeat_s: float = 1.0,
        drain_s: float = 5.0,
        saves_at_once: int = SAVES_AT_ONCE,
        cpus: Sequence[int] | None = None,
        alive: Callable[[SessionId], bool] = lambda _: True,
    ) -> None:
        """`drain_s`: how long the orderly end may take; `cpus`: the only ones to run on; `alive`: whether a session of
        the node still lives.
        """
        self._counters, self._spans = counters, spans
        self._heartbeat_s, self._drain_s, self._saves_at_once, self._cpus = heartbeat_s, drain_s, saves_at_once, cpus
        self._alive = alive
        self._seats: list[Seat] = []
        self._by_source: dict[Server | Client, Seat] = {}
        self._names: dict[tuple[str, type[Message]], str] = {}
        self._poller, self._wakeup = Poller(), Wakeup()
        self._poller.register(self._wakeup)
        self._stop = False
        self._deadline_s = math.inf
        self._quiet_until_s = 0.0
        self._flush_due_s = 0.0

    def seat(
        self, name: str, session: Session, server: Server, client: Client | None = None, *, threads: int = 3
    ) -> Seat:
        """A place for a stage; it is the stage's `Context`. Stages that share a process sit in flow order."""
        pool = Pool(name, threads, self._spans, self._wakeup.wake)
        seat = Seat(name, session, server, client, pool, self._counters, self._spans, self._heartbeat_s, self._alive)
        self._seats.append(seat)
        self._poller.register(server)
        self._by_source[server] = seat
        if client is not None:
            self._poller.register(client)
            self._by_source[client] = seat
        return seat

    def place(self, stages: Sequence[Stage]) -> None:
        """Put each stage on its seat, by name. `run` does it; call it only to take turns by hand."""
        by_name = {stage.name: stage for stage in stages}
        if sorted(by_name) != sorted(seat.name for seat in self._seats) or len(by_name) != len(stages):
            raise ProtocolViolation(f"stages {sorted(by_name)} for seats {[seat.name for seat in self._seats]}")
        for seat in self._seats:
            seat.stage = by_name[seat.name]

    def stop(self) -> None:
        """Drain and end the loop; from any thread. SIGTERM, SIGINT and SIGHUP do the same, a second one at once."""
        self._stop = True
        self._wakeup.wake()

    def run(self, stages: Sequence[Stage], *, signals: bool = True) -> int:
        """Run until told to stop. Returns the process's exit status: 0, or 70 after a bug.

        `signals` False: leave signal handlers alone (not the main thread).
        """
        pipe = SignalPipe() if signals else None
        try:
            self.place(stages)
            self._pin_to_cpus()
            if pipe is not None:
                self._poller.register(pipe)
            while not self._over():
                self.turn(self._wait_s())
                if pipe is not None and pipe.count:
                    self._stop = True
                    self._deadline_s = -math.inf if pipe.count > 1 else self._deadline_s
            self.close()
        except Exception:
            log.critical("a bug: this process ends", exc_info=True)
            self.close(orderly=False)
            return EX_SOFTWARE
        finally:
            if pipe is not None:
                pipe.close()
        return 0

    def close(self, *, orderly: bool = True) -> None:
        """Ends threads, stages (only when `orderly`: after a bug nothing they would do can be trusted) and sockets."""
        quiet = True
        for seat in self._seats:
            ended = seat.pool.close(POOL_CLOSE_S if orderly else 0.0)
            quiet = quiet and ended
            if orderly and not ended:
                log.error("a job of %s does not end; it is left behind", seat.name)
            elif orderly:
                seat.stage.close()
        for source in self._by_source:
            source.close()
        if quiet:  # a job left behind would wake whatever has the descriptor by then
            self._wakeup.close()
        self._spans.flush()

    # One turn.

    def turn(self, wait_s: float = 0.0) -> None:
        """Wait `wait_s` at most, then do what there is to do, within bounds."""
        for seat in self._seats:
            self._poller.pause(seat.server, "save", seat.saves_over or not seat.stage.accepts_saves())
        ready = self._poller.poll(math.ceil(wait_s * 1000))
        begin_ns = time.monotonic_ns()
        self._counters.add("turns")
        for found in ready:
            if found.source is self._wakeup:
                self._wakeup.clear()
            elif isinstance(found.source, Server) and found.channel:
                self._read(self._by_source[found.source], found.channel)
            elif isinstance(found.source, Client) and found.channel:
                self._read_below(self._by_source[found.source], found.source, found.channel)
            elif isinstance(found.source, SignalPipe):
                found.source.clear()
        for seat in self._seats:
            self._finish_jobs(seat)
        now_s = time.monotonic()
        for seat in self._seats:
            with _Expected(self, seat):
                seat.beat(now_s)
            self._step(seat, now_s)
        self._end_of_flow()
        self._flush(now_s)
        self._counters.add("busy_us", (time.monotonic_ns() - begin_ns) // 1000)

    def _wait_s(self) -> float:
        now_s = time.monotonic()
        due_s = min(min(seat.due_s for seat in self._seats), now_s + LONGEST_WAIT_S)
        if self._stop or any(seat.draining and not seat.drained for seat in self._seats):
            due_s = min(due_s, now_s + DRAIN_STEP_S)
        return max(due_s - now_s, 0.0)

    def _read(self, seat: Seat, channel: Channel) -> None:
        for _ in range(self._saves_at_once if channel == "save" else LOADS_AT_ONCE):
            if channel == "save" and not seat.stage.accepts_saves():
                break
            found = seat.server.recv(channel)
            if found is None:
                # What lay in the socket when the end was announced is in.
                seat.saves_over = seat.saves_over or (channel == "save" and seat.draining)
                break
            self._handle(seat, *found)
        if seat.server.bad_frames != seat.bad_frames:
            seat.count("bad_frames", seat.server.bad_frames - seat.bad_frames)
            seat.bad_frames = seat.server.bad_frames

    def _read_below(self, seat: Seat, client: Client, channel: Channel) -> None:
        for _ in range(LOADS_AT_ONCE):
            message = client.recv(channel)
            if message is None:
                return
            self._handle(seat, None, message)

    def _handle(self, seat: Seat, peer: Peer | None, message: Message) -> None:
        with _Expected(self, seat, peer, message):
            match message:
                case Ping() if peer is not None:
                    seat.pinged(peer, message.sent_ns, time.monotonic())
                case Pong() if peer is None:
                    seat.ponged(message)
                case Drain() if peer is not None:
                    seat.drain(peer, message.ref)
                case Ping() | Pong() | Drain():
                    seat.count("refused")
                case _:
                    seat.count("messages")
                    seat.touched = True
                    name = self._names.get((seat.name, type(message)))
                    if name is None:
                        name = self._names[seat.name, type(message)] = f"{seat.name}.{type(message).__name__}"
                    with self._spans.span(name, 0, chunk_count(message) if self._spans.watched else 0):
                        seat.stage.handle(peer, message)

    def _finish_jobs(self, seat: Seat) -> None:
        for _ in range(JOBS_AT_ONCE):
            job = seat.pool.take()
            if job is None:
                return
            seat.touched = True
            with _Expected(self, seat):
                if job.error is None:
                    job.done(job.result)
                    continue
                self._counters.add("jobs_failed")
                if isinstance(job.error, ProtocolViolation):
                    raise job.error
                if not isinstance(job.error, LmpipeError | OSError):
                    log.error("%s failed in an unforeseen way", job.name, exc_info=job.error)
                job.failed(job.error)
        self._wakeup.wake()

    def _step(self, seat: Seat, now_s: float) -> None:
        if not seat.touched and now_s < seat.step_due_s:
            return
        seat.touched = False
        seat.step_due_s = now_s + STEP_RETRY_S
        with _Expected(self, seat), self._spans.span(f"{seat.name}.step"):
            wait_s = seat.stage.step(now_s)
            seat.step_due_s = math.inf if wait_s is None else now_s + max(wait_s, 0.0)

    # Trouble, and the end.

    def trouble(self, seat: Seat, peer: Peer | None, message: Message | None, error: LmpipeError) -> None:
        """Count expected trouble, answer who waits, and log it, at most once a second."""
        self._counters.add("errors")
        if peer is not None and message is not None:
            seat.count("refused")
            seat.reply(peer, Refused(seat.session.id, type(message).__name__, id_of(message), str(error)))
        if (now_s := time.monotonic()) >= self._quiet_until_s:
            self._quiet_until_s = now_s + 1.0
            log.warning("%s: %s: %s", seat.name, type(message).__name__ if message else "at work", error)

    def _end_of_flow(self) -> None:
        if self._stop and self._deadline_s == math.inf:
            self._deadline_s = time.monotonic() + self._drain_s
        for seat in self._seats:
            if self._stop and not seat.draining:
                seat.drain()
            if seat.draining:
                if not seat.saves_over:
                    self._read(seat, "save")
                with _Expected(self, seat):
                    seat.check_drained()
            if not seat.drained and self._stop:
                return  # those below go on until nothing comes from above

    def _over(self) -> bool:
        if not self._stop:
            return False
        if all(seat.drained for seat in self._seats):
            return True
        late = time.monotonic() >= self._deadline_s
        if late:
            log.warning("not drained in time: %s", ", ".join(seat.name for seat in self._seats if not seat.drained))
        return late

    def _flush(self, now_s: float) -> None:
        if self._spans.recording and now_s >= self._flush_due_s:
            self._spans.flush()
            self._counters.set("spans_dropped", self._spans.dropped)
            self._flush_due_s = now_s + self._heartbeat_s

    def _pin_to_cpus(self) -> None:
        if self._cpus is not None:
            for task in Path("/proc/self/task").iterdir():  # the sockets' thread is there already
                os.sched_setaffinity(int(task.name), self._cpus)


class _Expected:
    """Turns an expected error inside the block into an answer and a count; lets a bug pass."""

    __slots__ = ("_message", "_peer", "_runner", "_seat")

    def __init__(self, runner: Runner, seat: Seat, peer: Peer | None = None, message: Message | None = None) -> None:
        self._runner, self._seat, self._peer, self._message = runner, seat, peer, message

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, LmpipeError) or isinstance(error, ProtocolViolation):
            return False
        self._runner.trouble(self._seat, self._peer, self._message, error)
        return True
