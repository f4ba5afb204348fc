"""Keeps processes running: spawns them, waits for READY, watches, restarts within a budget, stops them in order.

Knows no stage and no socket: what the processes are comes as `ProcessSpec`s, how they are asked whether they live comes
as a `Link`. A process that died is seen at once by its pidfd; one that hangs, by its silence. Silence is counted in the
supervisor's own running time: if it was itself stopped for a while, it does not kill the innocent when it wakes.

      spawn            READY                      death, budget left          death, budget spent
    ────────▶ STARTING ────────▶ READY      any ─────────────────────▶ WAITING      any ────────▶ DOWN
                  ▲                ▲                                      │
                  └────────────────┼───── back-off is over ───────────────┘
      adopt            an answer   │
    ────────▶ ADOPTED ─────────────┘

Processes outlive a supervisor that is killed. Its successor adopts those that live and go on answering; what died
while nobody watched counts as one death more, and the budget goes on from the state that was published last.
"""

from __future__ import annotations

import math
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from lmpipe.child import Child, ChildState, ProcessSpec, Survivor
from lmpipe.errors import NodeError
from lmpipe.rundir import write_atomically
from lmpipe.signals import SignalPipe

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0
LOOK_S = 0.05
"""How often an adopted process is asked until it has answered."""

_SETTLED = (ChildState.READY, ChildState.DOWN)


class Link(Protocol):
    """How the supervisor speaks with what runs inside the processes."""

    def ping(self, process: str) -> None:
        """Asks for a sign of life; never blocks."""
        ...

    def answered(self, process: str) -> bool:
        """Whether a sign of life came since the last call."""
        ...

    def drain(self, lives: Callable[[str], bool], timeout_s: float, hurry: Callable[[], bool]) -> list[str]:
        """Empties the stages in flow order, those of processes that do not live (any more) left out; returns those that
        were not empty in time. Stops waiting when `hurry()`.
        """
        ...


class ProcessState(msgspec.Struct, frozen=True):
    """One process as `status` shows it. `started`: seconds since 1970; `deaths_s`: by CLOCK_MONOTONIC, of the last
    window.
    """

    name: str
    state: str
    pid: int
    restarts: int
    started: float
    last_exit: str
    deaths_s: list[float] = []


class NodeState(msgspec.Struct, frozen=True):
    """The supervisor's own state file. `state`: starting; adopting (taking over what a dead supervisor left); ready;
    recovering (a process is being started again); degraded (one stays down); draining; stopping.
    """

    pid: int
    state: str
    started: float
    processes: list[ProcessState]

    @classmethod
    def read(cls, path: Path) -> NodeState | None:
        """The state last published, or None when there is none."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits, in seconds. More than `budget` deaths within `window_s` leave a process down."""

    ready_s: float = 60.0
    ping_s: float = 2.0
    watchdog_s: float = 10.0
    budget: int = 5
    window_s: float = 60.0
    drain_s: float = 10.0
    term_s: float = 5.0


class Supervisor:
    """Runs `specs` until a signal or `stop()`. One thread, one poll loop, about one wake-up for each ping interval."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        policy: Policy,
        link: Link,
        state_path: Path,
        signals: SignalPipe,
        *,
        report: Callable[[str], None],
        buried: Callable[[str, int], None],
        tidy: Callable[[], None],
        survivors: Mapping[str, Survivor] | None = None,
        former: NodeState | None = None,
    ) -> None:
        """`report` gets a line for each event, `buried` name and pid of each dead; `tidy` comes with each ping.

        `survivors`: living processes to adopt, by name; with none all are started. `former`: what the supervisor that
        they are from has published last.
        """
        self.children = [Child(spec) for spec in specs]
        self._survivors = survivors or {}
        self._former = {state.name: state for state in former.processes} if former is not None else {}
        self._policy, self._link, self._state_path = policy, link, state_path
        self._report, self._buried, self._tidy = report, buried, tidy
        self._signals = signals
        self._started = time.time()
        self._phase = "starting"
        self._ping_due_s = 0.0
        self._last_tick_s = 0.0

    def run(self, on_ready: Callable[[], None]) -> None:
        """From start to end. Raises NodeError when a process does not become ready; nothing is left running then."""
        try:
            if self._survivors:
                self._adopt_all()
            else:
                self._spawn_all()
            while not self._signals.count:
                self._wait()
                self._watch()
                if self._phase in ("starting", "adopting") and all(c.state in _SETTLED for c in self.children):
                    self._ping_due_s = self._last_tick_s = time.monotonic()
                    self._set_phase("ready")
                    on_ready()
        finally:
            self._stop()

    def _spawn_all(self) -> None:
        self._ping_due_s = math.inf
        for child in self.children:
            try:
                child.spawn(time.monotonic(), time.time())
            except OSError as error:
                raise NodeError(f"{child.name} could not be started: {error.strerror}") from None
        self._publish()

    def _adopt_all(self) -> None:
        now_s = self._ping_due_s = self._last_tick_s = time.monotonic()
        self._phase = "adopting"
        for child in self.children:
            past, survivor = self._former.get(child.name), self._survivors.get(child.name)
            if past is not None:
                child.restarts, child.started, child.last_exit = past.restarts, past.started, past.last_exit
                child.deaths_s = deque(past.deaths_s)
            if survivor is not None:
                child.adopt(survivor, now_s)
            else:
                self._mourn(child, "died while there was no supervisor", now_s)
        self._publish()

    def _wait(self) -> None:
        """Sleeps until a process dies or says READY, a signal comes, or something is due."""
        poll = select.poll()
        poll.register(self._signals.fileno(), select.POLLIN)
        now_s = time.monotonic()
        due_s = [self._ping_due_s]
        for child in self.children:
            if child.pidfd >= 0:
                poll.register(child.pidfd, select.POLLIN)
            if child.ready_fd >= 0:
                poll.register(child.ready_fd, select.POLLIN)
            if child.state is ChildState.STARTING:
                due_s.append(child.since_s + self._policy.ready_s)
            elif child.state is ChildState.WAITING:
                due_s.append(child.since_s + self._backoff_s(child))
        timeout_s = max(0.0, min(*due_s, now_s + 3600.0) - now_s)
        poll.poll(timeout_s * 1000.0 + 1.0)
        self._signals.clear()

    def _watch(self) -> None:
        self._hear_ready()
        now_s = time.monotonic()
        for child in self.children:
            if child.living:
                late = child.state is ChildState.STARTING and now_s - child.since_s > self._policy.ready_s
                if child.wait(0.0):
                    self._died(child, now_s)
                elif late and self._is_first_start(child):
                    raise NodeError(f"{child.name} was not ready in {self._policy.ready_s:g} s; see {child.spec.log}")
                elif late:
                    child.kill(f"not ready in {self._policy.ready_s:g} s")
            elif child.state is ChildState.WAITING and now_s - child.since_s >= self._backoff_s(child):
                self._start_again(child, now_s)
        if now_s >= self._ping_due_s:
            self._ping(now_s)

    def _start_again(self, child: Child, now_s: float) -> None:
        child.restarts += 1
        try:
            child.spawn(now_s, time.time())
            self._publish()
            self._report(f"{child.name}: started again, pid {child.pid}")
        except OSError as error:  # no process or no memory to be had now: counts as a death
            self._mourn(child, f"could not be started: {error.strerror}", now_s)

    def _hear_ready(self) -> None:
        for child in self.children:
            if child.ready_fd >= 0 and child.read_ready(time.monotonic()):
                self._publish()
                self._report(f"{child.name}: ready, pid {child.pid}")

    def _ping(self, now_s: float) -> None:
        # After a gap much longer than the interval it was this process that did not run.
        passed_s = min(now_s - self._last_tick_s, 2 * self._policy.ping_s)
        for child in self.children:
            if child.state not in (ChildState.READY, ChildState.ADOPTED):
                continue
            answered = self._link.answered(child.name)
            child.silent_s = 0.0 if answered else child.silent_s + passed_s
            if answered and child.state is ChildState.ADOPTED:
                child.answered(now_s)
                self._publish()
                self._report(f"{child.name}: adopted, pid {child.pid}")
            if child.silent_s >= self._policy.watchdog_s:
                child.kill(f"no answer for {child.silent_s:.1f} s")
            else:
                self._link.ping(child.name)
        self._tidy()
        adopting = any(child.state is ChildState.ADOPTED for child in self.children)
        self._last_tick_s, self._ping_due_s = now_s, now_s + (LOOK_S if adopting else self._policy.ping_s)

    def _died(self, child: Child, now_s: float) -> None:
        first = self._is_first_start(child)
        reason = self._bury(child)
        if first:  # it will not go better the next time; say why instead
            words = child.last_words()
            raise NodeError(f"{child.name} died at start: {reason}" + (f"\n{words}" if words else ""))
        self._mourn(child, reason, now_s)

    def _mourn(self, child: Child, reason: str, now_s: float) -> None:
        child.last_exit, child.since_s = reason, now_s
        deaths = child.deaths_s
        deaths.append(now_s)
        while deaths and now_s - deaths[0] > self._policy.window_s:
            deaths.popleft()
        if len(deaths) > self._policy.budget:
            child.state = ChildState.DOWN
            next_step = f"died {len(deaths)} times in {self._policy.window_s:g} s and stays down"
        else:
            child.state = ChildState.WAITING
            next_step = f"starting it again in {self._backoff_s(child):g} s"
        self._publish()
        self._report(f"{child.name}: {reason}; {next_step}")

    def _is_first_start(self, child: Child) -> bool:
        return self._phase == "starting" and child.state is ChildState.STARTING and not child.restarts

    def _bury(self, child: Child) -> str:
        pid = child.pid
        reason = child.reap(time.monotonic())
        self._buried(child.name, pid)
        return reason

    def _backoff_s(self, child: Child) -> float:
        return min(FIRST_BACKOFF_S * 2 ** max(0, len(child.deaths_s) - 1), LAST_BACKOFF_S)

    def _stop(self) -> None:
        """Drains, then SIGTERM, then SIGKILL; a second signal skips the waiting. Every process is reaped on return."""
        ready = {child.name: child for child in self.children if child.living and child.state is ChildState.READY}
        if ready and self._phase != "starting":
            self._set_phase("draining")
            before = self._signals.count

            def lives(process: str) -> bool:
                return process in ready and not ready[process].wait(0.0)

            late = self._link.drain(lives, self._policy.drain_s, lambda: self._signals.count > before)
            if late:
                self._report(f"not drained in time: {', '.join(late)}")
        self._set_phase("stopping")
        for child in self.children:
            child.signal(signal.SIGTERM)
            child.signal(signal.SIGCONT)  # a stopped process would not see SIGTERM
        deadline_s = time.monotonic() + self._policy.term_s
        for child in self.children:
            if child.living:
                if not child.wait(max(0.0, deadline_s - time.monotonic())):
                    child.kill("did not stop")
                    child.wait(self._policy.term_s)
                self._report(f"{child.name}: stopped, {self._bury(child)}")
            child.state = ChildState.STOPPED
        self._publish()

    def _set_phase(self, phase: str) -> None:
        self._phase = phase
        self._publish()

    def _state(self) -> str:
        if self._phase != "ready" or all(child.state is ChildState.READY for child in self.children):
            return self._phase
        return "degraded" if any(child.state is ChildState.DOWN for child in self.children) else "recovering"

    def _publish(self) -> None:
        processes = [
            ProcessState(c.name, c.state, c.pid, c.restarts, c.started, c.last_exit, [*c.deaths_s])
            for c in self.children
        ]
        state = NodeState(os.getpid(), self._state(), self._started, processes)
        try:
            write_atomically(self._state_path, msgspec.json.encode(state))
        except OSError as error:  # a full tmpfs must not end the node
            self._report(f"{self._state_path}: {error.strerror}")
