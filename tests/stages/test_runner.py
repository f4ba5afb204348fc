"""The loop with real sockets, threads, signals and processes, and stages of a few lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmpipe.bus import Channel, Client, Server
from lmpipe.errors import LmpipeError, ProtocolViolation
from lmpipe.handles import SessionId
from lmpipe.messages import (
    Cancel,
    Drain,
    Drained,
    Invalidate,
    Message,
    Ping,
    Pinned,
    Pong,
    Refused,
    Save,
    Touch,
    no_chunks,
)
from lmpipe.metrics import RUNNER_COUNTERS, SEAT_COUNTERS
from lmpipe.rundir import RunDir
from lmpipe.shm.counters import Counters
from lmpipe.shm.session import Session
from lmpipe.spans import Spans, read_trace
from lmpipe.stages.base import Context, Peer
from lmpipe.stages.pool import MAX_JOBS, Job, Pool
from lmpipe.stages.runner import EX_SOFTWARE, Runner
from lmpipe.stages.seat import Seat

BEAT_S = 0.1
YOU = SessionId(77)


class Probe:
    """A stage that notes what happens to it; `on` says what it does with a message."""

    def __init__(self, context: Context, name: str = "probe") -> None:
        self.name, self.context = name, context
        self.seen: list[Message] = []
        self.peers: list[Peer | None] = []
        self.chains: list[dict[str, SessionId]] = []
        self.on: Callable[[Peer | None, Message], None] = lambda peer, message: None
        self.on_step: Callable[[float], float | None] = lambda now_s: None
        self.accepts, self.working, self.closed, self.steps = True, False, False, 0

    def handle(self, peer: Peer | None, message: Message) -> None:
        self.seen.append(message)
        self.peers.append(peer)
        self.on(peer, message)

    def step(self, now_s: float) -> float | None:
        self.steps += 1
        return self.on_step(now_s)

    def below_changed(self, chain: dict[str, SessionId]) -> None:
        self.chains.append(chain)

    def busy(self) -> bool:
        return self.working

    def accepts_saves(self) -> bool:
        return self.accepts

    def close(self) -> None:
        self.closed = True


class Stand:
    """A runner with one stage on it, driven by hand, and a client."""

    def __init__(self, run_dir: Path, name: str = "probe", *, below: str = "", trace: Path | None = None) -> None:
        self.paths = RunDir(run_dir)
        for directory in self.paths.directories:
            directory.mkdir(mode=0o700, exist_ok=True)
        names = [*RUNNER_COUNTERS, *(f"{stage}_{counter}" for stage in ("probe", "under") for counter in SEAT_COUNTERS)]
        self.counters = Counters.create(self.paths.counters_of(name, os.getpid()), names)
        self.spans = Spans(name, trace)
        self.session = Session.create(run_dir)
        self.dead: set[SessionId] = set()
        self.runner = Runner(
            self.counters,
            self.spans,
            heartbeat_s=BEAT_S,
            drain_s=0.5,
            saves_at_once=2,
            alive=lambda session: session not in self.dead,
        )
        self.seat = self.add(name, below)
        self.stage = Probe(self.seat, name)
        self.runner.place([self.stage])
        self.client = Client(self.endpoints(name))
        self.closed = False

    def endpoints(self, name: str) -> dict:
        return {channel: self.paths.endpoint(name, channel) for channel in ("load", "save")}

    def add(self, name: str, below: str = "") -> Seat:
        server = Server(self.endpoints(name), self.session.id)
        return self.runner.seat(name, self.session, server, Client(self.endpoints(below)) if below else None)

    def until(self, condition: Callable[[], object], what: str = "it") -> None:
        for _ in range(2000):
            if condition():
                return
            self.runner.turn(0.005)
        pytest.fail(f"{what} never came true")

    def send(self, channel: str, message: Message) -> None:
        self.until(lambda: self.client.send(channel, message), "send")

    def connected(self) -> bool:
        """Both channels; what it sends is answered by the runner."""
        while self.client.recv() is not None:
            pass
        return self.client.send("load", Ping(YOU, 1)) and self.client.send("save", Ping(YOU, 1))

    def arrived(self, channel: Channel) -> None:
        """Something lies in the stage's socket."""
        assert self.seat.server.sockets[channel].poll(10_000)

    def answer(self) -> Message:
        found: list[Message] = []

        def there() -> bool:
            message = self.client.recv()
            if message is not None:
                found.append(message)
            return bool(found)

        self.until(there, "answer")
        return found[0]

    def counted(self, name: str) -> int:
        return self.counters.get(name)

    def close(self) -> None:
        self.client.close()
        if not self.closed:
            self.runner.close(orderly=False)
        self.session.close()
        self.spans.close()
        self.counters.close(unlink=True)


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    made = Stand(tmp_path)
    yield made
    made.close()


def save(number: int) -> Save:
    return Save(YOU, number, "arena", no_chunks())


def test_messages_reach_the_stage_and_answers_the_peer(stand: Stand) -> None:
    stand.stage.on = lambda peer, message: assert_true(peer and stand.seat.reply(peer, Pinned(YOU, 1, 2)))
    stand.send("load", Cancel(YOU, 5))
    assert stand.answer() == Pinned(YOU, 1, 2)
    assert stand.stage.seen == [Cancel(YOU, 5)]
    assert stand.counted("probe_messages") == 1


def assert_true(value: object) -> None:
    assert value


def test_ping_is_answered_by_the_runner(stand: Stand) -> None:
    stand.send("load", Ping(YOU, 123))
    assert stand.answer() == Pong(stand.session.id, 123, "probe", [stand.session.id])
    stand.send("save", Ping(YOU, 124))
    assert stand.answer() == Pong(stand.session.id, 124, "probe", [stand.session.id])
    assert stand.stage.seen == []


def test_loads_come_before_saves_and_few_saves_a_turn(stand: Stand) -> None:
    stand.until(stand.connected)
    stand.runner.turn(0.05)
    stand.stage.accepts = False
    for number in range(5):
        assert stand.client.send("save", save(number))
    assert stand.client.send("load", Cancel(YOU, 1))
    stand.until(lambda: stand.stage.seen)
    stand.arrived("save")
    stand.runner.turn()
    assert stand.stage.seen == [Cancel(YOU, 1)]  # saves wait in the socket
    stand.stage.accepts = True
    assert stand.client.send("load", Cancel(YOU, 2))
    stand.arrived("load")
    while len(stand.stage.seen) < 7:
        before = len(stand.stage.seen)
        stand.runner.turn(0.005)
        assert len([message for message in stand.stage.seen[before:] if isinstance(message, Save)]) <= 2
    assert stand.stage.seen[1:] == [Cancel(YOU, 2), *(save(number) for number in range(5))]


def test_a_stage_that_fills_up_inside_a_turn_gets_no_more(stand: Stand) -> None:
    def fill(peer: Peer | None, message: Message) -> None:
        stand.stage.accepts = False

    stand.stage.on = fill
    stand.send("save", save(1))
    assert stand.client.send("save", save(2))
    stand.until(lambda: stand.stage.seen)
    stand.arrived("save")
    stand.runner.turn()
    assert stand.stage.seen == [save(1)]


def test_expected_trouble_is_answered_with_its_reason(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(peer: Peer | None, message: Message) -> None:
        raise LmpipeError("no room")

    stand.stage.on = refuse
    stand.send("save", save(9))
    assert stand.answer() == Refused(stand.session.id, "Save", 9, "no room")
    stand.send("load", Invalidate(YOU, 4))
    assert stand.answer() == Refused(stand.session.id, "Invalidate", 4, "no room")
    assert stand.counted("errors") == 2 and stand.counted("probe_refused") == 2
    assert "no room" in caplog.text


def test_bad_frames_are_counted(stand: Stand) -> None:
    stand.send("load", Ping(YOU, 1))
    stand.answer()
    stand.client.sockets["load"].send(b"junk")
    answer = stand.answer()
    assert isinstance(answer, Refused) and answer.about == ""
    stand.until(lambda: stand.counted("probe_bad_frames") == 1)


@pytest.mark.parametrize("where", ["handle", "step", "below", "job", "done"])
@pytest.mark.parametrize("bug", [ProtocolViolation("slot 3 is free twice"), ZeroDivisionError("oh")])
def test_a_bug_ends_the_process_with_70(
    stand: Stand, caplog: pytest.LogCaptureFixture, where: str, bug: Exception
) -> None:
    def fail(*_: object) -> None:
        raise bug

    def handle(peer: Peer | None, message: Message) -> None:
        match where:
            case "handle":
                fail()
            case "step":
                stand.stage.on_step = fail
            case "job":
                stand.seat.submit(fail, fail, fail, "job")
            case "done":
                stand.seat.submit(int, fail, fail, "job")
            case _:
                stand.stage.below_changed = fail  # type: ignore[method-assign]
                stand.seat.ponged(Pong(YOU, 1, "under", [YOU]))

    stand.stage.on = handle
    stand.until(stand.connected)
    assert stand.client.send("load", Cancel(YOU, 1))
    stand.closed = True
    assert stand.runner.run([stand.stage], signals=False) == EX_SOFTWARE
    assert str(bug) in caplog.text and "Traceback" in caplog.text
    assert not stand.stage.closed
    assert list(stand.paths.sockets.iterdir()) == []


def test_steps_are_taken_when_due_or_touched(stand: Stand) -> None:
    stand.runner.turn()
    assert stand.stage.steps == 1  # the first turn
    stand.runner.turn()
    assert stand.stage.steps == 1  # None: only when woken
    stand.stage.on_step = lambda now_s: 0.0
    stand.send("load", Cancel(YOU, 1))
    stand.until(lambda: stand.stage.seen)
    steps = stand.stage.steps
    for _ in range(3):
        stand.runner.turn()
    assert stand.stage.steps == steps + 3
    stand.stage.on_step = lambda now_s: 1000.0
    stand.runner.turn()
    stand.runner.turn()
    assert stand.stage.steps == steps + 4


def test_trouble_in_a_step_is_counted_and_it_is_tried_again_later(stand: Stand) -> None:
    def trouble(now_s: float) -> float:
        raise LmpipeError("store down")

    stand.stage.on_step = trouble
    stand.runner.turn()
    stand.runner.turn()
    assert stand.counted("errors") == 1 and stand.stage.steps == 1
    assert stand.seat.step_due_s < time.monotonic() + 2


def test_jobs_run_elsewhere_and_come_back_here(stand: Stand) -> None:
    here, seen = threading.get_ident(), []
    stand.seat.submit(
        threading.get_ident, lambda thread: seen.append((thread, threading.get_ident())), seen.append, "job"
    )
    assert stand.seat.backlog == 1
    stand.until(lambda: seen)
    assert seen[0][0] != here and seen[0][1] == here
    assert stand.seat.backlog == 0 and stand.counted("jobs") == 1 and stand.stage.steps >= 1


def test_a_job_that_fails_is_told_so(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[object] = []
    for error in (LmpipeError("expected"), OSError(28, "No space left"), ValueError("unforeseen")):
        stand.seat.submit(raiser(error), seen.append, seen.append, "job")
    stand.until(lambda: len(seen) == 3)
    assert {str(error) for error in seen} == {"expected", "[Errno 28] No space left", "unforeseen"}
    assert stand.counted("jobs_failed") == 3
    assert "unforeseen" in caplog.text and "expected" not in caplog.text


def raiser(error: Exception) -> Callable[[], object]:
    def raise_it() -> object:
        raise error

    return raise_it


def test_urgent_jobs_overtake() -> None:
    pool, gate, order = Pool("probe", 1, Spans("probe"), lambda: None), threading.Event(), []

    def job(fn: Callable[[], object]) -> Job:
        return Job(fn, order.append, order.append, "job")

    pool.submit(job(gate.wait), urgent=False)
    for number in range(3):
        pool.submit(job(lambda number=number: order.append(number)), urgent=False)
    pool.submit(job(lambda: order.append("load")), urgent=True)
    gate.set()
    deadline_s = time.monotonic() + 10
    while pool.backlog and time.monotonic() < deadline_s:
        pool.take()
        time.sleep(0.001)
    assert pool.close(10) and order == ["load", 0, 1, 2]


def test_a_stage_that_does_not_bound_its_jobs_is_a_bug(stand: Stand) -> None:
    gate = threading.Event()
    for _ in range(MAX_JOBS):
        stand.seat.submit(gate.wait, lambda _: None, lambda _: None, "job")
    with pytest.raises(ProtocolViolation):
        stand.seat.submit(gate.wait, lambda _: None, lambda _: None, "job")
    gate.set()
    stand.until(lambda: stand.seat.backlog == 0)


# The stages below.


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Stand, Stand]]:
    under = Stand(tmp_path, "under")
    over = Stand(tmp_path, "probe", below="under")
    yield over, under
    over.close()
    under.close()


def both(over: Stand, under: Stand, condition: Callable[[], object], what: str) -> None:
    def beat() -> bool:
        under.runner.turn()
        return bool(condition())

    over.until(beat, what)


def test_the_chain_below_is_learned_and_told(pair: tuple[Stand, Stand]) -> None:
    over, under = pair
    assert over.seat.has_down and not under.seat.has_down and over.seat.chain == {}
    both(over, under, lambda: over.stage.chains, "chain")
    assert over.stage.chains == [{"under": under.session.id}] and over.seat.chain == {"under": under.session.id}
    over.send("load", Ping(YOU, 5))
    assert over.answer() == Pong(over.session.id, 5, "probe", [over.session.id, under.session.id], "ready", ["under"])
    # Deeper changes are pushed up, unasked, to whoever has pinged.
    under.seat.ponged(Pong(YOU, 1, "deep", [YOU]))
    assert over.seat.chain == {"under": under.session.id}
    over.until(lambda: len(over.stage.chains) == 2, "deeper chain")
    assert list(over.seat.chain.items()) == [("under", under.session.id), ("deep", YOU)]
    assert over.answer() == Pong(
        over.session.id, 0, "probe", [over.session.id, under.session.id, YOU], "ready", ["under", "deep"]
    )


def test_silence_below_is_told_after_three_pings(pair: tuple[Stand, Stand]) -> None:
    over, under = pair
    both(over, under, lambda: over.stage.chains, "chain")
    over.until(lambda: len(over.stage.chains) == 2, "silence")
    assert over.stage.chains[1] == {} and over.seat.chain == {}
    both(over, under, lambda: len(over.stage.chains) == 3, "life again")
    assert over.stage.chains[2] == {"under": under.session.id}
    assert over.counted("probe_below_changes") == 3


def test_a_death_below_is_told_without_waiting_for_pings(pair: tuple[Stand, Stand]) -> None:
    over, under = pair
    both(over, under, lambda: over.stage.chains, "chain")
    over.dead.add(under.session.id)
    over.runner.turn()
    over.until(lambda: len(over.stage.chains) == 2, "death")
    assert over.seat.chain == {}
    over.dead.clear()
    both(over, under, lambda: over.seat.chain, "the next life")


def test_a_death_further_down_makes_the_stage_above_it_look(pair: tuple[Stand, Stand]) -> None:
    over, under = pair
    under.seat.ponged(Pong(YOU, 1, "deep", [YOU]))
    both(over, under, lambda: over.seat.chain, "chain")
    over.dead.add(YOU)
    missed = over.seat._missed
    over.until(lambda: under.seat.server.sockets["load"].poll(0), "a ping")
    for _ in range(50):
        over.runner.turn(0.002)
    assert over.seat.chain == {"under": under.session.id, "deep": YOU}
    assert over.seat._missed <= missed + 2, "only heartbeats count as unanswered"


def test_time_in_which_we_were_stopped_is_no_silence(pair: tuple[Stand, Stand]) -> None:
    over, under = pair
    both(over, under, lambda: over.stage.chains, "chain")
    for _ in range(3):
        time.sleep(5 * BEAT_S)  # neither runs
        both(over, under, lambda: True, "a turn")
        under.runner.turn(0.01)
    assert len(over.stage.chains) == 1


def test_down_goes_down_and_answers_come_from_below(pair: tuple[Stand, Stand]) -> None:
    over, under = pair
    assert not under.seat.down("save", save(1))
    under.stage.on = lambda peer, message: assert_true(peer and under.seat.reply(peer, Pinned(YOU, 3, 4)))
    both(over, under, lambda: over.seat.down("save", save(1)), "connection")
    both(over, under, lambda: over.stage.seen, "answer")
    assert over.stage.seen == [Pinned(YOU, 3, 4)] and over.stage.peers == [None]


# The end.


def test_drain_takes_what_is_there_then_says_so(stand: Stand) -> None:
    stand.send("load", Ping(YOU, 1))
    stand.answer()
    gate = threading.Event()
    stand.seat.submit(gate.wait, lambda _: None, lambda _: None, "job")
    stand.stage.working = True
    stand.until(lambda: stand.client.send("save", save(1)))
    assert stand.client.send("save", save(2)) and stand.client.send("save", save(3))
    assert stand.client.send("save", Drain(YOU, 6))
    stand.until(lambda: stand.seat.saves_over)
    assert len(stand.stage.seen) == 3
    stand.send("load", Ping(YOU, 2))
    assert stand.answer() == Pong(stand.session.id, 2, "probe", [stand.session.id], "draining")
    assert stand.client.send("save", save(4))
    gate.set()
    stand.until(lambda: stand.seat.backlog == 0)
    assert stand.client.recv() is None
    stand.stage.working = False
    assert stand.answer() == Drained(stand.session.id, 6)
    assert stand.stage.seen == [save(1), save(2), save(3)]  # what came later stays in the socket
    stand.send("load", Drain(YOU, 7))
    assert stand.answer() == Drained(stand.session.id, 7)


def test_stop_drains_closes_and_leaves_nothing(stand: Stand) -> None:
    stand.closed = True
    stand.stage.on = lambda peer, message: stand.runner.stop()
    stand.until(stand.connected)
    assert stand.client.send("load", Cancel(YOU, 1))
    assert stand.runner.run([stand.stage], signals=False) == 0
    assert stand.stage.closed
    assert list(stand.paths.sockets.iterdir()) == []


def test_an_end_that_takes_too_long_is_cut_short(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    stand.closed = True
    stand.stage.working = True
    stand.runner.stop()
    assert stand.runner.run([stand.stage], signals=False) == 0
    assert stand.stage.closed and "not drained in time: probe" in caplog.text


def test_stages_without_a_seat_are_a_bug(stand: Stand) -> None:
    with pytest.raises(ProtocolViolation):
        stand.runner.place([stand.stage, Probe(stand.seat, "other")])
    with pytest.raises(ProtocolViolation):
        stand.runner.place([])


def test_two_stages_share_a_loop_and_end_in_flow_order(tmp_path: Path) -> None:
    stand = Stand(tmp_path, below="under")
    under = Probe(stand.add("under"), "under")
    stand.runner.place([stand.stage, under])
    stand.until(lambda: stand.stage.chains, "chain")
    assert stand.stage.chains == [{"under": stand.session.id}]
    ended: list[str] = []

    def late_save() -> bool:
        if "probe" not in ended:
            assert stand.seat.down("save", save(len(under.seen)))
            ended.append("probe")
            return True
        return False

    stand.stage.busy = late_save  # type: ignore[method-assign]
    stand.runner.stop()
    stand.closed = True
    assert stand.runner.run([stand.stage, under], signals=False) == 0
    assert under.seen == [save(0)]  # sent while the first was ending, taken before the second ended
    stand.close()


def test_spans_of_messages_steps_and_jobs_are_recorded(tmp_path: Path) -> None:
    trace = tmp_path / "probe.trace.json"
    stand = Stand(tmp_path, trace=trace)
    stand.send("load", Cancel(YOU, 1))
    stand.seat.submit(int, lambda _: None, lambda _: None, "probe.read", nbytes=4096, chunks=2)
    with stand.seat.span("probe.part"):
        pass
    stand.until(lambda: stand.stage.seen and not stand.seat.backlog)
    stand.close()
    events = read_trace(trace)
    assert {event["name"] for event in events} == {
        "process_name",
        "probe.Cancel",
        "probe.step",
        "probe.read",
        "probe.part",
    }
    read = next(event for event in events if event["name"] == "probe.read")
    assert read["args"] == {"bytes": 4096, "chunks": 2} and read["pid"] == os.getpid() and read["tid"] != os.getpid()


# A process of its own.

WORKER = """
import dataclasses, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_runner import Probe
from lmpipe.bus import Client, Server
from lmpipe.metrics import RUNNER_COUNTERS, SEAT_COUNTERS
from lmpipe.rundir import RunDir
from lmpipe.shm.counters import Counters
from lmpipe.shm.session import Session
from lmpipe.spans import Spans
from lmpipe.stages.runner import Runner
name, paths = sys.argv[2], RunDir(Path(sys.argv[1]))
names = [*RUNNER_COUNTERS, *(f"{name}_{counter}" for counter in SEAT_COUNTERS)]
endpoints = lambda stage: {channel: paths.endpoint(stage, channel) for channel in ("load", "save")}
counters, session = Counters.create(paths.counters_of(name, os.getpid()), names), Session.create(paths.path)
runner = Runner(counters, Spans(name), drain_s=0.5, cpus=[min(os.sched_getaffinity(0))])
below = Client(endpoints(sys.argv[4])) if len(sys.argv) > 4 else None
seat = runner.seat(name, session, Server(endpoints(name), session.id), below)
stage = Probe(seat, name)
def on(peer, message):
    if type(message).__name__ == "Touch": raise ZeroDivisionError("bug")
    if type(message).__name__ == "Cancel": stage.working = True
    if peer is not None: seat.reply(peer, dataclasses.replace(message, session=session.id))
stage.on = on
print("up", flush=True)
status = runner.run([stage])
session.close()
print("closed" if stage.closed else "left", flush=True)
sys.exit(status)
"""


class Worker:
    def __init__(self, run_dir: Path, name: str, below: str = "") -> None:
        for directory in RunDir(run_dir).directories:
            directory.mkdir(mode=0o700, exist_ok=True)
        argv = [
            sys.executable,
            "-c",
            WORKER,
            str(run_dir),
            name,
            str(Path(__file__).parent),
            *([below] if below else []),
        ]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout and self.process.stdout.readline() == "up\n", self.process.communicate()[1]
        self.paths, self.name = RunDir(run_dir), name
        self.client = Client({channel: self.paths.endpoint(name, channel) for channel in ("load", "save")})

    def ask(self, channel: str, message: Message) -> Message:
        while not self.client.send(channel, message):
            time.sleep(0.005)
        while (answer := self.client.recv()) is None:
            time.sleep(0.005)
        return answer

    def sessions(self) -> list[int]:
        answer = self.ask("load", Ping(YOU, 1))
        assert isinstance(answer, Pong)
        return answer.sessions

    def end(self, number: signal.Signals | None = signal.SIGTERM) -> tuple[int, str, str]:
        self.client.close()
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


def test_sigterm_ends_in_order(tmp_path: Path) -> None:
    worker = Worker(tmp_path, "probe")
    assert worker.ask("save", Save(YOU, 1, "arena", no_chunks())).session != YOU
    assert os.sched_getaffinity(worker.process.pid) == {min(os.sched_getaffinity(0))}
    assert worker.end() == (0, "closed\n", "")
    assert list(worker.paths.sockets.iterdir()) == [] and list(worker.paths.sessions.iterdir()) == []


def test_sigterm_of_a_stage_that_never_gets_done_and_a_second_one(tmp_path: Path) -> None:
    worker = Worker(tmp_path, "probe")
    worker.ask("load", Cancel(YOU, 1))
    status, out, err = worker.end()
    assert (status, out) == (0, "closed\n") and "not drained in time" in err


def test_a_bug_ends_a_process_loudly(tmp_path: Path) -> None:
    worker = Worker(tmp_path, "probe")
    while not worker.client.send("save", Touch(YOU, no_chunks())):
        time.sleep(0.005)
    status, out, err = worker.end(None)
    assert (status, out) == (EX_SOFTWARE, "left\n") and "ZeroDivisionError: bug" in err


def test_a_stage_that_is_killed_and_started_again_is_another_one(tmp_path: Path) -> None:
    under = Worker(tmp_path, "under")
    over = Worker(tmp_path, "probe", "under")
    while len(before := over.sessions()) < 2:
        time.sleep(0.01)
    assert before[1:] == under.sessions()
    assert under.end(signal.SIGKILL)[0] == -signal.SIGKILL
    under = Worker(tmp_path, "under")
    while (after := over.sessions())[1:] in ([], before[1:]):
        time.sleep(0.01)
    assert after[0] == before[0] and after[1:] == under.sessions()
    assert over.end()[0] == 0 and under.end()[0] == 0
