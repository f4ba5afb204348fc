"""A supervisor that is killed and started again goes on with the workers that live; engines notice nothing of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rig import WAIT_S, Engine, all_tiers, assert_nothing_leaks, until, until_whole

from lmpipe.handles import Tier
from lmpipe.launch.claim import lock_holder
from lmpipe.launch.overview import overview
from lmpipe.testing import Node

WORKERS = ("gather", "compress", "persist", "replicate")
LEASES = 8
QUIET: dict[str, int] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(all_tiers(tmp_path)) as node:
        yield node


@pytest.fixture
def engine(node: Node) -> Iterator[Engine]:
    with Engine(node.run_dir) as engine:
        until_whole(node, engine)
        yield engine


def pids(node: Node) -> dict[str, int]:
    return {worker: node.pid(worker) for worker in WORKERS}


def restarts(node: Node) -> dict[str, int]:
    return {process.name: process.restarts for process in node.status().processes}


def test_the_workers_that_live_are_gone_on_with(node: Node, engine: Engine) -> None:
    before, attachment = pids(node), engine.producer._link.attachment
    first = engine.prompt(1, 8)
    assert engine.save(first).wait(0)
    node.kill("supervisor")
    seen = overview(node.info)
    assert (seen.state, seen.supervisor_pid) == ("orphaned", 0)
    assert {process.name: (process.state, process.pid) for process in seen.processes} == {
        name: ("ready", pid) for name, pid in before.items()
    }
    second = engine.prompt(2, 8)
    assert engine.save(second).wait(0)
    node.start()
    assert pids(node) == before
    assert set(restarts(node).values()) == {0}
    assert engine.producer._link.attachment is attachment, "it has not even registered anew"
    for prompt in (first, second):
        assert engine.load(prompt).by_tier == {Tier.DRAM: 8}
        assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
    assert node.info.supervisor_pid == node.pid("supervisor")
    victim = node.kill("persist")
    node.wait_restarted("persist", victim)
    assert restarts(node)["persist"] == 1, "who is adopted is watched"
    until_whole(node, engine)
    assert_nothing_leaks(node, LEASES)


def test_what_died_meanwhile_is_started_and_what_is_silent_is_ended(node: Node, engine: Engine) -> None:
    before = pids(node)
    prompt = engine.prompt(1, 8)
    assert engine.save(prompt).wait(0)
    assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
    node.kill("supervisor")
    os.kill(before["persist"], signal.SIGKILL)
    os.kill(before["compress"], signal.SIGSTOP)
    until(lambda: not lock_holder(node.paths.role("persist")), "persist is dead")
    states = {process.name: process.state for process in overview(node.info).processes}
    assert states == dict.fromkeys(WORKERS, "ready") | {"persist": "dead"}
    node.start()
    after = pids(node)
    assert {worker for worker in WORKERS if after[worker] != before[worker]} == {"persist", "compress"}
    assert "persist: died while there was no supervisor" in node.output
    assert "compress: killed by SIGKILL (no answer for" in node.output
    until_whole(node, engine)
    engine.drop_from(prompt, Tier.DRAM)
    assert engine.load(prompt).by_tier == {Tier.SSD: 8}
    assert_nothing_leaks(node, LEASES)


def test_supervisors_killed_at_any_moment_while_they_adopt(node: Node, engine: Engine) -> None:
    before = pids(node)
    prompt = engine.prompt(1, 8)
    assert engine.save(prompt).wait(0)
    draw = random.Random(5)
    node.kill("supervisor")
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-P", "-m", "lmpipe", "up", str(node.file)], **QUIET) as up:
            with contextlib.suppress(subprocess.TimeoutExpired):
                up.wait(draw.random() * 1.5)  # any moment will do
            up.kill()
        assert engine.load(prompt).chunks == 8
    node.start()
    assert pids(node) == before, "no supervisor has done anything to a worker that lives"
    assert_nothing_leaks(node, LEASES)


def test_of_many_at_once_one_supervises(node: Node, engine: Engine) -> None:
    before = pids(node)
    prompt = engine.prompt(1, 8)
    assert engine.save(prompt).wait(0)
    node.kill("supervisor")
    argv = [sys.executable, "-P", "-m", "lmpipe", "up", str(node.file)]
    with contextlib.ExitStack() as undo:
        many = [undo.enter_context(subprocess.Popen(argv, **QUIET | {"stderr": subprocess.PIPE})) for _ in range(3)]
        undo.callback(lambda: [up.kill() for up in many])
        until(lambda: sum(up.poll() is None for up in many) == 1, "all but one have ended")
        running = next(up for up in many if up.poll() is None)
        until(lambda: lock_holder(node.paths.supervisor_lock) == running.pid)
        for up in many:
            if up is not running:
                said = up.communicate()[1].decode()
                assert (up.returncode, f"its supervisor has pid {running.pid}" in said) == (1, True), said
        assert {worker: lock_holder(node.paths.role(worker)) for worker in WORKERS} == before
        assert engine.load(prompt).by_tier == {Tier.DRAM: 8}
        running.kill()
    node.start()
    assert pids(node) == before


def test_a_changed_topology_ends_them_in_order_and_loses_nothing(node: Node, engine: Engine) -> None:
    before = pids(node)
    prompt = engine.prompt(1, 8)
    ids = engine.prefill(prompt)
    assert engine.send(prompt, ids).wait(WAIT_S)  # it need not be persisted yet
    node.kill("supervisor")
    plain = yaml.safe_load(node.file.read_text())
    plain["tiers"]["dram"]["slots"] = 1024
    node.file.write_text(yaml.safe_dump(plain))
    node.start()
    assert "not taken over: the topology was changed: tiers.dram.slots" in node.output
    assert not set(pids(node).values()) & set(before.values())
    until_whole(node, engine)
    assert engine.load(prompt).by_tier == {Tier.SSD: 8}, "it went on to the tiers below before the arena was dropped"
    engine.memory.free(ids)
    assert_nothing_leaks(node, LEASES)


def test_workers_on_their_way_out_are_not_adopted(node: Node, engine: Engine) -> None:
    """A supervisor killed while it drains leaves workers that take nothing more."""
    before = pids(node)
    prompt = engine.prompt(1, 8)
    assert engine.save(prompt).wait(0)
    os.kill(before["compress"], signal.SIGSTOP)  # so that the drain takes until we are done
    node.kill("supervisor", signal.SIGTERM)
    node.wait(lambda state: state.state == "draining")
    node.kill("supervisor")
    os.kill(before["compress"], signal.SIGCONT)
    node.start()
    assert "not taken over: it was being stopped" in node.output
    assert not set(pids(node).values()) & set(before.values())
    until_whole(node, engine)
    assert engine.load(prompt).by_tier == {Tier.DRAM: 8}
    assert engine.save(engine.prompt(2, 8)).wait(0), "saves are taken again"


def test_down_after_the_supervisor_s_death_drains(node: Node, engine: Engine) -> None:
    prompt = engine.prompt(1, 8)
    ids = engine.prefill(prompt)
    assert engine.send(prompt, ids).wait(WAIT_S)
    node.kill("supervisor")
    roles = [node.paths.role(worker) for worker in WORKERS]
    assert all(map(lock_holder, roles))
    argv = [sys.executable, "-P", "-m", "lmpipe", "down", "--run-dir", str(node.run_dir)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert f"tidied up: {node.run_dir}" in done.stdout
    assert not any(map(lock_holder, roles))
    engine.memory.free(ids)
    node.start()
    until_whole(node, engine)
    assert engine.load(prompt).by_tier == {Tier.SSD: 8}


def test_a_worker_killed_just_before_down_costs_no_drain_time(tmp_path: Path) -> None:
    with Node(all_tiers(tmp_path) | {"drain_ms": 600_000}) as node:
        node.kill("supervisor", signal.SIGSTOP)  # so that it does not see the death before the signal
        node.kill("persist")
        node.kill("supervisor", signal.SIGTERM)
        node.kill("supervisor", signal.SIGCONT)
        started_s = time.monotonic()
        node._supervisor.wait(WAIT_S * 2)
        assert time.monotonic() - started_s < WAIT_S * 2
        assert "not drained in time" not in node.output
