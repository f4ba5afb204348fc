"""Failpoints: named moments between two steps of the protocol, where a test may kill, stop, delay or fail the process.

Off unless `LMPIPE_FAILPOINTS` is set when the process starts: `hit` is then a function that does nothing. The variable
has rules, or the path of a file of rules, which is read again whenever it changes: so what runs can be armed and
disarmed.

    rules   one for each line, or between semicolons:  NAME=ACTION[:ARGUMENT][@N][*K][%P/SEED]
            @N from the Nth time on, *K at most K times, %P/SEED with probability P, drawn from that seed
    action  kill          SIGKILL to the own process
            stop          SIGSTOP to the own process
            sleep:0.2     the thread waits
            error:EIO     OSError with that number
            drop, twice   of a message: it is lost, or sent two times
            late:0.2      of a message: it goes out so much later, behind others that were sent after it

With a file every act is noted in `<file>.fired`, and `*K` counts the acts of all processes. Knows the names of the
moments (`POINTS`), and nothing of what happens there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lmpipe import messages as m
from lmpipe.strict_yaml import nearest

VARIABLE = "LMPIPE_FAILPOINTS"

ENGINE, WORKER = ("kill", "stop", "sleep"), ("kill", "stop", "sleep", "error")
"""What may be done: an error must not be thrown into an engine's own thread."""
ON_MESSAGES = ("kill", "stop", "sleep", "drop", "twice", "late")

_PRODUCER = {
    "producer.lookup.held": "holds are taken, the caller does not know it yet",
    "producer.load.asked": "gather is asked for what lies below DRAM",
    "producer.load.copied": "held slots are copied into the engine's pages, whether the holds lasted is not checked",
    "producer.load.arrived": "a chunk has come up and is not held yet",
    "producer.load.released": "the holds are given back",
    "producer.save.granted": "the grant stands, gather is not told",
    "producer.save.leased": "leases are taken, no slot is opened",
    "producer.save.opened": "slots are open, nothing is copied",
    "producer.save.copied": "the bytes are in the slots, the records are not",
    "producer.save.closed": "slots are READY, gather is not told",
}
_WORKERS = {
    "slots.lease.written": "a slot's header is written, its state is still FREE",
    "slots.lease.leased": "the slot is LEASED, nobody is told",
    "slots.free.freed": "the slot is FREE, its range is not given back",
    "slots.recover.pending": "after a restart: pending bits are set, the slot is READY still",
    "gather.save.leased": "slots for mapped pages are open, the copy is not begun",
    "gather.save.copied": "mapped pages are copied, the grant is not read yet",
    "gather.save.granted": "the grant was there after the copy, the slots are not closed",
    "gather.save.closed": "slots are READY, none is committed",
    "gather.save.indexed": "the chunks can be found, the saver has no answer",
    "gather.release.freed": "a lease is taken back that an engine gave back",
    "gather.load.reserved": "slots for a load are leased, the stage below is not asked",
    "gather.load.landed": "a loaded chunk is READY, not committed",
    "gather.load.committed": "a loaded chunk is promoted, who waits is not told",
    "gather.recode.encoded": "a chunk of DRAM is encoded in scratch memory",
    "gather.recode.copied": "it lies in its new slot, which is not closed",
    "gather.outflow.sent": "the stage below was given chunks to take",
    "gather.outflow.answered": "pending bits are cleared, the saver is not told",
    "dram.commit.pending": "pending bits are set, the slot is READY still",
    "dram.commit.committed": "slots are COMMITTED, no row names them",
    "dram.exchange.committed": "a chunk's new slot is COMMITTED, the row names the old one",
    "dram.exchange.indexed": "the row names the new slot, the old one is not doomed",
    "dram.evict.doomed": "slots are DOOMED, the rows still name them",
    "dram.evict.unindexed": "the rows are gone, the slots are not free",
    "index.put.written": "rows are written, the transaction is open",
    "index.delete.written": "rows are deleted, the transaction is open",
    "index.publish.built": "a new generation is complete, readers have the old one",
    "index.publish.switched": "readers have the new generation, the old one is not removed",
    "compress.encode.held": "a chunk is held and a ring slot is open, nothing is encoded",
    "compress.encode.encoded": "the chunk is encoded, its slot is open",
    "compress.encode.published": "the encoded chunk can be read, nobody is told",
    "compress.encode.freed": "every tier has answered, the ring slot is free",
    "compress.decode.opened": "the arena slot is open, nothing is decoded",
    "compress.decode.decoded": "the chunk is decoded, its slot is not closed",
    "compress.decode.closed": "the arena slot is READY, gather is not told",
    "ring.publish.closed": "a ring slot is READY, not COMMITTED",
    "persist.save.held": "slots are held, nothing is written",
    "persist.save.settled": "rows are in, nobody is told",
    "ssd.write.begun": "chunks are about to be written",
    "ssd.write.written": "chunks are written, not flushed and without rows",
    "ssd.settle.begun": "what was written is about to be flushed",
    "ssd.settle.flushed": "what was written is flushed, without rows",
    "ssd.create.made": "a segment file is there with its space, without a header",
    "ssd.seal.begun": "a segment file is full, the footer is not written",
    "ssd.seal.written": "the footer is written, the file is not cut to length",
    "ssd.reclaim.unindexed": "the rows of the oldest file are gone, the file is there",
    "ssd.forget.unindexed": "rows are gone, the tombstone is not written",
    "ssd.forget.written": "the tombstone is flushed, nobody is told",
    "ssd.read.begun": "a chunk is about to be read",
    "ssd.read.verified": "a chunk is read and verified",
    "ssd.recover.scanned": "after a restart: the files are read, no row is written",
    "landing.opened": "a loaded chunk's destination is open",
    "landing.closed": "a loaded chunk's destination is complete, nobody is told",
    "remote.ask.begun": "the store is about to be asked for something",
    "remote.put.stored": "an object is stored, without a row",
    "remote.put.indexed": "an object has its row, nobody is told",
    "remote.evict.unindexed": "rows of old objects are gone, the objects are there",
    "remote.get.verified": "an object is fetched and verified",
}
_SAYS: Mapping[str, tuple[type[m.Message], ...]] = {
    "producer": (m.Register, m.Save, m.Load, m.Prefetch, m.Cancel, m.Touch, m.Pin, m.Invalidate, m.Release),
    "gather.up": (
        *(m.Registered, m.Saved, m.SaveDropped, m.Persisted, m.Loaded, m.LoadFailed, m.Pinned, m.Invalidated),
        *(m.Credit, m.Evicted, m.Refused),
    ),
    "gather.down": (m.Save, m.Load, m.Invalidate),
    **dict.fromkeys(("compress.down", "persist.down"), (m.Save, m.Load, m.Cancel, m.Release, m.Invalidate)),
    **dict.fromkeys(
        ("compress.up", "persist.up", "replicate.up"),
        (m.Persisted, m.SaveDropped, m.Loaded, m.LoadFailed, m.Invalidated, m.Evicted),
    ),
}

MESSAGES = tuple(f"{sender}.{kind.__name__}" for sender, kinds in _SAYS.items() for kind in kinds)
"""A message is about to be sent: by whom, in which direction, and which."""

POINTS: Mapping[str, str] = {**_PRODUCER, **_WORKERS, **dict.fromkeys(MESSAGES, "this message is about to be sent")}
"""Every failpoint, with what was done just before it."""

_RULE = re.compile(
    r"(?P<name>[\w.]+)=(?P<action>[a-z]+)(:(?P<argument>[\w.]+))?"
    r"(@(?P<first>\d+))?(\*(?P<most>\d+))?(%(?P<chance>[\d.]+)/(?P<seed>\d+))?"
)


class Fired(NamedTuple):
    """One act, as `<file>.fired` has it."""

    name: str
    action: str
    pid: int


def actions(name: str) -> tuple[str, ...]:
    """What may be done at a failpoint."""
    if name in _PRODUCER:
        return WORKER if name.startswith("producer.save.") else ENGINE
    return ON_MESSAGES if name in MESSAGES else WORKER


@dataclass(slots=True)
class Rule:
    """What is to be done at one failpoint. Counts for itself; `most` 0: any number of times."""

    name: str
    action: str
    argument: str = ""
    first: int = 1
    most: int = 0
    chance: float = 1.0
    seed: int = 0
    _hits: int = 0
    _draw: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self._draw.seed(self.seed)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """One rule.

        Raises:
            ValueError: it is none; the text says why.
        """
        found = _RULE.fullmatch(text)
        if found is None:
            raise ValueError(f'"{text}" is not NAME=ACTION[:ARGUMENT][@N][*K][%P/SEED]')
        name, action, argument = found["name"], found["action"], found["argument"] or ""
        if name not in POINTS:
            raise ValueError(f'no failpoint "{name}"{nearest(name, POINTS)}')
        if action not in actions(name):
            possible = ", ".join(actions(name))
            raise ValueError(f'{name}: no action "{action}"{nearest(action, actions(name))}; possible are {possible}')
        if action == "error" and argument not in errno.errorcode.values():
            raise ValueError(f'{name}: "{argument}" is no error number{nearest(argument, errno.errorcode.values())}')
        if action in ("sleep", "late"):
            float(argument)
        most, chance = int(found["most"] or 0), float(found["chance"] or 1.0)
        return cls(name, action, argument, int(found["first"] or 1), most, chance, int(found["seed"] or 0))

    def is_due(self) -> bool:
        """Count one hit; whether it is one of those that are meant."""
        self._hits += 1
        return self._hits >= self.first and (self.chance >= 1.0 or self._draw.random() < self.chance)


def parse(text: str) -> dict[str, Rule]:
    """Rules by name. Raises ValueError for one that is none."""
    parts = [part.strip() for line in text.splitlines() for part in line.split(";")]
    return {rule.name: rule for rule in (Rule.parse(part) for part in parts if part and not part.startswith("#"))}


class Control:
    """A file of rules, as a test writes it and processes read it; beside it stands what they did."""

    def __init__(self, path: Path) -> None:
        self.path, self._log = path, path.with_name(f"{path.name}.fired")

    def arm(self, *rules: str) -> None:
        """These rules, and no others, from now on. Raises ValueError for one that is none."""
        text = "\n".join(rules)
        parse(text)
        fresh = self.path.with_name(f"{self.path.name}.new")
        fresh.write_text(text)
        fresh.replace(self.path)

    def clear(self) -> None:
        """Nothing from now on, and nothing was done."""
        self.arm()
        self._log.unlink(missing_ok=True)

    def fired(self) -> list[Fired]:
        """What was done since `clear`."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [Fired(name, action, int(pid)) for name, action, pid in (line.split() for line in lines)]

    def note(self, rule: Rule) -> bool:
        """Note an act that is about to be done. False: it was done as often as the rule allows."""
        with self._log.open("a+") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # the kernel ends it with the descriptor, or with the process
            log.seek(0)
            done = sum(line.split()[:2] == [rule.name, rule.action] for line in log)
            if rule.most and done >= rule.most:
                return False
            log.write(f"{rule.name} {rule.action} {os.getpid()}\n")
        return True


class _Armed:
    """The rules of this process."""

    def __init__(self, source: str) -> None:
        self._control = Control(Path(source)) if source.startswith("/") else None
        self._rules = {} if self._control else parse(source)
        self._done: dict[str, int] = {}
        self._seen: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._kept = threading.local()

    def due(self, name: str) -> Rule | None:
        """The rule to be carried out here and now; it is noted."""
        with self._lock:
            if self._control is not None:
                self._read(self._control.path)
            rule = self._rules.get(name)
            if rule is None or not rule.is_due():
                return None
            if self._control is not None:
                return rule if self._control.note(rule) else None
            self._done[name] = self._done.get(name, 0) + 1
            return rule if not rule.most or self._done[name] <= rule.most else None

    def _read(self, path: Path) -> None:
        try:
            stat = path.stat()
            seen = stat.st_ino, stat.st_mtime_ns
            if seen != self._seen:
                self._rules, self._seen = parse(path.read_text()), seen
        except FileNotFoundError:
            self._rules, self._seen = {}, None

    def hit(self, name: str) -> None:
        """Carry out what is due at a failpoint."""
        rule = self.due(name)
        if rule is not None:
            _act(rule)

    def carry(self, sender: str, message: m.Message, send: Callable[[], bool]) -> bool:
        """Send a message, unless a rule says otherwise; whether it went out, or seems to have."""
        rule = self.due(name) if (name := f"{sender}.{type(message).__name__}") in POINTS else None
        if rule is None:
            return send()
        match rule.action:
            case "drop":
                return True
            case "twice":
                return send() and send()
            case "late":
                self._waiting().append((time.monotonic() + float(rule.argument), send))
                return True
            case _:
                _act(rule)
                return send()

    def deliver(self) -> None:
        """Send what was kept back by this thread and is due."""
        waiting, now_s = self._waiting(), time.monotonic()
        for item in [item for item in waiting if item[0] <= now_s]:
            waiting.remove(item)
            item[1]()

    def _waiting(self) -> list[tuple[float, Callable[[], bool]]]:
        if not hasattr(self._kept, "waiting"):
            self._kept.waiting = list[tuple[float, Callable[[], bool]]]()
        return self._kept.waiting


def _act(rule: Rule) -> None:
    if rule.action == "sleep":
        time.sleep(float(rule.argument))
    elif rule.action == "error":
        number = next(number for number, name in errno.errorcode.items() if name == rule.argument)
        raise OSError(number, f"{os.strerror(number)} (failpoint {rule.name})")
    else:  # to this very thread: it does not go one instruction further
        number = signal.SIGKILL if rule.action == "kill" else signal.SIGSTOP
        signal.pthread_kill(threading.get_ident(), number)


def _nothing(name: str) -> None:
    pass


def _at_once(sender: str, message: m.Message, send: Callable[[], bool]) -> bool:
    return send()


def _no_delivery() -> None:
    pass


_armed = _Armed(source) if (source := os.environ.get(VARIABLE, "")) else None

on = _armed is not None
"""Whether this process was started with failpoints."""
hit: Callable[[str], None] = _armed.hit if _armed else _nothing
"""`hit(name)` stands between two steps."""
carry: Callable[[str, m.Message, Callable[[], bool]], bool] = _armed.carry if _armed else _at_once
"""`carry(sender, message, send)` stands around the sending of a message."""
deliver: Callable[[], None] = _armed.deliver if _armed else _no_delivery
"""To be called in every turn of a loop that sends messages."""
