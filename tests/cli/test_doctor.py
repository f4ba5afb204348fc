"""What the doctor finds: each condition is shown to it, on a machine made of files or on a node of real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from lmpipe import topology as tp
from lmpipe.cli.doctor import contents, disk, leftovers, machine
from lmpipe.cli.doctor import node as running
from lmpipe.cli.doctor.finding import Finding, Level
from lmpipe.handles import SessionId, Tier
from lmpipe.launch.devices import Lack
from lmpipe.launch.overview import ProcessView, overview
from lmpipe.lifecycle import SlotEvent
from lmpipe.rundir import RunDir
from lmpipe.settings import SsdTier
from lmpipe.shm.node import NodeWords
from lmpipe.shm.pages import PageSegment
from lmpipe.shm.session import SessionDir
from lmpipe.shm.slots import SlotOwner
from lmpipe.shm.table import SlotTable
from lmpipe.testing import Node

Lmpipe = Callable[..., tuple[int, str, str]]
GIB = 1 << 30
TMPFS = "25 24 0:23 / /dev/shm rw,relatime shared:3 - tmpfs tmpfs rw,size=24684084k,huge=never"
ROOT = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard"


def topology(text: str = "") -> tp.Topology:
    return tp.parse(f"name: a\ntiers: {{dram: {{capacity: 1GiB}}}}\n{text}", "f.yaml", Path("/base"))


def verdict(finding: Finding) -> tuple[str, bool]:
    """The level, and whether it says what to do."""
    return finding.level.value, bool(finding.todo)


OK, WARN, FAIL = ("ok", False), ("warn", True), ("fail", True)


# The machine.


@pytest.mark.parametrize(
    ("line", "total", "free", "wanted", "expected"),
    [
        (TMPFS, 20 * GIB, 10 * GIB, GIB, OK),
        (TMPFS, 20 * GIB, 10 * GIB, 9 * GIB, WARN),
        (TMPFS, 20 * GIB, 10 * GIB, 11 * GIB, FAIL),
        (TMPFS, 64 << 20, 64 << 20, 0, WARN),  # docker's default
        (TMPFS.replace(" rw,relatime", " ro,relatime"), 20 * GIB, 10 * GIB, GIB, FAIL),
        (TMPFS.replace("tmpfs tmpfs", "ext4 /dev/vda"), 20 * GIB, 10 * GIB, GIB, WARN),
    ],
)
def test_shared_memory(line: str, total: int, free: int, wanted: int, expected: tuple[str, bool]) -> None:
    mount = machine.mount_of(Path("/dev/shm/lmpipe-0"), f"{ROOT}\n{line}\n")
    assert mount.point == Path("/dev/shm")
    assert verdict(machine.shared_memory(mount, total, free, wanted)) == expected


def test_gpus() -> None:
    with_gpus, lack = topology("engines: {devices: [0, 1]}"), Lack("no driver", "install one")
    assert machine.gpus(None, None) == machine.gpus(topology(), None) == []
    assert [verdict(finding) for finding in machine.gpus(with_gpus, None)] == [OK]
    assert [verdict(finding) for finding in machine.gpus(with_gpus, lack)] == [FAIL]
    soft = {"nofile": -1, "fsize": -1, "as": -1, "memlock": 8 << 20}
    for wanted, expected in ((with_gpus, WARN), (topology(), OK)):
        assert verdict(machine.limits(wanted, soft)[-1]) == expected
    assert verdict(machine.limits(with_gpus, {**soft, "memlock": -1})[-1]) == OK


def test_the_mount_is_the_nearest_one() -> None:
    assert machine.mount_of(Path("/home/x"), f"{ROOT}\n{TMPFS}\n").kind == "ext4"
    assert machine.mount_of(Path("/dev/shmoo"), f"{ROOT}\n{TMPFS}\n").kind == "ext4"


@pytest.mark.parametrize(
    ("available", "limit", "wanted", "expected"),
    [
        (10 * GIB, 0, GIB, OK),
        (10 * GIB, 0, 9 * GIB, WARN),
        (10 * GIB, 0, 11 * GIB, FAIL),
        (10 * GIB, 2 * GIB, 3 * GIB, FAIL),
        (10 * GIB, 4 * GIB, GIB, OK),
    ],
)
def test_memory(available: int, limit: int, wanted: int, expected: tuple[str, bool]) -> None:
    assert verdict(machine.memory(available, limit, wanted)) == expected


def test_the_limit_of_a_control_group_is_the_least_above_it(tmp_path: Path) -> None:
    (tmp_path / "pod" / "box").mkdir(parents=True)
    (tmp_path / "memory" / "box").mkdir(parents=True)
    assert machine.cgroup_limit(tmp_path, "0::/pod/box\n") == 0
    (tmp_path / "pod" / "box" / "memory.max").write_text("max\n")
    (tmp_path / "pod" / "memory.max").write_text(f"{3 * GIB}\n")
    assert machine.cgroup_limit(tmp_path, "0::/pod/box\n") == 3 * GIB
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{(1 << 63) - 4096}\n")
    (tmp_path / "memory" / "box" / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    assert machine.cgroup_limit(tmp_path, "4:cpu,memory:/box\n3:cpuset:/\n") == GIB
    assert machine.cgroup_limit(tmp_path, "4:memory:/\n") == 0


def test_limits() -> None:
    free = {"nofile": 65536, "memlock": -1, "fsize": -1, "as": -1}
    assert {verdict(f) for f in machine.limits(topology(), free)} == {OK}
    for name, value in (("nofile", 256), ("fsize", 1 << 20), ("as", 1 << 20)):
        found = machine.limits(topology(), free | {name: value})
        assert [verdict(f) for f in found].count(FAIL) == 1, name
    assert {verdict(f) for f in machine.limits(None, free | {"fsize": 1 << 20})} == {OK}


def test_huge_pages_numa_and_clock(tmp_path: Path) -> None:
    mount, enabled = machine.mount_of(Path("/dev/shm"), TMPFS), tmp_path / "shmem_enabled"
    enabled.write_text("always within_size advise [never] deny force\n")
    assert verdict(machine.huge_pages(mount, enabled, 64 * GIB)) == WARN
    assert verdict(machine.huge_pages(mount, enabled, GIB)) == OK
    enabled.write_text("always within_size advise never deny [force]\n")
    assert verdict(machine.huge_pages(mount, enabled, 64 * GIB)) == OK
    assert verdict(machine.huge_pages(mount, tmp_path / "none", 0)) == OK
    (tmp_path / "node0").mkdir()
    assert verdict(machine.numa(topology(), tmp_path)) == OK
    (tmp_path / "node1").mkdir()
    assert verdict(machine.numa(topology(), tmp_path)) == WARN
    assert verdict(machine.numa(topology("processes: [{name: g, stages: [gather], cpus: [0]}]"), tmp_path)) == OK
    source = tmp_path / "clocksource"
    for name, expected in (("tsc", OK), ("hpet", WARN)):
        source.write_text(f"{name}\n")
        assert verdict(machine.clock(source)) == expected
    assert verdict(machine.kernel("6.1.0-18-amd64")) == OK
    assert verdict(machine.kernel("5.10.0")) == WARN


def test_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.processors(None, {0, 1}).level is not Level.FAIL
    bound = topology("processes: [{name: g, stages: [gather], cpus: [7]}]")
    assert verdict(machine.processors(bound, {0, 1})) == FAIL
    plain = {"level": "generic", "levels": "generic", "copy": "memcpy"}
    monkeypatch.setattr("lmpipe.native.features", lambda: plain)
    assert verdict(machine.processors(None, {0, 1})) == WARN


# The disk.


def test_a_trial_of_a_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "TRIAL_BYTES", 16 << 20)
    seen = disk.trial(tmp_path)
    assert seen.read > 0 and seen.write > 0
    found = disk.examine(SsdTier(str(tmp_path / "ssd"), 1 << 30, segment=1 << 20), measure=True)
    assert [f.check for f in found] == ["SSD room", "O_DIRECT", "SSD speed"]
    assert not list(tmp_path.iterdir())


def test_slow_disks_and_such_without_room_or_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [verdict(f) for f in disk.judge(disk.Trial(True, 1e9, 1e9))] == [OK, OK]
    assert [verdict(f) for f in disk.judge(disk.Trial(False, 1e9, 1e8))] == [WARN, WARN]
    assert [verdict(f) for f in disk.examine(SsdTier(str(tmp_path), 1 << 60), measure=False)] == [WARN]
    monkeypatch.setattr(disk, "trial", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert verdict(disk.examine(SsdTier(str(tmp_path), 1 << 30), measure=True)[-1]) == FAIL
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert [verdict(f) for f in disk.examine(SsdTier(str(tmp_path), 1 << 30), measure=True)] == [FAIL]


# What the dead left.


def test_leftovers(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    assert leftovers.run_dirs(parent, [tmp_path / "none"]) == []
    for name in ("dead", "kept", "dead.pages", "empty"):
        (parent / name).mkdir(parents=True)
    assert [path.name for path in leftovers.run_dirs(parent, [])] == ["dead", "empty", "kept"]
    (parent / "dead" / "node.json").write_text("x" * 8192)
    (parent / "kept" / "arena.shm").write_text("x" * 8192)
    found = leftovers.examine(leftovers.run_dirs(parent, []))
    assert [verdict(f) for f in found] == [WARN, WARN]
    assert "node that died" in found[0].seen and "was kept" in found[1].seen
    assert [verdict(f) for f in leftovers.examine([parent / "empty"])] == [OK]


def test_memory_of_dead_engines(tmp_path: Path) -> None:
    paths = RunDir(tmp_path / "run")
    paths.path.mkdir()
    with PageSegment.create(paths.pages, 1 << 16) as pages:
        assert [verdict(f) for f in leftovers.examine([paths.path])] == [OK]
        left = pages.path.with_name(f"{5:016x}.pages")
        left.write_bytes(bytes(8192))
        (found,) = leftovers.examine([paths.path])
        assert verdict(found) == WARN and str(paths.pages) in found.seen and left.exists()
        left.unlink()


# A node.


def test_a_node_that_is_well(node: Node, lmpipe: Lmpipe) -> None:
    status, out, _ = lmpipe("doctor", node.file, "--json", "--no-disk")
    found = {f["check"]: f for f in json.loads(out)}
    assert status == 0, out
    for check in ("node", "lmpipe version", "index readers", "answer of gather", "wall clock", "arena", "index dram"):
        assert found[check]["level"] == "ok" or check == "answer of gather", found[check]
    assert not [f for f in found.values() if f["level"] == "ok" and f["todo"]]
    status, out, _ = lmpipe("doctor", node.file, "--no-disk")
    assert status == 0 and "answer of gather" in out and "Linux" in out
    assert lmpipe("doctor", node.run_dir, "--no-disk")[0] == 0
    assert lmpipe("doctor", "nosuch")[0] == 3


def test_another_lmpipe_another_lmdb_another_topology(node: Node, lmpipe: Lmpipe, tmp_path: Path) -> None:
    info = node.info
    assert verdict(running.lmpipe_version(info)) == OK and verdict(running.index_identity(info)) == OK
    assert verdict(running.lmpipe_version(msgspec.structs.replace(info, lmpipe="0.0.1"))) == FAIL
    other = msgspec.structs.replace(info, index_identity="LMDB 0.8.0, pid namespace 3")
    assert verdict(running.index_identity(other)) == WARN
    assert [f.check for f in contents.examine(other, overview(info))] == ["arena"]  # its index is not for us to open
    other.write()
    try:
        tokens = tmp_path / "tokens.json"
        tokens.write_text("[1, 2, 3]")
        status, _, err = lmpipe("lookup", tokens, node.run_dir, "--namespace", "00" * 32)
        assert status == 1 and "look it up where the node runs" in err
    finally:
        info.write()
    file = tmp_path / "changed.yaml"
    file.write_text(node.file.read_text().replace("32MiB", "24MiB"))
    status, out, _ = lmpipe("doctor", file, "--no-disk", "--json")
    assert status == 0
    assert [f["level"] for f in json.loads(out) if f["check"] == "topology"] == ["warn"]


def test_a_node_of_another_version(tmp_path: Path, lmpipe: Lmpipe) -> None:
    (tmp_path / "node.json").write_text('{"version": 99}')
    status, out, _ = lmpipe("doctor", "--run-dir", tmp_path, "--json")
    assert status == 1
    (found,) = [f for f in json.loads(out) if f["level"] == "fail"]
    assert found["check"] == "lmpipe version" and "99" in found["seen"]


def test_what_a_supervisor_says(node: Node) -> None:
    info, seen = node.info, overview(node.info)
    replace = msgspec.structs.replace
    (gather,) = seen.processes
    for state, expected in (("ready", OK), ("starting", WARN), ("degraded", FAIL), ("orphaned", FAIL), ("dead", FAIL)):
        assert verdict(running.state(info, replace(seen, state=state))) == expected
    assert running.deaths(info, seen) == []
    died = replace(seen, processes=[replace(gather, restarts=3, last_exit="signal 9")])
    assert [verdict(f) for f in running.deaths(info, died)] == [WARN]
    (tier,) = seen.tiers
    assert contents.tiers(seen) == []
    assert [verdict(f) for f in contents.tiers(replace(seen, tiers=[replace(tier, trouble="read-only")]))] == [FAIL]
    asked = {"engine.1234-7": {"lookups_by_message": 4, "lookups_unanswered": 1}, "gather-2": {"turns": 4}}
    assert [verdict(f) for f in running.asking(replace(seen, counters=asked))] == [WARN]


def test_a_process_that_hangs(node: Node) -> None:
    info = msgspec.structs.replace(node.info, topology=msgspec.structs.replace(node.info.topology, watchdog_ms=300))
    assert running.answers(node.info, "gather").level is not Level.FAIL
    pid = node.kill("gather", signal.SIGSTOP)
    try:
        assert verdict(running.answers(info, "gather")) == FAIL
    finally:
        os.kill(pid, signal.SIGCONT)


def process(pid: int, uptime_s: float) -> ProcessView:
    return ProcessView("gather", "ready", pid, uptime_s, 0, "", ["gather"])


@pytest.mark.parametrize(("stepped_s", "expected"), [(0, [OK]), (3600, [WARN]), (-3600, [WARN])])
def test_a_clock_that_was_set(tmp_path: Path, stepped_s: int, expected: list[tuple[str, bool]]) -> None:
    age_s = 7200
    started = (time.clock_gettime(time.CLOCK_BOOTTIME) - age_s) * os.sysconf("SC_CLK_TCK")
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "stat").write_text(f"5 (a (b) c) S {' '.join(['0'] * 18)} {int(started)} 0 0\n")
    assert [verdict(f) for f in running.wall_clock([process(5, age_s + stepped_s)], tmp_path)] == expected
    assert running.wall_clock([process(6, age_s)], tmp_path) == []


def test_files_that_run_out(tmp_path: Path) -> None:
    (tmp_path / "5" / "fd").mkdir(parents=True)
    (tmp_path / "5" / "limits").write_text(
        "Max open files            10                   20                   files\n"
    )
    assert running.descriptors(process(5, 1), tmp_path) == running.descriptors(process(6, 1), tmp_path) == []
    for number in range(9):
        (tmp_path / "5" / "fd" / str(number)).touch()
    assert [verdict(f) for f in running.descriptors(process(5, 1), tmp_path)] == [FAIL]


def test_slots_of_the_dead_and_a_full_table(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "SWEEP_S", 0.01)
    path = node.run_dir / "other-arena.shm"
    owner = SlotOwner.create(path, 1 << 20, 4)
    table = SlotTable(owner.segment)
    alive = SessionDir(node.run_dir).alive
    try:
        assert verdict(contents.arena(table, alive)) == OK
        slot = owner.lease(4096, SessionId(77))
        assert slot is not None and verdict(contents.arena(table, lambda _: True)) == OK
        assert verdict(contents.arena(table, alive)) == FAIL
        for _ in range(3):
            assert owner.lease(4096, SessionId(77))
        assert verdict(contents.arena(table, lambda _: True)) == WARN
        assert table.advance(slot, SlotEvent.OPEN)
        assert verdict(contents.arena(table, alive)) == FAIL
    finally:
        owner.close()
        path.unlink()


def test_an_index_that_is_absent_broken_or_full(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    words = NodeWords.attach(node.paths.node_shm)
    try:
        assert verdict(contents.index(node.info, Tier.DRAM, words)) == OK
        assert verdict(contents.index(node.info, Tier.SSD, words)) == WARN  # there is none
        monkeypatch.setattr(contents, "FULL_PART", -1.0)
        assert verdict(contents.index(node.info, Tier.DRAM, words)) == WARN
        (data,) = node.paths.index.glob("dram-*/data.mdb")
        hidden = data.rename(data.with_name("hidden"))
        try:
            assert verdict(contents.index(node.info, Tier.DRAM, words)) == FAIL
        finally:
            hidden.rename(data)
    finally:
        words.close()


def test_an_arena_that_cannot_be_mapped(node: Node) -> None:
    info = msgspec.structs.replace(node.info, arena_id="00" * 16)
    assert [verdict(f) for f in contents.examine(info, overview(node.info))] == [FAIL]
