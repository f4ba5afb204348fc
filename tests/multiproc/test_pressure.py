"""A working set much larger than memory, from several engines at once: every tier keeps to its capacity, rows stay
whole, everybody is served, and no byte is wrong.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rig import (
    BIG,
    WAIT_S,
    Engine,
    EngineProcess,
    all_tiers,
    assert_nothing_leaks,
    counters,
    until,
    until_whole,
)

from lmpipe.index_row import is_complete
from lmpipe.keys import Prompt
from lmpipe.testing import Node, small_topology

MIB = 1 << 20
CAPACITY = {"ssd": 4 * MIB, "remote": 2 * MIB}


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def node(remote: Path) -> Iterator[Node]:
    changes = all_tiers(remote, dram="1MiB")
    changes["tiers"]["dram"]["slots"] = 96
    changes["tiers"]["ssd"] |= {"capacity": CAPACITY["ssd"], "segment": MIB}
    changes["tiers"]["remote"]["capacity"] = CAPACITY["remote"]
    with Node(changes) as node:
        yield node


def disk_bytes(directory: Path, suffix: str = "") -> int:
    """What files take, as far as they stay there while we look."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(root, name).stat().st_size if name.endswith(suffix) else 0
    return total


def test_random_use_by_many_engines_is_right_and_keeps_to_every_capacity(node: Node, remote: Path) -> None:
    """About 8 MiB of chunks, a 0.75 MiB arena, 4 MiB on disk, 2 MiB in the store."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    until_whole(node)
    engines = [EngineProcess(node, mapped=mapped, tenant="churn") for mapped in (False, True, True)]
    for number, engine in enumerate(engines):
        engine.tell("churn", seed=seed + number, prompts=40, chunks=24, seconds=3)
    watching = threading.Event()
    most = {"ssd": 0, "remote": 0}

    def watch() -> None:
        while not watching.wait(0.02):
            most["ssd"] = max(most["ssd"], disk_bytes(node.directory / "ssd", ".seg"))
            most["remote"] = max(most["remote"], disk_bytes(remote / "remote"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = [engine.hear() for engine in engines]  # each has compared every byte that it loaded
    finally:
        watching.set()
        watcher.join()
    for engine in engines:
        engine.close()
    assert all(each["saved"] and each["loaded"] for each in done), done
    assert 0 < most["ssd"] <= CAPACITY["ssd"]
    # The store writes a new object beside its final name before it counts.
    assert 0 < most["remote"] <= CAPACITY["remote"] + 4 * 16_384
    gather = counters(node)
    assert gather["gather_evicted_chunks"]
    assert gather["gather_dram_used_bytes"] <= gather["gather_dram_capacity_bytes"]
    assert_nothing_leaks(node, 0)


def dram_rows(engine: Engine, prompt: Prompt) -> list[bytes]:
    """What the DRAM index has of a prompt's chunks."""
    attachment = engine.producer._link.attachment
    assert attachment is not None
    return [row for key in prompt.index_keys for row in attachment._index.readers[0].run([key])]


def test_a_row_is_found_with_all_of_its_shards_or_not_at_all(node: Node) -> None:
    """Two ranks save their halves of the same prompts while a third engine forces evictions."""
    ranks = [Engine(node.run_dir, tenant="ranks", shard=rank, shards=2) for rank in range(2)]
    with Engine(node.run_dir, tenant="others") as other:
        until_whole(node, *ranks, other)
        for turn in range(12):
            prompts = [rank.prompt(turn, 8) for rank in ranks]
            assert ranks[0].save(prompts[0]).wait(0)
            assert ranks[0].found(prompts[0]) == 0, "half a row"
            assert ranks[1].save(prompts[1]).wait(0)
            other.save(other.prompt(turn, 8))
            rows = [row for seen in range(turn + 1) for row in dram_rows(ranks[0], ranks[0].prompt(seen, 8))]
            assert all(is_complete(row) for row in rows)
            assert ranks[0].load(prompts[0]).chunks == ranks[1].load(prompts[1]).chunks == 8
    for rank in ranks:
        rank.close()
    assert_nothing_leaks(node, 0)


def test_no_engine_starves_another(node: Node) -> None:
    """One engine with very many saves waiting, one with a single one: that is served long before the many are."""
    with (
        Engine(node.run_dir, tenant="greedy", pages_in=node.directory, pages=4096) as greedy,
        Engine(node.run_dir, tenant="modest", pages_in=node.directory) as modest,
        Engine(node.run_dir, tenant="private") as private,
    ):
        until_whole(node, greedy, modest, private)
        prompts = [greedy.prompt(seed, 16) for seed in range(60)]
        pages = greedy.prefill(prompts[0])
        few = modest.prefill(modest.prompt(1, 4))
        os.kill(node.pid("gather"), signal.SIGSTOP)
        tickets = []
        for prompt in prompts:
            greedy.memory.fill(prompt.keys, pages)
            tickets.append(greedy.send(prompt, pages))
        until(greedy.producer._saver._jobs.empty)
        last = modest.send(modest.prompt(1, 4), few)
        until(modest.producer._saver._jobs.empty)
        os.kill(node.pid("gather"), signal.SIGCONT)
        assert last.wait(WAIT_S)
        waiting = sum(not ticket.done for ticket in tickets)
        assert waiting > len(tickets) // 4, "it came last and did not wait for all that came before"
        assert private.save(private.prompt(1, 4)).saved == 4
        for ticket in tickets:
            ticket.revoke()
        until(lambda: all(ticket.done for ticket in tickets))
    assert_nothing_leaks(node, 0)


def test_a_chunk_larger_than_the_arena_is_refused_with_the_reason(node: Node) -> None:
    with Engine(node.run_dir, layout=BIG, pages=4) as engine:
        assert engine.producer.state == "refused"
        assert "raise tiers.dram.capacity or lower chunk_tokens" in engine.producer.reason
        prompt = engine.prompt(1, 1)
        assert engine.save(prompt).dropped == {"lmpipe absent": 1}
        assert engine.found(prompt) == 0
    assert [process.restarts for process in node.status().processes] == [0] * 4


@pytest.fixture
def full_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 MiB, private to this user."""
    where = tmp_path / "shm"
    where.mkdir(mode=0o700)
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=24m,mode=700", "none", str(where)]
    if mount is None or os.geteuid() != 0 or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def small_node(where: Path, tmp_path: Path, capacity: str) -> Path:
    plain = small_topology(where / "node", tmp_path)
    plain["tiers"] = {"dram": {"capacity": capacity, "slots": 64}}
    plain["index"] = {"dram": "1MiB"}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def test_an_arena_for_which_there_is_no_room_is_an_error_message(full_tmpfs: Path, tmp_path: Path) -> None:
    file = small_node(full_tmpfs, tmp_path, "64MiB")
    argv = [sys.executable, "-W", "error", "-m", "lmpipe", "up", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "bytes are wanted and" in text
    assert "Traceback" not in text
    assert disk_bytes(full_tmpfs) == 0, "nothing is left of the attempt"


def test_a_shm_that_fills_up_harms_no_engine(full_tmpfs: Path, tmp_path: Path) -> None:
    """Everything that anybody will ever touch was allocated before: no SIGBUS; who comes late is told why not."""
    file = small_node(full_tmpfs, tmp_path, "8MiB")
    changes = yaml.safe_load(file.read_text()) | {"run_dir": str(full_tmpfs / "node")}
    with (
        Node({"tiers": {"ssd": None, "dram": {"capacity": "8MiB", "slots": 64}}, **_only(changes)}) as node,
        EngineProcess(node) as process,
        Engine(node.run_dir) as engine,
    ):
        assert process.ask("save", seed=1, chunks=8)["saved"] == 8
        stuffing = full_tmpfs / "stuffing"
        with stuffing.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        for seed in range(2, 12):
            assert process.ask("save", seed=seed, chunks=16)["saved"] == 16
            assert process.ask("load", seed=seed, chunks=16)["chunks"] == 16
        with Engine(node.run_dir, wait_s=1.0) as late:
            assert late.producer.state == "absent"
            assert "bytes" in late.producer.reason
            assert late.found(late.prompt(1, 8)) == 0
            stuffing.unlink()
            until(lambda: late.producer.state == "ready", "it comes in as soon as there is room")
            assert late.load(late.prompt(11, 16)).chunks == 16
        assert engine.load(engine.prompt(11, 16)).chunks == 16
        assert [process.restarts for process in node.status().processes] == [0]


def _only(changes: dict[str, object]) -> dict[str, object]:
    return {name: changes[name] for name in ("run_dir", "index")}
