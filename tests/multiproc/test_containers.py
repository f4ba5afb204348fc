"""Engines and nodes in containers: another pid namespace, another /dev/shm. Made with `unshare`; skipped where that is
not permitted.
"""

from __future__ import annotations

import functools
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rig import DRAM_ONLY, WAIT_S, Engine, EngineProcess, assert_nothing_leaks, holds, slot_states, until

from lmpipe.launch.counter_files import read_counters
from lmpipe.launch.stop import stop_node, tidy_up
from lmpipe.lifecycle import SlotState
from lmpipe.rundir import RunDir
from lmpipe.supervisor import NodeState
from lmpipe.testing import Node, small_topology

CHUNKS = 6
PATIENT = DRAM_ONLY | {"engines": {"leases": 8, "lookup_deadline_ms": 20_000}}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(PATIENT) as node:
        yield node


@functools.cache
def unshare(*kinds: str) -> tuple[str, ...]:
    """The command that gives what follows it namespaces of its own; skips the test where it does not work."""
    for user in ((), ("--user", "--map-root-user")):
        command = ("unshare", *user, *kinds)
        try:
            if not subprocess.run([*command, "true"], capture_output=True).returncode:
                return command
        except FileNotFoundError:
            break
    pytest.skip(f"`unshare {' '.join(kinds)}` is not permitted here")


def own_pids() -> tuple[str, ...]:
    """A container's first process: it has pid 1, and dies with the command."""
    return unshare("--pid", "--fork", "--kill-child", "--mount-proc")


def in_mounts(mount: str) -> list[str]:
    """A container that has done `mount`, a line of shell, before anything else."""
    return [*unshare("--mount"), "sh", "-c", f'{mount} && exec "$@"', "sh"]


def test_an_engine_in_another_pid_namespace_has_right_results(node: Node) -> None:
    with EngineProcess(node) as here, EngineProcess(node, through=own_pids()) as inside:
        assert inside.state == "ready"
        assert here.ask("save", seed=1, chunks=CHUNKS)["saved"] == CHUNKS
        assert inside.ask("load", seed=1, chunks=CHUNKS)["chunks"] == CHUNKS  # every byte is compared
        assert inside.ask("save", seed=2, chunks=CHUNKS)["saved"] == CHUNKS
        assert here.ask("load", seed=2, chunks=CHUNKS)["chunks"] == CHUNKS
        assert inside.ask("stats")["lookups_by_message"] and "lookups_by_message" not in here.ask("stats")
        assert here.ask("stats")["loaded_tokens"] == inside.ask("stats")["loaded_tokens"]


def test_two_containers_whose_engines_have_the_same_pid(node: Node) -> None:
    through = own_pids()
    with EngineProcess(node, through=through) as a, EngineProcess(node, through=through) as b:
        assert a.ask("save", seed=3, chunks=CHUNKS)["saved"] == CHUNKS
        assert b.ask("hold", seed=3, chunks=CHUNKS) == a.ask("hold", seed=3, chunks=CHUNKS) == CHUNKS
        a.kill()
        until(lambda: slot_states(node)[SlotState.LEASED] == 8, "leases of the dead come back, the living's stay")
        assert len(holds(node)) == CHUNKS
        assert b.ask("load_held") == CHUNKS


@pytest.mark.parametrize("mapped", [False, True])
def test_what_an_engine_in_a_container_had_comes_back_when_it_is_killed(node: Node, mapped: bool) -> None:
    seed = 4 + mapped
    with EngineProcess(node, through=own_pids(), mapped=mapped) as inside:
        assert inside.ask("save", seed=seed, chunks=CHUNKS)["saved"] == CHUNKS
        assert inside.ask("hold", seed=seed, chunks=CHUNKS) == len(holds(node)) == CHUNKS
        inside.kill()
    assert_nothing_leaks(node, 0)
    with EngineProcess(node) as here:
        assert here.ask("load", seed=seed, chunks=CHUNKS)["chunks"] == CHUNKS


def test_counters_of_an_engine_in_a_container_stay_while_it_lives(node: Node) -> None:
    def engines() -> set[str]:
        return {path.stem for path, values in read_counters(node.paths) if values.get("lookups")}

    until(lambda: not engines(), "nobody is left of the tests before")
    with EngineProcess(node, through=own_pids()) as inside:
        inside.ask("found", seed=1, chunks=CHUNKS)
        until(engines, "the engine's counters are there")
        living = engines()
        assert [name.rpartition("-")[2] for name in living] == ["1"]  # its pid, where it lives
        with EngineProcess(node) as here:
            here.ask("found", seed=1, chunks=CHUNKS)
            until(lambda: len(engines()) == 2, "both are there")
            here.kill()
        until(lambda: len(engines()) == 1, "the dead one's are gone: the supervisor has looked who lives")
        assert engines() == living
        inside.kill()
        until(lambda: not engines(), "they go with it")


@pytest.mark.parametrize(
    ("mount", "said"),
    [
        ("mount --bind $RUN $RUN && mount -o remount,ro,bind $RUN", "Read-only file system"),
        ("mount -t tmpfs -o mode=700 none $RUN/sessions", "is not the node's"),
    ],
    ids=["read-only", "not shared"],
)
def test_an_engine_that_cannot_attach_warns_once_and_computes_on(
    node: Node, mount: str, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN", str(node.run_dir))
    with EngineProcess(node, through=in_mounts(mount), wait_s=2.0) as inside:
        assert inside.state in ("absent", "refused")
        for _ in range(20):
            assert inside.ask("found", seed=1, chunks=CHUNKS) == 0
        assert inside.ask("save", seed=1, chunks=CHUNKS)["saved"] == 0
    warned = capfd.readouterr().err.splitlines()
    assert len([line for line in warned if "nothing will be cached" in line]) == 1, warned
    assert any(said in line for line in warned), warned
    assert_nothing_leaks(node, 0)


def test_an_index_that_may_only_be_read_is_asked_for(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDB would read it without locks there."""
    monkeypatch.setenv("RUN", str(node.run_dir))
    mount = "mount --bind $RUN/index $RUN/index && mount -o remount,ro,bind $RUN/index"
    with EngineProcess(node, through=in_mounts(mount)) as inside:
        assert inside.state == "ready"
        assert inside.ask("save", seed=6, chunks=CHUNKS)["saved"] == CHUNKS
        assert inside.ask("load", seed=6, chunks=CHUNKS)["chunks"] == CHUNKS
        assert inside.ask("stats")["lookups_by_message"]


def test_a_node_in_a_container_serves_an_engine_outside(tmp_path: Path) -> None:
    file, paths = tmp_path / "topology.yaml", RunDir(Path(f"/dev/shm/lmpipe-test-{secrets.token_hex(6)}"))
    plain = small_topology(paths.path, tmp_path) | PATIENT
    file.write_text(yaml.safe_dump(plain | {"tiers": {"dram": {"capacity": "8MiB"}}}))
    with subprocess.Popen([*own_pids(), sys.executable, "-P", "-m", "lmpipe", "up", str(file)]) as up:
        try:
            until(lambda: (state := NodeState.read(paths.up("supervisor"))) and state.state == "ready", "it is up")
            with Engine(paths.path) as engine:
                prompt = engine.prompt(1, CHUNKS)
                assert engine.save(prompt).wait(0)
                assert engine.load(prompt).chunks == CHUNKS
                assert engine.producer.stats()["lookups_by_message"]
            assert stop_node(paths, keep_dram=False, timeout_s=WAIT_S)
            assert up.wait(WAIT_S) == 0
        finally:
            up.kill()
            up.wait()
            if paths.path.exists():
                tidy_up(paths, keep_dram=False, report=print)


@pytest.mark.parametrize(
    ("options", "said"),
    [("size=4m,mode=700", "--shm-size"), ("ro,mode=700", "Read-only file system; choose another run_dir")],
    ids=["tiny", "read-only"],
)
def test_a_node_without_room_says_what_it_needs(tmp_path: Path, options: str, said: str) -> None:
    file, shm = tmp_path / "topology.yaml", tmp_path / "shm"
    shm.mkdir()
    file.write_text(f"name: tiny\nrun_dir: {shm}/run\ntiers: {{dram: {{capacity: 8MiB}}}}\n")
    through = in_mounts(f"mount -t tmpfs -o {options} none {shm}")
    up = subprocess.run(
        [*through, sys.executable, "-P", "-m", "lmpipe", "up", str(file)], capture_output=True, text=True, timeout=60
    )
    assert up.returncode == 1, up
    assert said in up.stderr and "Traceback" not in up.stderr, up.stderr
