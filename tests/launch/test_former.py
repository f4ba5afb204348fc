"""What a supervisor that was killed leaves running: who is found, who is gone on with, who is ended. Real locks; the
workers here hold a role and do nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lmpipe import topology as tp
from lmpipe.index import reader_identity
from lmpipe.launch.claim import Claim, WorkerNote, take_role
from lmpipe.launch.former import Former
from lmpipe.launch.segments import Segments
from lmpipe.rundir import RunDir
from lmpipe.shm.session import SessionDir
from lmpipe.supervisor import NodeState
from lmpipe.topology import NODE_VERSION, NodeInfo, Topology

TEXT = """
name: n
run_dir: {run_dir}
tiers: {{dram: {{capacity: 1MiB, slots: 16}}}}
index: {{dram: 1MiB}}
drain_ms: 100
"""
VERSION = "7.7"

WORKER = """
import os, sys, time
from pathlib import Path
from lmpipe.launch.claim import WorkerNote, take_role
from lmpipe.rundir import RunDir
paths = RunDir(Path(sys.argv[1]))
role = take_role(paths, sys.argv[2])
if sys.argv[3]: WorkerNote(os.getpid(), 1, sys.argv[3]).write(paths.up(sys.argv[2]))
print("ok", flush=True)
time.sleep(100)
"""
SLEEPER = "import time\nprint('ok', flush=True)\ntime.sleep(100)\n"


class Place:
    """A node's run directory, claimed, with its segments; its workers are started one by one, and killed at the end."""

    def __init__(self, tmp: Path) -> None:
        self.paths = RunDir(tmp / "n")
        self.topology: Topology = tp.parse(TEXT.format(run_dir=self.paths.path), "f.yaml", tmp)
        self.claim = Claim(self.paths, "n")
        self.said: list[str] = []
        self._started: list[subprocess.Popen[str]] = []
        arena_id = Segments(self.paths, self.topology, print, lambda *_: None).build()
        (self.paths.index / "dram-1").mkdir()
        ends = {"gather": {channel: self.paths.endpoint("gather", channel) for channel in ("load", "save")}}
        self.info = NodeInfo(
            NODE_VERSION,
            self.topology,
            str(self.paths.path),
            arena_id.hex(),
            ends,
            1,
            0.0,
            reader_identity(),
            SessionDir(self.paths.path).identity(),
            VERSION,
        )
        self.info.write()
        self.publish("ready")

    def publish(self, state: str) -> None:
        self.paths.up("supervisor").write_bytes(msgspec.json.encode(NodeState(1, state, 0.0, [])))

    def worker(self, name: str = "gather", state: str = "ready") -> subprocess.Popen[str]:
        return self.start(WORKER, str(self.paths.path), name, state)

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
        self._started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ok\n"
        return process

    def node(self, former: Former, topology: Topology | None = None, version: str = VERSION) -> NodeInfo | None:
        return former.node(topology or self.topology, version, self.said.append)

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self.claim.clear(keep_dram=False)
        self.claim.release()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


@pytest.fixture
def paths(place: Place) -> RunDir:
    return place.paths


def test_goes_on_with_what_lives_and_fits(place: Place) -> None:
    worker = place.worker()
    with contextlib.closing(Former(place.paths)) as former:
        assert place.node(former) == place.info
        found = former.hand_over()
    assert [(name, survivor.pid) for name, survivor in found.items()] == [("gather", worker.pid)]
    assert worker.poll() is None
    assert place.said == []
    os.close(found["gather"].pidfd)


def test_nobody_lives(place: Place) -> None:
    worker = place.worker()
    worker.kill()
    worker.wait()
    with contextlib.closing(Former(place.paths)) as former:
        assert former.survivors == {}
        assert place.node(former) is None
        former.end(place.said.append)
    assert place.said == []


def _without(name: str) -> Any:
    return lambda place: getattr(place.paths, name).unlink()


def _changed_note(**changes: Any) -> Any:
    return lambda place: msgspec.structs.replace(place.info, **changes).write()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_changed_note(lmpipe="7.6"), "it is lmpipe 7.6 with LMDB .*, this is 7.7 with LMDB"),
        (_changed_note(index_identity="LMDB 0.1"), "it is lmpipe 7.7 with LMDB 0.1, this is"),
        (_changed_note(version=NODE_VERSION + 1), f"version {NODE_VERSION + 1}, this lmpipe speaks {NODE_VERSION}"),
        (_changed_note(arena_id="00" * 16), "wanted is 0000"),
        (_changed_note(sessions_identity="0:0"), "is not the directory that the workers know"),
        (_without("node_json"), "no lmpipe node at"),
        (_without("arena"), "there is no such segment"),
        (_without("node_shm"), "there is no such segment"),
        (lambda place: (place.paths.index / "dram-1").rmdir(), "the index of dram is gone"),
        (lambda place: place.publish("draining"), "it was being stopped"),
        (lambda place: place.publish("stopping"), "it was being stopped"),
        (lambda place: place.worker("compress"), "the topology has no process compress"),
    ],
)
def test_does_not_go_on_with_what_does_not_fit(place: Place, change: Any, reason: str) -> None:
    worker = place.worker()
    change(place)
    with contextlib.closing(Former(place.paths)) as former:
        assert place.node(former) is None
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(place.said)
        assert worker.poll() is None
        former.end(place.said.append)
    assert worker.wait() == -signal.SIGTERM


def test_names_what_was_changed_in_the_topology(place: Place) -> None:
    place.worker()
    topology = tp.parse(
        TEXT.format(run_dir=place.paths.path).replace("1MiB, slots", "2MiB, slots") + "watchdog_ms: 9000\n",
        "f.yaml",
        place.paths.path,
    )
    with contextlib.closing(Former(place.paths)) as former:
        assert place.node(former, topology) is None
    wanted = "the topology was changed: tiers.dram.capacity, watchdog_ms"
    assert place.said == [f"what a former supervisor left running is not taken over: {wanted}"]


def test_who_was_starting_is_ended_and_the_rest_is_gone_on_with(place: Place) -> None:
    gather, starting, silent = place.worker(), place.worker("persist", "starting"), place.worker("compress", "")
    with contextlib.closing(Former(place.paths)) as former:
        assert place.node(former) == place.info
        assert [*former.survivors] == ["gather"]
    assert (starting.wait(), silent.wait()) == (-signal.SIGTERM, -signal.SIGTERM)
    assert gather.poll() is None


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_ends_everybody(place: Place, stopped: bool) -> None:
    worker = place.worker()
    producer = place.start(
        f"from lmpipe.shm.session import Session\nsession = Session.create({str(place.paths.path)!r})\n" + SLEEPER
    )
    if stopped:
        worker.send_signal(signal.SIGSTOP)
    with contextlib.closing(Former(place.paths)) as former:
        former.end(place.said.append)
    assert worker.wait() == -signal.SIGTERM
    assert place.said == [
        f"gather: pid {worker.pid} was left by a supervisor that died; ending it",
        "not drained in time: gather",  # it is no gather that would answer
    ]
    assert producer.poll() is None
    place.claim.remove_leftovers()
    assert len(SessionDir(place.paths.path).ids()) == 1, "the producer's session stays"


def test_never_believes_a_pid(place: Place) -> None:
    stranger = place.start(SLEEPER)
    WorkerNote(stranger.pid, 1, "ready").write(place.paths.up("gather"))  # nobody has the role
    os.close(take_role(place.paths, "compress"))
    WorkerNote(stranger.pid, 1, "ready").write(place.paths.up("compress"))  # nobody has it any more
    persist = place.worker("persist")
    WorkerNote(stranger.pid, 1, "ready").write(place.paths.up("persist"))  # somebody else has it
    with contextlib.closing(Former(place.paths)) as former:
        assert {name: survivor.pid for name, survivor in former.survivors.items()} == {"persist": persist.pid}
        assert place.node(former) is None
        former.end(place.said.append)
    assert persist.wait() == -signal.SIGTERM
    assert stranger.poll() is None
