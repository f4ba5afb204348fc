"""Starts after whatever came before: `up` and `down` killed at any moment, several at once, a machine that crashed,
what another version left. In the end a node runs, and what was persisted is found.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from rig import Engine, all_tiers, assert_nothing_leaks, until, until_whole

from lmpipe import native
from lmpipe.handles import Tier
from lmpipe.launch.claim import lock_holder
from lmpipe.supervisor import NodeState
from lmpipe.testing import Node

WORKERS = ("gather", "compress", "persist", "replicate")
LEASES = 8
BLOCK = 4096
SEGMENT_VERSION_AT = 8


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Not started yet."""
    node = Node(all_tiers(tmp_path))
    yield node
    node.close()


class Up:
    """`lmpipe up` as a process of the test."""

    def __init__(self, node: Node) -> None:
        self._log = node.directory / f"up-{time.monotonic_ns()}.log"
        argv = [sys.executable, "-P", "-m", "lmpipe", "up", str(node.file)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def said(self) -> str:
        """What it has said, once it has ended."""
        self.process.wait(60)
        return self._log.read_text()

    def children(self) -> list[int]:
        try:
            return list(
                map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())
            )
        except OSError:
            return []

    def kill_with_workers(self) -> None:
        """SIGKILL to everything at once: first it is stopped, so that it starts nothing any more."""
        self.process.send_signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        workers = [os.pidfd_open(pid) for pid in self.children()]
        self.process.kill()
        for pidfd in workers:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        self.said()


def living(node: Node) -> list[str]:
    return [worker for worker in WORKERS if lock_holder(node.paths.role(worker))]


def keep(node: Node, engine: Engine, seed: int) -> None:
    prompt = engine.prompt(seed, 12)
    assert engine.save(prompt).wait(0)
    assert engine.producer.flush(prompt, tiers=("ssd", "remote"))


def is_kept(engine: Engine, seed: int) -> bool:
    return engine.load(engine.prompt(seed, 12)).chunks == 12


def test_everything_killed_at_any_moment_of_up_and_of_down(node: Node) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    draw = random.Random(seed)
    node.start()
    with Engine(node.run_dir) as engine:
        until_whole(node, engine)
        keep(node, engine, 1)
        node.kill("all")
        for turn in range(6):
            up, down = Up(node), turn % 3 == 2
            if down:
                until(lambda: len(living(node)) == len(WORKERS), "all have their roles", 60)
                time.sleep(draw.random() * 0.5)
                up.process.terminate()
            time.sleep(draw.random() * (0.6 if down else 1.5))  # any moment will do
            if turn % 2:
                up.kill_with_workers()
            else:
                up.process.kill()  # alone: the next one finds workers in any state
                up.said()
        node.start()
        until_whole(node, engine)
        assert is_kept(engine, 1)
        keep(node, engine, 2)
        assert_nothing_leaks(node, LEASES)


def test_of_many_at_once_one_runs(node: Node) -> None:
    many = [Up(node) for _ in range(3)]
    try:
        until(lambda: sum(up.process.poll() is None for up in many) == 1, "all but one have ended", 60)
        running = next(up for up in many if up.process.poll() is None)
        assert lock_holder(node.paths.supervisor_lock) == running.process.pid
        for up in many:
            if up is not running:
                assert f"is running already: its supervisor has pid {running.process.pid}" in up.said()
                assert up.process.returncode == 1
        until(
            lambda: (state := NodeState.read(node.paths.up("supervisor"))) and state.state == "ready", "it is ready", 60
        )
    finally:
        for up in many:
            up.process.terminate()
            said = up.said()
    assert running.process.returncode == 0, said
    assert not node.run_dir.exists()


def forget_shared_memory(node: Node) -> None:
    """The machine went down: all of tmpfs is gone."""
    shutil.rmtree(node.run_dir)


def forget_segments(node: Node) -> None:
    for path in (node.paths.arena, node.paths.node_shm, *node.run_dir.glob("ring.*.shm")):
        path.unlink()


def forget_index(node: Node) -> None:
    for path in node.paths.index.iterdir():
        shutil.rmtree(path)


def tear_tails(node: Node) -> None:
    """What was being written to the open file when the power went: a part of a block, rubbish, the end cut off."""
    forget_shared_memory(node)
    path = max((node.directory / "ssd").glob("*.seg"))
    data = path.read_bytes()
    end = 1 + max(at for at in range(0, len(data), BLOCK) if any(data[at : at + BLOCK]))
    end = -(-end // BLOCK) * BLOCK
    with path.open("r+b") as file:
        file.seek(end)
        file.write(data[BLOCK : BLOCK + 1000] + os.urandom(3 * BLOCK))
        file.truncate(end + 2 * BLOCK + 77)


def leave_another_version(node: Node) -> None:
    """Everything there is of a version that this one does not read, and files that nobody knows."""
    info = node.info
    msgspec.structs.replace(info, version=info.version + 1).write()
    for path in (node.paths.arena, node.paths.node_shm, *node.run_dir.glob("ring.*.shm")):
        with path.open("r+b") as file:
            file.seek(SEGMENT_VERSION_AT)
            file.write(b"\x63\0\0\0")
    for worker in WORKERS:
        node.paths.up(worker).write_text('{"who": 1}')
    node.paths.up("supervisor").write_text("[]")
    for path in node.paths.sockets.iterdir():
        path.unlink()
        path.write_text("no socket")
    (node.paths.sessions / f"{7:016x}.holds").write_bytes(b"?" * 5000)
    (node.paths.index / "dram-9").mkdir()
    node.paths.counters_of("gather", 1).write_text("?")


LOSSES: list[Callable[[Node], None]] = [
    forget_shared_memory,
    forget_segments,
    forget_index,
    tear_tails,
    leave_another_version,
]


def test_what_was_persisted_is_found_after_any_boot(node: Node) -> None:
    node.start()
    with Engine(node.run_dir) as engine:
        for turn, lose in enumerate(LOSSES):
            until_whole(node, engine)
            keep(node, engine, turn)
            node.kill("all")
            until(lambda: not living(node), "nothing runs")
            lose(node)
            node.start()
            until_whole(node, engine)
            assert all(is_kept(engine, seed) for seed in range(turn + 1)), lose.__name__
            assert_nothing_leaks(node, LEASES)
        assert "arena: cannot be taken over, what it held is lost" in node.output
        assert "has segment version 99, this lmpipe reads" in node.output


def test_segments_that_go_while_workers_live_are_seen_by_the_next_supervisor(node: Node) -> None:
    node.start()
    with Engine(node.run_dir) as engine:
        until_whole(node, engine)
        keep(node, engine, 1)
        node.kill("supervisor")
        forget_segments(node)
        node.start()
        assert "not taken over: " in node.output and "there is no such segment" in node.output
        until_whole(node, engine)
        assert engine.load(engine.prompt(1, 12)).by_tier == {Tier.SSD: 12}


def test_stored_files_of_another_version_are_refused_with_the_mend(node: Node) -> None:
    node.start()
    with Engine(node.run_dir) as engine:
        until_whole(node, engine)
        keep(node, engine, 1)
    node.stop()
    path = max((node.directory / "ssd").glob("*.seg"))
    theirs = path.read_bytes()
    assert theirs[:7] == b"LMPSEGF"
    head = theirs[:8] + b"\2\0\0\0" + theirs[12 : BLOCK - 16]
    path.write_bytes(head + native.xxh3_128(head) + theirs[BLOCK:])
    up = Up(node)
    said = up.said()
    assert up.process.returncode == 1
    assert "persist died at start" in said
    assert "version 2, this lmpipe reads 1; use the lmpipe that wrote it, or give tiers.ssd another directory" in said
    assert path.exists() and not node.run_dir.exists()
