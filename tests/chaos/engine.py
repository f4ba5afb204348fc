"""An engine under chaos, in a process of its own. At work it saves, looks up, loads, cancels, prefetches, pins and
invalidates at random, and checks every byte that it loads; calm, it ends what is open and says how it stands.

Reads one JSON command a line. What it says is one JSON object a line: answers to commands, and what it noticed.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rig import CHUNK_TOKENS, Engine, PageIds

from lmpipe import messages as m
from lmpipe.keys import Prompt
from lmpipe.producer import Found, LoadResult, SaveTicket

CHURN, VAULT, CUT, GHOST = 0, 1 << 40, 2 << 40, 3 << 40
"""First seeds of prompts: saved and invalidated by all; saved once; saved and cancelled; never saved."""
PROMPTS, CHUNKS = 16, 8
FLYING = 5
HELD = 3
DEADLINES_MS = (20, 100, 500, 2000)
SLACK_S = 5.0
"""What a loaded machine may take to run a thread that is due."""
PATIENCE_S = 40.0
RUBBISH = 0xEE
LONG_NS = 10_000_000
TOLD_EVERY = 64

T = TypeVar("T")


@dataclass(slots=True)
class Flying:
    """A save on its way, and the pages it is from."""

    ticket: SaveTicket
    ids: PageIds


class Troubled(Engine):
    """The engine. Everything it notices goes to `tell`."""

    def __init__(self, run_dir: Path, number: int, tell: Callable[..., None], **options: Any) -> None:
        self._tell = tell
        self._vault: dict[bytes, tuple[int, int, int]] = {}
        super().__init__(run_dir, wait_s=0.0, tenant="chaos", chunk_tokens=CHUNK_TOKENS, **options)
        self._first_vault = self._next_vault = VAULT + (number << 20)
        self._next_cut = CUT + (number << 20)
        self._flying: list[Flying] = []
        self._held: list[tuple[Prompt, Found]] = []
        self._turns = 0
        self._times: defaultdict[str, list[int]] = defaultdict(list)
        link = self.producer._link
        self._on_message, link._on_message = link._on_message, self._hear

    def _hear(self, message: m.Message) -> None:
        """Called by the link's thread: an acknowledgement counts from the moment that it is told."""
        if isinstance(message, m.Persisted):
            kept = [self._vault[key] for key in message.chunks["key"].tolist() if key in self._vault]
            if kept:
                self._tell(persisted=str(message.tier), chunks=kept)
        self._on_message(message)

    def _timed(self, kind: str, allowed_s: float, call: Callable[[], T]) -> T:
        begin_ns = time.monotonic_ns()
        try:
            return call()
        finally:
            end_ns = time.monotonic_ns()
            if end_ns - begin_ns < LONG_NS:
                self._times[kind].append((end_ns - begin_ns) // 1000)
            else:  # this process may have been stopped meanwhile, which others know
                self._tell(long=kind, begin_ns=begin_ns, end_ns=end_ns, allowed_s=allowed_s + SLACK_S)

    def tell_times(self) -> None:
        """Tell the microseconds of the calls so far, but for the long ones, which were told at once."""
        times, self._times = self._times, defaultdict(list)
        self._tell(times=times)

    # At work.

    def turn(self, draw: random.Random) -> None:
        """One thing that engines do."""
        self._turns += 1
        self._reap()
        do = draw.choices(
            (self._save, self._save_vault, self._cut, self._read, self._hold, self._ghost, self._ask),
            (20, 10, 8, 40, 8, 4, 10),
        )[0]
        do(draw)
        if self._turns % TOLD_EVERY == 0:
            self.tell_times()

    def _some(self, draw: random.Random) -> Prompt:
        """A prompt that others have too; others again after a while, so that there is always something to save."""
        shift = int(time.monotonic() / 3) % 1000 * 2
        return self.prompt(CHURN + shift + draw.randrange(PROMPTS), draw.randrange(1, CHUNKS + 1))

    def _send_off(self, prompt: Prompt) -> Flying:
        while len(self._flying) >= FLYING:
            self._flying[0].ticket.wait(0.05)
            self._reap()
        ids = self.prefill(prompt)
        self._flying.append(Flying(self._timed("save", 0, lambda: self.send(prompt, ids)), ids))
        return self._flying[-1]

    def _reap(self) -> None:
        for flying in [flying for flying in self._flying if flying.ticket.done and flying.ticket.copied.is_set()]:
            self._flying.remove(flying)
            self.memory.free(flying.ids)
            ticket = flying.ticket
            if ticket.saved + ticket.known + sum(ticket.dropped.values()) != ticket.chunks:
                self._tell(violation="a save's chunks do not add up", ticket=str(ticket))

    def _save(self, draw: random.Random) -> None:
        self._send_off(self._some(draw))

    def _save_vault(self, draw: random.Random) -> None:
        """A prompt that nobody invalidates: once acknowledged as persisted, it is to be found."""
        seed, chunks = self._next_vault, draw.randrange(1, CHUNKS + 1)
        self._next_vault += 1
        prompt = self.prompt(seed, chunks)
        for at, key in enumerate(prompt.keys):
            self._vault[key.tobytes()] = (seed, chunks, at)
        self._send_off(prompt)

    def _cut(self, draw: random.Random) -> None:
        """A save that is ended on its way, its pages given to somebody else at once."""
        prompt = self.prompt(self._next_cut, CHUNKS)
        self._next_cut += 1
        flying = self._send_off(prompt)
        time.sleep(draw.random() * 0.003)
        if self.mapped:
            flying.ticket.revoke()
        else:
            self.producer.cancel(flying.ticket)
            if not flying.ticket.copied.wait(PATIENCE_S):
                self._tell(violation="a cancelled save keeps its pages")
        self.memory.memory[:, flying.ids.ravel()] = RUBBISH
        if draw.random() < 0.5:
            self.read(prompt, draw.choice(DEADLINES_MS))

    def _read(self, draw: random.Random) -> None:
        own = range(max(self._first_vault, self._next_vault - 20), self._next_vault)
        vault = draw.random() < 0.3 and own
        self.read(self.prompt(draw.choice(own), CHUNKS) if vault else self._some(draw), draw.choice(DEADLINES_MS))

    def _hold(self, draw: random.Random) -> None:
        """Look up now, load or let go much later."""
        if len(self._held) < HELD:
            prompt = self._some(draw)
            self._held.append((prompt, self._find(prompt)))
            return
        prompt, found = self._held.pop(0)
        if draw.random() < 0.2:
            found.release()
        else:
            self._load(prompt, found, draw.choice(DEADLINES_MS))

    def _ghost(self, draw: random.Random) -> None:
        with self._find(self.prompt(GHOST + draw.randrange(1000), 2)) as found:
            if found.chunks:
                self._tell(violation="found what was never saved", chunks=found.chunks)

    def _ask(self, draw: random.Random) -> None:
        prompt, producer = self._some(draw), self.producer
        kind = draw.choice(("prefetch", "touch", "pin", "unpin", "invalidate"))
        if kind == "prefetch":
            self._timed(kind, 0, lambda: producer.prefetch(prompt))
        elif kind == "touch":
            self._timed(kind, 0, lambda: producer.touch(prompt))
        elif kind == "pin":
            self._timed(kind, 0.2, lambda: producer.pin(prompt, ttl_s=0.2, timeout_s=0.2))
        elif kind == "unpin":
            self._timed(kind, 0.2, lambda: producer.unpin(prompt, timeout_s=0.2))
        else:
            self._timed(kind, 0.5, lambda: producer.invalidate(prompt, timeout_s=0.5))

    def _find(self, prompt: Prompt) -> Found:
        return self._timed("lookup", 0, lambda: self.producer.lookup(prompt))

    def read(self, prompt: Prompt, deadline_ms: float) -> LoadResult:
        """Look up and load, and compare every byte with what its key says."""
        return self._load(prompt, self._find(prompt), deadline_ms)

    def _load(self, prompt: Prompt, found: Found, deadline_ms: float) -> LoadResult:
        ids = self.memory.allocate(found.chunks, CHUNK_TOKENS)
        self.memory.memory[:, ids.ravel()] = RUBBISH
        pool, load = self.memory.pool, self.producer.load
        result = self._timed("load", deadline_ms / 1000, lambda: load(found, pool, ids, deadline_ms=deadline_ms))
        wrong = self.memory.wrong(prompt.keys[: result.chunks], ids)
        if wrong:
            self._tell(violation="wrong bytes", positions=wrong, by_tier=result.by_tier, chunks=result.chunks)
        self.memory.free(ids)
        return result

    # Calm.

    def calm(self) -> dict[str, Any]:
        """End everything that is open; how this engine stands then."""
        for _, found in self._held:
            found.release()
        self._held.clear()
        end_s = time.monotonic() + PATIENCE_S
        while self._flying and time.monotonic() < end_s:
            self._flying[0].ticket.wait(0.1)
            self._reap()
        if self._flying:
            self._tell(violation="saves without an answer", open=[f.ticket.open_chunks() for f in self._flying])
        self.tell_times()
        stats = self.producer.stats()
        parts = sum(stats.get(name, 0) for name in ("saved_chunks", "known_chunks", "save_dropped_chunks"))
        if not self._flying and stats.get("save_chunks", 0) != parts:
            self._tell(violation="an engine's counters disagree", stats=stats)
        return {"holding": self.holding, "stats": stats}

    def standing(self) -> dict[str, Any]:
        """With which gather it is registered, and whether it maps the index."""
        link = self.producer._link
        registered, attachment = link.registered, link.attachment
        return {
            "state": link.state,
            "reason": link.reason,
            "gather": registered.session if registered else 0,
            "mapped": attachment is not None and not attachment.by_message,
        }

    def verify(self, prompts: list[tuple[int, int]], patience_s: float) -> list[str]:
        """Load each of these prompts whole, if need be in several attempts; what could not be."""
        missing: list[str] = []
        for seed, chunks in prompts:
            end_s, result = time.monotonic() + patience_s, None
            while (result is None or result.chunks < chunks) and time.monotonic() < end_s:
                if result is not None:
                    time.sleep(0.1)
                result = self.read(self.prompt(seed, chunks), 5000)
            if result is not None and result.chunks < chunks:
                missing.append(f"prompt {seed}: {result.chunks} of {chunks} chunks ({result.reason})")
        return missing

    def prove(self) -> str:
        """Save something new and see it in every tier; the trouble with that."""
        prompt = self.prompt(self._next_cut, 2)
        self._next_cut += 1
        end_s, done = time.monotonic() + 1.5 * PATIENCE_S, False
        while not done and time.monotonic() < end_s:
            flying = self._send_off(prompt)
            flying.ticket.wait(PATIENCE_S / 4)
            done = self.producer.flush(prompt, tiers=("ssd", "remote"), timeout_s=PATIENCE_S / 8)
        self._reap()
        return "" if done else f"{flying.ticket.dropped}, {self.producer.state} {self.producer.reason}"

    def forget_all(self) -> int:
        """Invalidate everything; the answer."""
        return self.producer.invalidate(timeout_s=PATIENCE_S)


class Lines:
    """The lines of standard input, and whether there is one."""

    def __init__(self) -> None:
        self._rest = b""

    def next(self, timeout_s: float | None) -> str | None:
        """A line; None: none yet. At the end of the input: `quit`."""
        while b"\n" not in self._rest:
            if not select.select([0], [], [], timeout_s)[0]:
                return None
            data = os.read(0, 1 << 16)
            if not data:
                return '{"do": "quit"}'
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


def main() -> None:
    lock = threading.Lock()

    def tell(**what: Any) -> None:
        line = json.dumps(what).encode() + b"\n"
        with lock:
            while line:
                line = line[os.write(1, line) :]

    options = json.loads(sys.argv[1])
    pages_in = options.pop("pages_in")
    options["pages_in"] = None if pages_in is None else Path(pages_in)
    lines, draw = Lines(), None
    with Troubled(Path(options.pop("run_dir")), options.pop("number"), tell, **options) as engine:
        tell(up=os.getpid())
        while True:
            line = lines.next(0 if draw is not None else None)
            if line is None and draw is not None:
                engine.turn(draw)
                continue
            command = json.loads(line or "{}")
            do = command.pop("do")
            if do == "quit":
                break
            draw = random.Random(command.pop("seed")) if do == "work" else None
            if do != "work":
                tell(answer=getattr(engine, do)(**command))


if __name__ == "__main__":
    main()
