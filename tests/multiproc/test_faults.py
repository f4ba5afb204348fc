"""Faults seen in a peer, by number: none of them may happen here. Real processes, real sockets, every tier.

Fault 1 has a file of its own (test_fault_messages.py).
"""

from __future__ import annotations

import ast
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from rig import (
    WAIT_S,
    Engine,
    EngineProcess,
    all_tiers,
    assert_nothing_leaks,
    counters,
    holds,
    slot_states,
    tokens_of,
    until,
    until_whole,
)

import lmpipe
from lmpipe import bus, keys
from lmpipe import messages as m
from lmpipe.handles import SessionId, Tier
from lmpipe.lifecycle import SlotState
from lmpipe.producer import saving
from lmpipe.testing import Node

LEASES = 8


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(all_tiers(tmp_path_factory.mktemp("remote"))) as node:
        yield node


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """An arena for 64 chunks, one tier below it."""
    changes = all_tiers(tmp_path_factory.mktemp("small"), dram="1MiB", codec="raw")
    changes["tiers"]["dram"]["slots"] = 64
    changes["tiers"]["remote"] = None
    with Node(changes) as node:
        yield node


@pytest.fixture(params=["private", "mapped"])
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    pages_in = node.directory if request.param == "mapped" else None
    with Engine(node.run_dir, pages_in=pages_in, tenant=request.node.nodeid) as engine:
        yield engine


@pytest.mark.parametrize("state", ["leased", "writing"])
@pytest.mark.parametrize("gather_too", [False, True])
def test_fault_02_what_a_dead_writer_left_is_never_a_hit(node: Node, state: str, gather_too: bool) -> None:
    with Engine(node.run_dir) as survivor:
        until(lambda: slot_states(node)[SlotState.WRITING] == 0)
        with EngineProcess(node) as writer:
            writer.tell("die_in", state=state)
            assert writer.wait() == -signal.SIGKILL
            if gather_too:
                gather = node.kill("gather")
                node.wait_restarted("gather", gather)
                survivor.producer.wait_ready(WAIT_S)
        prompt = survivor.prompt(666, 1)
        assert survivor.found(prompt) == 0
        assert_nothing_leaks(node, LEASES)
        assert survivor.found(prompt) == 0
        until_whole(node, survivor)
        assert survivor.save(prompt).saved == 1
        assert survivor.load(prompt).chunks == 1
        until(lambda: survivor.producer.invalidate(prompt) >= 0)


def test_fault_03_under_pressure_a_save_says_what_it_dropped_and_why(small: Node) -> None:
    with Engine(small.run_dir, pages_in=small.directory) as engine:
        pinned = engine.prompt(1, 60)
        assert engine.save(pinned).wait(0)
        assert engine.producer.pin(pinned) == 60
        before = counters(small)
        tickets = [engine.save(engine.prompt(seed, 8)) for seed in range(2, 12)]
        for ticket in tickets:
            assert ticket.saved + ticket.known + sum(ticket.dropped.values()) == 8
            assert set(ticket.dropped) <= {"no room in DRAM"}
        after, dropped = counters(small), sum(sum(ticket.dropped.values()) for ticket in tickets)
        assert dropped
        assert after["gather_dropped_chunks"] - before["gather_dropped_chunks"] == dropped
        assert engine.producer.stats()["save_dropped_chunks"] == dropped
        assert engine.load(pinned).chunks == 60
        engine.producer.unpin(pinned)
        assert engine.save(engine.prompt(12, 8)).wait(0), "there is room again at once, not after a timer"
        assert engine.load(engine.prompt(12, 8)).chunks == 8


def test_fault_03_leases_come_back_when_there_is_room_again(small: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that came while all was pinned has no leases, and nothing to send that would ask for some."""
    monkeypatch.setattr(saving, "LEASE_WAIT_S", 0.2)
    with Engine(small.run_dir, pages_in=small.directory, tenant="03b") as full:
        until(lambda: slot_states(small)[SlotState.LEASED] == 0, "the leases of those before are back")
        pinned = full.prompt(1, 64)
        assert full.save(pinned).wait(0)
        assert full.producer.pin(pinned) == 64
        with Engine(small.run_dir, tenant="03c") as engine:
            assert engine.save(engine.prompt(2, 4)).dropped == {"no room in time": 4}
            assert full.producer.unpin(pinned) == 64
            until(lambda: engine.save(engine.prompt(2, 4)).wait(0), "leases come back")


@pytest.mark.parametrize("readers", [False, True])
def test_fault_04_a_hit_below_is_served_while_dram_is_full(small: Node, readers: bool) -> None:
    """Also when what was wanted least is still held by a reader."""
    with Engine(small.run_dir, tenant=f"04 {readers}") as engine:
        first, older = engine.prompt(1, 8), engine.prompt(1000, 8)
        assert engine.save(older).wait(0) and engine.save(first).wait(0)
        assert engine.producer.flush(first, tiers=("ssd",))
        held = engine.producer.lookup(older) if readers else None
        seed = 2
        while _in_dram(engine, first):
            assert engine.save(engine.prompt(seed, 8)).wait(WAIT_S)
            seed += 1
            assert seed < 100
        assert slot_states(small)[SlotState.FREE] <= 8, "full but evictable"
        result = engine.load(first)
        assert (result.chunks, result.reason, result.by_tier) == (8, "", {Tier.SSD: 8})
        assert engine.load(first).by_tier == {Tier.DRAM: 8}
        if held is not None:
            assert _in_dram(engine, older)
            held.release()


def _in_dram(engine: Engine, prompt: keys.Prompt) -> int:
    with engine.producer.lookup(prompt) as found:
        return found.by_tier.get(Tier.DRAM, 0)


@pytest.mark.parametrize("tier", ["dram", "below"])
def test_fault_05_equal_prompts_loaded_at_once_leave_nothing_behind(node: Node, tier: str) -> None:
    with Engine(node.run_dir, tenant=f"05 {tier}") as engine, Engine(node.run_dir, tenant=f"05 {tier}") as twin:
        prompt = engine.prompt(1, 12)
        assert engine.save(prompt).wait(0)
        assert engine.producer.flush(prompt, tiers=("ssd", "remote"))
        for _ in range(5):
            if tier == "below":
                engine.drop_from(prompt, Tier.DRAM)
            start, results = threading.Barrier(4), []

            def load(by: Engine, start: threading.Barrier = start, results: list[int] = results) -> None:
                mine = by.prompt(1, 12)
                start.wait()
                results.append(by.load(mine).chunks)

            threads = [threading.Thread(target=load, args=(by,)) for by in (engine, twin, engine, twin)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert results == [12] * 4
        assert not holds(node)
        assert_nothing_leaks(node, 2 * LEASES)


def test_fault_06_a_refusal_is_an_answer_and_nobody_waits_for_a_time_out(engine: Engine, node: Node) -> None:
    """Each wait below may last hours; what would be waited for does not come, and the calls return all the same."""
    attachment, producer = engine.producer._link.attachment, engine.producer
    assert attachment is not None
    prompt = engine.prompt(1, 3)
    stranger = SessionId(attachment.session.id ^ 1)
    nothing = producer._records(prompt)
    answer = producer._link.request(1, "save", m.Save(stranger, 1, "arena", nothing)).get(timeout=WAIT_S)
    assert answer is None, "refused: not registered"
    hours_ns = 10**15
    answer = producer._link.request(2, "load", m.Load(attachment.session.id, 2, nothing, "arena", hours_ns)).get(
        timeout=WAIT_S
    )
    assert isinstance(answer, m.LoadFailed)
    assert answer.reason == "not stored below"
    assert producer._link.ask(3, m.Drained(attachment.session.id, 3), 3600) is None
    result = engine.load(prompt, deadline_ms=3_600_000)
    assert result.chunks == 0


def test_fault_07_what_is_answered_as_saved_is_found_by_another_process_at_once(node: Node) -> None:
    with EngineProcess(node, tenant="07") as other, Engine(node.run_dir, tenant="07") as engine:
        seen = 0
        for seed in range(200):
            assert engine.save(engine.prompt(seed, 2)).saved == 2
            seen += other.ask("found", seed=seed, chunks=2) == 2
        assert seen == 200


def test_fault_08_nothing_that_runs_code_is_near_a_socket() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    calls = {"recv_pyobj", "send_pyobj", "recv_serialized", "eval", "exec"}
    for path in Path(lmpipe.__file__).parent.rglob("*.py"):
        assert "allow_pickle" not in path.read_text(), path
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            assert not forbidden & set(names), f"{path} imports {names}"
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                safe = called == "eval" and "torch" in path.read_text()  # model.eval()
                assert called not in calls or safe, f"{path}:{node.lineno} calls {called}"


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_fault_08_the_bytes_of_a_pickle_are_refused_unread(node: Node, tmp_path: Path) -> None:
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    context: zmq.Context[Any] = zmq.Context()
    for stage, ends in node.info.endpoints.items():
        for channel in ("load", "save"):
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            socket.connect(ends[channel])
            for frames in ([bomb], [b'{"v":2,"type":"Save"}', bomb], [bomb, bomb]):
                socket.send_multipart(frames)
                assert socket.poll(WAIT_S * 1000), f"{stage}.{channel} does not answer"
                assert isinstance(m.decode(socket.recv_multipart()), m.Refused)
            socket.close()
    context.term()
    assert not (tmp_path / "exploded").exists()


IDENTITIES: list[dict[str, Any]] = [
    {},
    {"model": "another"},
    {"revision": "2"},
    {"weights_epoch": 1},
    {"rope": "yarn-4"},
    {"adapter": "lora-1"},
    {"adapter": "lora-2"},
    {"tenant": "b"},
    {"cache_salt": "s"},
]


def test_fault_10_what_kv_depends_on_keeps_it_apart(node: Node) -> None:
    """Adapter, revision, tenant, salt, rotary parameters, dtype, layout: nobody finds what another one saved."""
    from_layouts = [{"layout": layout} for layout in _layouts()]
    for identity in [*IDENTITIES, *from_layouts]:
        with Engine(node.run_dir, **{"model": "ten", **identity}) as engine:
            prompt = engine.prompt(10, 2)
            assert engine.found(prompt) == 0, identity
            assert engine.save(prompt).saved == 2
    for identity in [*IDENTITIES, *from_layouts]:
        with Engine(node.run_dir, **{"model": "ten", **identity}) as engine:
            assert engine.load(engine.prompt(10, 2)).chunks == 2


def _layouts() -> list[Any]:
    from_ = lmpipe.KVLayout.paged
    return [from_(2, 2, 32, "bfloat16", 4), from_(2, 2, 32, "float16", 4, order="HND"), from_(2, 2, 32, "float16", 8)]


def test_fault_11_tokens_are_hashed_once_and_sent_never(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, sent = [0], list[bytes]()
    blake3_many, send = keys.native.blake3_many, bus._send

    def hashing(data: Any, item_bytes: int) -> Any:
        hashed[0] += memoryview(data).nbytes
        return blake3_many(data, item_bytes)

    def sending(socket: Any, frames: Any) -> bool:
        sent.append(b"".join(bytes(frame) for frame in frames))
        return send(socket, frames)

    monkeypatch.setattr(keys.native, "blake3_many", hashing)
    monkeypatch.setattr(bus, "_send", sending)
    tokens = tokens_of(11, 64)
    prompt = engine.producer.prompt(tokens)
    engine.save(prompt)
    for _ in range(3):
        engine.found(prompt)
        assert engine.load(prompt).chunks == 64
        engine.producer.prefetch(prompt)
        engine.producer.touch(prompt)
        engine.producer.pin(prompt)
        engine.producer.unpin(prompt)
    engine.producer.invalidate(prompt)
    assert hashed[0] == tokens.nbytes
    everything = b"".join(sent)
    assert len(everything) > 64 * 72
    for wide in ("<u4", "<i8", ">u4"):
        for at in range(0, len(tokens) - 4, 4):
            assert tokens[at : at + 4].astype(wide).tobytes() not in everything
    assert ",".join(map(str, tokens[:3])).encode() not in everything


BAD_SETTINGS = [
    (2, "tiers: {dram: {capacity: lots}}", ["tiers.dram.capacity"]),
    (2, "tires: {dram: {capacity: 64MiB}}", ["tires", "tiers"]),
    (3, "tiers: {dram: {capacity: 64MiB}}\nheartbeat_ms:", ["heartbeat_ms"]),
    (2, "tiers: {dram: {capacity: 64MiB}, ssd: {directory: x, capacity: 4GiB, codec: zst}}", ["zst", "zstd"]),
]


@pytest.mark.parametrize("verb", ["check", "up"])
def test_fault_12_a_bad_setting_is_named(tmp_path: Path, verb: str) -> None:
    """File, line, path and the nearest name; nothing falls back to a default, nothing is started."""
    started = []
    for number, (_, wrong, _) in enumerate(BAD_SETTINGS):
        file = tmp_path / f"{number}.yaml"
        file.write_text(f"name: bad\n{wrong}\n")
        argv = [sys.executable, "-W", "error", "-m", "lmpipe", verb, str(file)]
        started.append((file, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)))
    for (file, process), (line, _, said) in zip(started, BAD_SETTINGS, strict=True):
        text, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 2, text
        assert f"{file}:{line}" in text
        assert "Traceback" not in text
        assert [word for word in said if word not in text] == [], text


def test_fault_13_lookups_need_no_process_of_lmpipe(node: Node) -> None:
    """With everything stopped, several engine processes find and load what DRAM holds; no message is sent for it."""
    with Engine(node.run_dir, tenant="13") as engine:
        prompt = engine.prompt(13, 32)
        assert engine.save(prompt).wait(0)
        others = [EngineProcess(node, tenant="13") for _ in range(2)]
        pids = [process.pid for process in node.status().processes] + [node.pid("supervisor")]
        try:
            assert [other.ask("found", seed=13, chunks=32) for other in others] == [32, 32]
            for pid in reversed(pids):
                os.kill(pid, signal.SIGSTOP)
            before = counters(node)["gather_messages"]
            for other in others:
                other.tell("lookups", seed=13, chunks=32, count=500)
            assert [other.hear() for other in others] == [500, 500]
            assert [other.ask("load", seed=13, chunks=32)["chunks"] for other in others] == [32, 32]
            assert engine.load(prompt).chunks == 32
            assert counters(node)["gather_messages"] == before
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            for other in others:
                other.close()
        until(lambda: engine.producer.state == "ready", "the node answers again")
