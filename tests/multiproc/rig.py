"""Engines on a node: a producer with its paged memory, in this process or in one of its own; and a look at what is
left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lmpipe.bus import Client
from lmpipe.engines.paged import PagedEngine
from lmpipe.handles import SessionId, Tier
from lmpipe.keys import Prompt
from lmpipe.launch.claim import WorkerNote
from lmpipe.layout import KVLayout
from lmpipe.lifecycle import SlotState
from lmpipe.messages import Invalidate, Invalidated, Ping, Pong
from lmpipe.producer import LoadResult, Producer, SaveTicket
from lmpipe.shm.counters import Counters
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.hold import HoldScanner
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import SessionDir
from lmpipe.shm.table import SlotTable
from lmpipe.testing import Node

WAIT_S = 30.0
"""How long anything may take that has to happen; nothing is expected to be fast."""

CHUNK_TOKENS = 16
LAYOUT = KVLayout.paged(2, 2, 32, "float16", 4)
"""8 KiB for each chunk of 16 tokens."""
BIG = KVLayout.paged(32, 8, 128, "float16", 16)
"""2 MiB for each chunk of 16 tokens."""

CALM: dict[str, Any] = {"restarts": {"budget": 1000, "window_s": 1}, "heartbeat_ms": 300}
"""Any number of deaths; and a busy machine is not taken for a dead gather."""
DRAM_ONLY: dict[str, Any] = {"tiers": {"ssd": None}, **CALM}


def all_tiers(directory: Path, *, dram: str = "32MiB", codec: str = "zstd") -> dict[str, Any]:
    """Every stage in a process of its own; the remote tier's objects lie in `directory`."""
    remote = {"url": f"file://{directory}/remote", "capacity": "64MiB", "codec": codec}
    tiers = {"dram": {"capacity": dram}, "ssd": {"codec": codec}, "remote": remote}
    return {"tiers": tiers, **CALM}


PageIds = npt.NDArray[np.int32]


def until(condition: Callable[[], object], what: str = "", timeout_s: float = WAIT_S) -> None:
    """Polls until a condition is true; fails with its name when it does not become so."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not in {timeout_s:g} s: {what or condition}"
        time.sleep(0.005)


def tokens_of(seed: int, chunks: int) -> npt.NDArray[np.uint32]:
    """A prompt's tokens: one seed, one prompt; more chunks, the same prompt longer."""
    return np.random.default_rng(seed).integers(0, 50_000, chunks * CHUNK_TOKENS, np.uint32)


class Memory(PagedEngine):
    """Content that a codec can shrink, another one for each shard."""

    shard = 0

    def content(self, key: npt.NDArray[np.uint8], pages: int) -> npt.NDArray[np.uint8]:
        """What this shard of the chunk of this key holds."""
        return super().content(key, pages) & 0x0F | np.uint8(self.shard << 4)


class Engine:
    """A producer and its memory. Whatever is loaded is compared with what its keys say."""

    memory_kind: type[Memory] = Memory

    def __init__(
        self,
        run_dir: Path,
        *,
        pages_in: Path | None = None,
        layout: KVLayout = LAYOUT,
        pages: int = 2048,
        wait_s: float = WAIT_S,
        **identity: Any,
    ) -> None:
        """`pages_in`: a private directory; given, the pages are a segment there, and gather copies them."""
        segment = None if pages_in is None else pages_in / f"pages-{os.getpid()}-{time.monotonic_ns()}.shm"
        self.memory = self.memory_kind(layout, pages, segment=segment)
        self.memory.shard = identity.get("shard", 0)
        identity = {"model": "test", **identity}
        self.producer = Producer(run_dir, layout, pages=self.memory.source, wait_s=wait_s, **identity)

    @property
    def mapped(self) -> bool:
        """Whether gather copies this engine's pages itself."""
        return self.memory.source is not None

    @property
    def holding(self) -> int:
        """Entries of this engine's hold table that are in use."""
        attachment = self.producer._link.attachment
        return 0 if attachment is None else attachment.holds.entries - attachment.holds._table.free

    def prompt(self, seed: int, chunks: int) -> Prompt:
        """The prompt of a seed, `chunks` long."""
        return self.producer.prompt(tokens_of(seed, chunks))

    def prefill(self, prompt: Prompt, first: int = 0) -> PageIds:
        """Pages that hold what the prompt's chunks from `first` on have to hold."""
        keys = prompt.keys[first:]
        ids = self.memory.allocate(len(keys), CHUNK_TOKENS)
        self.memory.fill(keys, ids)
        return ids

    def send(self, prompt: Prompt, ids: PageIds, first: int = 0) -> SaveTicket:
        """A save on its way."""
        return self.producer.save(prompt, None if self.mapped else self.memory.pool, ids, first_chunk=first)

    def save(self, prompt: Prompt, timeout_s: float = WAIT_S) -> SaveTicket:
        """Prefill, save, wait for every answer."""
        ids = self.prefill(prompt)
        ticket = self.send(prompt, ids)
        ticket.wait(timeout_s)
        assert ticket.done, f"{ticket.open_chunks()} of {ticket.chunks} chunks have no answer"
        self.memory.free(ids)
        return ticket

    def load(self, prompt: Prompt, *, deadline_ms: float = 1000 * WAIT_S) -> LoadResult:
        """Look up, load into pages of rubbish, check every byte of what is said to be loaded."""
        found = self.producer.lookup(prompt)
        ids = self.memory.allocate(found.chunks, CHUNK_TOKENS)
        self.memory.memory[:, ids.ravel()] = 0xEE
        result = self.producer.load(found, self.memory.pool, ids, deadline_ms=deadline_ms)
        assert self.memory.wrong(prompt.keys[: result.chunks], ids) == []
        self.memory.free(ids)
        return result

    def drop_from(self, prompt: Prompt, *tiers: Tier, first: int = 0) -> None:
        """Leave a prompt, from chunk `first` on, to the tiers below these."""
        attachment = self.producer._link.attachment
        assert attachment is not None
        ask = Invalidate(attachment.session.id, 1, 0, list(tiers), self.producer._records(prompt)[first:])
        assert isinstance(self.producer._link.ask(1, ask, WAIT_S), Invalidated)

    def save_below(self, seed: int, chunks: int) -> Prompt:
        """A prompt that lies in every tier but DRAM."""
        prompt = self.prompt(seed, chunks)
        assert self.save(prompt).wait(0)
        assert self.producer.flush(prompt, tiers=[tier for tier in self._tiers() if tier is not Tier.DRAM])
        self.drop_from(prompt, Tier.DRAM)
        return prompt

    def _tiers(self) -> tuple[Tier, ...]:
        attachment = self.producer._link.attachment
        return attachment.info.topology.tier_names if attachment is not None else ()

    def found(self, prompt: Prompt) -> int:
        """How many chunks a lookup finds."""
        with self.producer.lookup(prompt) as found:
            return found.chunks

    def kill_in(self, state: str) -> None:
        """Die, by SIGKILL, with a lease in this state: half of the bytes are written, and the record of a prompt."""
        attachment, producer = self.producer._link.attachment, self.producer
        assert attachment is not None
        (slot,) = producer._leases.take(1, WAIT_S)
        arena, prompt = attachment.arena, self.prompt(666, 1)
        if state != "leased":
            assert producer._saver._open(attachment, slot)
            payload = arena.payload(slot.index)
            payload[: len(payload) // 2] = bytes([0xAB]) * (len(payload) // 2)
            record = producer._records(prompt)[0]
            record["place"] = slot.place
            arena.set_record(slot.index, record)
        os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """End the session, drop the memory."""
        self.producer.close()
        self.memory.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EngineProcess:
    """An `Engine` in a process of its own (engine_process.py), told what to do line by line."""

    def __init__(self, node: Node, *, mapped: bool = False, through: Sequence[str] = (), **options: Any) -> None:
        """`through`: a command that starts the one that follows it."""
        options |= {"run_dir": str(node.run_dir), "pages_in": str(node.directory) if mapped else None}
        self._process = subprocess.Popen(
            [
                *through,
                *(sys.executable, "-W", "error", str(Path(__file__).with_name("engine_process.py"))),
                json.dumps(options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.state = self.hear()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def tell(self, do: str, **arguments: Any) -> None:
        """Begin something; `hear` has the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """The answer to what was told first."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the engine process has ended with {self._process.wait(WAIT_S)}"
        return json.loads(line)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Do something and wait for the answer."""
        self.tell(do, **arguments)
        return self.hear()

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self._process.kill()
        self._process.wait(WAIT_S)

    def wait(self) -> int:
        """Wait until it has ended; the status."""
        return self._process.wait(WAIT_S)

    def close(self) -> None:
        """End it in order if it lives; close the pipes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(WAIT_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.kill()
        self._process.stdout.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stages_below(node: Node) -> list[str]:
    """The stages that gather says are below it now."""
    ends = node.info.endpoints["gather"]
    client = Client({"load": ends["load"], "save": ends["save"]})
    try:
        answers: list[Pong] = []

        def heard() -> bool:
            client.send("load", Ping(SessionId(1), 1))  # again and again: who got the last one may have died of it
            message = client.recv()
            if isinstance(message, Pong):
                answers.append(message)
            return bool(answers)

        until(heard, "gather answers")
        return answers[0].below
    finally:
        client.close()


def until_whole(node: Node, *engines: Engine) -> None:
    """Waits until every stage knows the one below it and the engines are registered with this gather."""
    until(lambda: stages_below(node) == list(node.topology.stages[1:]), "the chain is whole")
    for engine in engines:
        until(lambda e=engine: _is_registered(node, e), "the engine is registered")


def _is_registered(node: Node, engine: Engine) -> bool:
    link = engine.producer._link
    note = WorkerNote.read(node.paths.up(node.topology.process_of("gather").name))
    return (
        link.state == "ready"
        and link.registered is not None
        and note is not None
        and (link.registered.session == note.session)
    )


# What is left behind.


def slot_states(node: Node) -> Counter[SlotState]:
    """How many slots of the arena are in each state."""
    arena = SlotTable(Segment.attach(node.paths.arena, SegmentKind.SLOTS))
    try:
        return Counter(arena.state(index)[1] for index in range(arena.slots))
    finally:
        arena.close()


def bytes_in_use(node: Node) -> int:
    """Bytes of the arena that slots have, by their headers."""
    arena = SlotTable(Segment.attach(node.paths.arena, SegmentKind.SLOTS))
    try:
        used = [index for index in range(arena.slots) if arena.state(index)[1] is not SlotState.FREE]
        return sum(arena.capacity(index) for index in used)
    finally:
        arena.close()


def holds(node: Node) -> frozenset[int]:
    """What living sessions hold."""
    scanner = HoldScanner(SessionDir(node.run_dir))
    try:
        scanner.refresh()
        return scanner.held()
    finally:
        scanner.close()


def counters(node: Node, process: str = "gather") -> dict[str, int]:
    """The counters of a worker's present life."""
    return Counters.read(node.paths.counters_of(process, node.pid(process)))


def assert_nothing_leaks(node: Node, leases: int) -> None:
    """Nobody holds anything, nobody writes anything, and no more slots are leased than living engines may have."""
    passing = (SlotState.WRITING, SlotState.READY, SlotState.DOOMED)

    def quiet() -> bool:
        states = slot_states(node)
        return not holds(node) and not any(states[state] for state in passing) and states[SlotState.LEASED] <= leases

    end_s = time.monotonic() + WAIT_S
    while not quiet():
        assert time.monotonic() < end_s, f"left: {slot_states(node)}, {len(holds(node))} holds"
        time.sleep(0.02)
    until(lambda: counters(node)["gather_dram_used_bytes"] == bytes_in_use(node), "gather knows every slot in use")
