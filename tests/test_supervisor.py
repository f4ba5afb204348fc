"""The supervisor over tiny real processes, stopped and killed by real signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmpipe.child import ProcessSpec, Survivor
from lmpipe.errors import NodeError
from lmpipe.signals import SignalPipe
from lmpipe.supervisor import NodeState, Policy, ProcessState, Supervisor

PRELUDE = "import os, signal, sys, time\nready = int(sys.argv[sys.argv.index('--ready-fd') + 1])\n"
SAY = "os.write(ready, b'READY\\n')\n"
STAY = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + SAY + "while True: signal.pause()\n"
DIE_AFTER_READY = SAY + "sys.exit(3)\n"
DIE_SECOND_TIME = (
    "seen = sys.argv[1] + '.seen'\nif os.path.exists(seen): sys.exit(7)\nopen(seen, 'w').close()\n" + DIE_AFTER_READY
)


class Talk:
    """A link whose processes answer unless told to be mute. `each_ping` is called on the supervisor's thread."""

    def __init__(self) -> None:
        self.mute: set[str] = set()
        self.drained: list[frozenset[str]] = []
        self.each_ping: Callable[[str], None] = lambda name: None
        self.each_drain: Callable[[], None] = lambda: None
        self.hurried = False

    def ping(self, process: str) -> None:
        self.each_ping(process)

    def answered(self, process: str) -> bool:
        return process not in self.mute

    def drain(self, lives: Callable[[str], bool], timeout_s: float, hurry: Callable[[], bool]) -> list[str]:
        self.drained.append(frozenset(name for name in ("a", "b", "bad", "good") if lives(name)))
        self.each_drain()
        self.hurried = hurry()
        return []


class Stand:
    """A supervisor with its surroundings."""

    def __init__(self, tmp: Path, signals: SignalPipe) -> None:
        self.tmp, self.signals, self.talk = tmp, signals, Talk()
        self.lines: list[str] = []
        self.buried: list[tuple[str, int]] = []
        self.on_line: Callable[[str], None] = lambda line: None
        self.state_path = tmp / "supervisor.json"

    def spec(self, name: str, program: str) -> ProcessSpec:
        argv = (sys.executable, "-S", "-c", PRELUDE + program, str(self.tmp / name))
        return ProcessSpec(name, argv, self.tmp / f"{name}.log")

    def supervisor(
        self,
        programs: dict[str, str],
        policy: Policy | None = None,
        survivors: dict[str, Survivor] | None = None,
        former: NodeState | None = None,
    ) -> Supervisor:
        policy = policy or Policy(ready_s=20, ping_s=0.02, watchdog_s=10, budget=3, window_s=60, drain_s=1)
        specs = [self.spec(name, program) for name, program in programs.items()]

        def report(line: str) -> None:
            self.lines.append(line)
            self.on_line(line)

        def buried(name: str, pid: int) -> None:
            self.buried.append((name, pid))

        return Supervisor(
            specs,
            policy,
            self.talk,
            self.state_path,
            self.signals,
            report=report,
            buried=buried,
            tidy=lambda: None,
            survivors=survivors,
            former=former,
        )

    @contextlib.contextmanager
    def orphan(self, program: str = STAY) -> Iterator[Survivor]:
        """A process that this supervisor has not started; `program` goes on after READY."""
        read, write = os.pipe()
        argv = (sys.executable, "-S", "-c", PRELUDE + program, "--ready-fd", str(write))
        with subprocess.Popen(argv, pass_fds=(write,)) as process:
            os.close(write)
            assert os.read(read, 64) == b"READY\n"
            os.close(read)
            yield Survivor(process.pid, os.pidfd_open(process.pid))
            process.wait(30)

    def past(self, name: str, restarts: int = 0, deaths: int = 0) -> NodeState:
        """What a former supervisor said of one process."""
        now_s = time.monotonic()
        return NodeState(1, "ready", 1.0, [ProcessState(name, "ready", 1, restarts, 2.0, "before", [now_s] * deaths)])

    @property
    def state(self) -> NodeState:
        state = NodeState.read(self.state_path)
        assert state is not None
        return state

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def children() -> set[str]:
    """Every child of this process, zombies too."""
    tasks = Path("/proc/self/task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}


def end(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    before = children()  # other tests of the same run may have started a resource tracker
    signals = SignalPipe()
    yield Stand(tmp_path, signals)
    signals.close()
    assert children() == before


def test_starts_serves_and_stops_in_order(stand: Stand) -> None:
    supervisor = stand.supervisor({"a": STAY, "b": STAY})
    seen: list[NodeState] = []

    def ready() -> None:
        seen.append(stand.state)
        end()

    supervisor.run(ready)
    assert seen[0].state == "ready"
    assert [p.state for p in seen[0].processes] == ["ready", "ready"]
    assert seen[0].pid == os.getpid()
    assert stand.talk.drained == [frozenset({"a", "b"})]
    assert stand.state.state == "stopping"
    assert [(p.state, p.last_exit, p.pid) for p in stand.state.processes] == [("stopped", "exit status 0", 0)] * 2


def test_restarts_what_was_killed(stand: Stand) -> None:
    supervisor = stand.supervisor({"a": STAY, "b": STAY})
    first: list[int] = []
    states: list[str] = []

    def ready() -> None:
        first.append(supervisor.children[0].pid)
        os.kill(first[0], signal.SIGKILL)

    def line(text: str) -> None:
        if text.startswith("a: started again"):
            states.append(stand.state.state)
        if text.startswith("a: ready") and first:
            first.append(supervisor.children[0].pid)
            end()

    stand.on_line = line
    supervisor.run(ready)
    assert states == ["recovering"]
    assert first[0] != first[1]
    assert stand.buried[0] == ("a", first[0])
    assert stand.said("a: killed by SIGKILL; starting it again")
    assert [p.restarts for p in stand.state.processes] == [1, 0]


def test_gives_up_after_the_budget_and_keeps_the_rest(stand: Stand) -> None:
    supervisor = stand.supervisor({"bad": DIE_SECOND_TIME, "good": STAY})
    seen: list[NodeState] = []

    def line(text: str) -> None:
        if "stays down" in text:
            stand.talk.each_ping = lambda name: (seen.append(stand.state), end())[1]

    stand.on_line = line
    supervisor.run(lambda: None)
    assert seen[0].state == "degraded"
    bad, good = seen[0].processes
    assert (bad.state, bad.restarts, bad.last_exit) == ("down", 3, "exit status 7")
    assert (good.state, good.restarts) == ("ready", 0)
    assert stand.talk.drained == [frozenset({"good"})]


@pytest.mark.parametrize("stopped", [False, True], ids=["silent", "stopped"])
def test_kills_what_does_not_answer(stand: Stand, stopped: bool) -> None:
    supervisor = stand.supervisor({"a": STAY}, Policy(ping_s=0.02, watchdog_s=0.1, drain_s=1))

    def ready() -> None:
        if stopped:
            os.kill(supervisor.children[0].pid, signal.SIGSTOP)
        stand.talk.mute.add("a")

    def line(text: str) -> None:
        if "killed by SIGKILL (no answer for" in text:
            stand.talk.mute.clear()
        elif text.startswith("a: ready") and not stand.talk.mute and stand.said("no answer"):
            end()

    stand.on_line = line
    supervisor.run(ready)
    assert stand.state.processes[0].restarts == 1


def test_a_gap_of_its_own_is_no_silence_of_others(stand: Stand) -> None:
    supervisor = stand.supervisor({"a": STAY}, Policy(ping_s=0.02, watchdog_s=0.2, drain_s=1))
    pings: list[str] = []

    def ping(name: str) -> None:
        pings.append(name)
        if len(pings) == 1:
            stand.talk.mute.add("a")
            signal.sigtimedwait([], 0.5)  # as if it had been stopped
        elif len(pings) == 2:
            end()

    stand.talk.each_ping = ping
    supervisor.run(lambda: None)
    assert not stand.said("no answer")


def test_death_at_start_fails_with_the_last_words(stand: Stand) -> None:
    supervisor = stand.supervisor({"a": STAY, "b": "sys.exit('no such disk')"})
    with pytest.raises(NodeError, match=r"b died at start: exit status 1\nno such disk"):
        supervisor.run(lambda: None)
    assert stand.talk.drained == []


def test_not_ready_in_time_fails(stand: Stand) -> None:
    supervisor = stand.supervisor({"a": "time.sleep(100)"}, Policy(ready_s=0.1))
    with pytest.raises(NodeError, match=r"a was not ready in 0.1 s"):
        supervisor.run(lambda: None)


def test_signal_while_starting(stand: Stand) -> None:
    supervisor = stand.supervisor({"a": STAY, "b": "time.sleep(100)"})
    stand.on_line = lambda text: end() if text.startswith("a: ready") else None
    supervisor.run(lambda: pytest.fail("was never ready"))
    assert stand.talk.drained == []


def test_kills_what_does_not_stop(stand: Stand) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SAY + "while True: signal.pause()\n"
    stand.supervisor({"a": deaf}, Policy(drain_s=1, term_s=0.1)).run(end)
    assert stand.state.processes[0].last_exit == "killed by SIGKILL (did not stop)"


def test_a_stopped_process_is_woken_to_end(stand: Stand) -> None:
    supervisor = stand.supervisor({"a": STAY})

    def ready() -> None:
        os.kill(supervisor.children[0].pid, signal.SIGSTOP)
        end()

    supervisor.run(ready)
    assert stand.state.processes[0].last_exit == "exit status 0"


def test_a_second_signal_hurries_the_drain(stand: Stand) -> None:
    stand.talk.each_drain = end
    stand.supervisor({"a": STAY}).run(end)
    assert stand.talk.hurried


def test_a_state_that_cannot_be_written_ends_nothing(stand: Stand) -> None:
    stand.state_path = stand.tmp / "no such directory" / "supervisor.json"
    stand.supervisor({"a": STAY}).run(end)
    assert stand.said("No such file or directory")
    assert stand.said("a: stopped, exit status 0")


def test_state_file_that_is_no_state(tmp_path: Path) -> None:
    assert NodeState.read(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_bytes(b'{"pid": "x"}')
    assert NodeState.read(tmp_path / "bad.json") is None


def test_adopts_what_lives_and_starts_what_does_not(stand: Stand) -> None:
    seen: list[NodeState] = []

    def ready() -> None:
        seen.append(stand.state)
        end()

    with stand.orphan() as survivor:
        supervisor = stand.supervisor({"a": STAY, "b": STAY}, survivors={"a": survivor}, former=stand.past("a", 2, 1))
        supervisor.run(ready)
    a, b = seen[0].processes
    assert (a.state, a.pid, a.restarts, a.started, len(a.deaths_s)) == ("ready", survivor.pid, 2, 2.0, 1)
    assert (b.state, b.restarts, b.last_exit) == ("ready", 1, "died while there was no supervisor")
    assert stand.said(f"a: adopted, pid {survivor.pid}")
    assert stand.talk.drained == [frozenset({"a", "b"})]
    exits = [process.last_exit for process in stand.state.processes]
    assert exits == ["ended; its exit status went to who started it", "exit status 0"]


def test_an_adopted_process_that_dies_is_started_again(stand: Stand) -> None:
    def line(text: str) -> None:
        if text.startswith("a: ready"):
            end()

    stand.on_line = line
    with stand.orphan() as survivor:
        stand.supervisor({"a": STAY}, survivors={"a": survivor}).run(lambda: os.kill(survivor.pid, signal.SIGKILL))
    assert stand.buried[0] == ("a", survivor.pid)
    assert stand.said("a: ended; its exit status went to who started it; starting it again in 0.1 s")
    assert stand.state.processes[0].restarts == 1


def test_what_does_not_answer_is_not_adopted(stand: Stand) -> None:
    stand.talk.mute.add("a")

    def line(text: str) -> None:
        if text.startswith("a: killed by SIGKILL (no answer for"):
            stand.talk.mute.clear()

    stand.on_line = line
    policy = Policy(ping_s=0.02, watchdog_s=0.2, drain_s=1)
    with stand.orphan() as survivor:
        stand.supervisor({"a": STAY}, policy, {"a": survivor}).run(end)
    assert not stand.said("a: adopted")
    assert stand.said("a: ready")


def test_the_budget_goes_on(stand: Stand) -> None:
    seen: list[NodeState] = []

    def ready() -> None:
        seen.append(stand.state)
        end()

    with stand.orphan() as survivor:
        supervisor = stand.supervisor(
            {"bad": STAY, "good": STAY}, survivors={"good": survivor}, former=stand.past("bad", 7, 3)
        )
        supervisor.run(ready)
    assert seen[0].state == "degraded"
    assert [(p.state, p.restarts) for p in seen[0].processes] == [("down", 7), ("ready", 0)]
    assert stand.said("bad: died while there was no supervisor; died 4 times in 60 s and stays down")


def test_a_start_that_fails_beside_living_processes_ends_none_of_them(stand: Stand) -> None:
    alive: list[bool] = []

    def line(text: str) -> None:
        if "stays down" in text:
            alive.append(Path(f"/proc/{survivor.pid}").exists())

    stand.on_line = line
    with stand.orphan() as survivor:
        supervisor = stand.supervisor({"a": STAY, "b": "sys.exit('no such disk')"}, survivors={"a": survivor})
        supervisor.run(end)
    assert alive == [True]


def test_a_signal_while_adopting_ends_everything(stand: Stand) -> None:
    stand.talk.mute.add("a")
    stand.talk.each_ping = end
    with stand.orphan() as survivor:
        stand.supervisor({"a": STAY}, survivors={"a": survivor}).run(lambda: pytest.fail("was never ready"))
    assert stand.state.processes[0].state == "stopped"


def test_what_died_is_not_drained(stand: Stand) -> None:
    def ready() -> None:
        os.kill(supervisor.children[0].pid, signal.SIGKILL)
        supervisor.children[0].wait(10)
        end()

    supervisor = stand.supervisor({"a": STAY, "b": STAY})
    supervisor.run(ready)
    assert stand.talk.drained == [frozenset({"b"})]
