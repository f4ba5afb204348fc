"""Faults of files: bits that flip, tails that are torn, objects that lie, disks that are full, leftovers of former
lives.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np

from lmpipe.lifecycle import SlotState
from lmpipe.shm.descriptor import HEADER_BYTES, SegmentKind
from lmpipe.shm.segment import Segment
from lmpipe.shm.session import SessionDir
from lmpipe.shm.table import SlotTable

from .faults import fault, kill_everything
from .world import World

BLOCK = 4096


def flip(path: Path, offset: int, bit: int) -> None:
    """One bit of a file, in place."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, offset)
        if byte:
            os.pwrite(descriptor, bytes([byte[0] ^ 1 << bit]), offset)
    finally:
        os.close(descriptor)


@fault(4, breaks="ssd")
def flip_segment(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Bits of segment files, where something was written."""
    done: list[str] = []
    for path in draw.sample(found := sorted(world.ssd.glob("*.seg")), min(2, len(found))):
        with contextlib.suppress(FileNotFoundError):
            data = np.fromfile(path, np.uint8)
            used = np.flatnonzero(data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK).any(axis=1))
            for _ in range(16 if len(used) else 0):
                at = int(draw.choice(used)) * BLOCK + draw.randrange(BLOCK)
                flip(path, at, draw.randrange(8))
                done.append(f"{path.name}:{at}")
    return {"at": done} if done else None


@fault(1, breaks="ssd")
def tear(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Everything dies, and of the file written last the end is missing."""
    kill_everything(world)
    found = sorted(world.ssd.glob("*.seg"))
    if not found:
        return None
    data = found[-1].read_bytes()
    used = len(data.rstrip(b"\0"))
    length = draw.randrange(used + 1)
    os.truncate(found[-1], length)
    return {"file": found[-1].name, "used": used, "left": length}


def objects(world: World) -> list[Path]:
    """The remote tier's objects."""
    return sorted(path for path in world.remote.rglob("*") if path.is_file())


@fault(3, breaks="remote")
def remote_lies(world: World, draw: random.Random) -> dict[str, Any] | None:
    """An object has a bit flipped, is cut, or is another one."""
    found = objects(world)
    if len(found) < 2:
        return None
    path, other = draw.sample(found, 2)
    how = draw.choice(("flipped", "cut", "swapped"))
    with contextlib.suppress(OSError):
        if how == "flipped":
            flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
        elif how == "cut":
            os.truncate(path, draw.randrange(path.stat().st_size))
        else:
            shutil.copy(other, path)
    return {"object": path.name, "how": how}


@fault(1, breaks="remote")
def remote_gone(world: World, draw: random.Random) -> dict[str, Any] | None:
    """The whole store is away for a while: a file stands where its directory was."""
    away = world.home / "away"
    if away.exists() or not world.remote.is_dir():
        return None
    world.remote.rename(away)
    world.remote.touch()

    def back() -> None:
        if world.remote.is_dir():  # made anew by who writes
            shutil.rmtree(world.remote)
        else:
            world.remote.unlink(missing_ok=True)
        away.rename(world.remote)

    world.later(draw.choice((0.3, 1.5)), back)
    return {}


@fault(2)
def flip_free_memory(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Bits of the arena that no slot has, while nobody can lease."""
    gathers = [process for process in world.living() if process.name.startswith("gather")]
    if len(gathers) != 1 or not world.stop(gathers[0], 0.05):
        return None
    try:
        arena = SlotTable(Segment.attach(world.node.paths.arena, SegmentKind.SLOTS))
    except OSError:
        return None
    try:
        free = np.ones(arena.segment.nbytes, np.bool_)
        free[: arena.payload_start] = False
        for index in range(arena.slots):
            if arena.state(index)[1] is not SlotState.FREE:
                free[arena.offset(index) : arena.offset(index) + arena.capacity(index)] = False
        places = np.flatnonzero(free)
        for _ in range(64 if len(places) else 0):
            arena.segment.buf[int(draw.choice(places))] ^= 1 << draw.randrange(8)
    finally:
        arena.close()
    return {"of": len(places)}


@fault(3)
def flip_index(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Bits of a tier's LMDB file, which knows no checksums; later its owner dies, and makes the index anew."""
    stage, tier = draw.choice((("gather", "dram"), ("persist", "ssd"), ("replicate", "remote")))
    done: list[int] = []
    for path in world.node.paths.index.glob(f"{tier}-*/data.mdb"):
        with contextlib.suppress(OSError):
            data = np.fromfile(path, np.uint8)
            used = np.flatnonzero(data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK).any(axis=1))
            for _ in range(8 if len(used) else 0):
                done.append(int(draw.choice(used)) * BLOCK + draw.randrange(BLOCK))
                flip(path, done[-1], draw.randrange(8))
    owner = world.node.topology.process_of(stage).name

    def end() -> None:
        for process in world.living():
            if process.name == owner:
                world.kill(process)

    world.later(draw.uniform(0.2, 2.0), end)
    return {"tier": tier, "at": done}


def filled(world: World, directory: Path | None, draw: random.Random) -> dict[str, Any]:
    """All the space that a file system has left is taken for a while."""
    assert directory is not None
    stuffing = directory / "stuffing"
    with stuffing.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    nbytes = stuffing.stat().st_size
    world.later(draw.choice((0.3, 1.0, 3.0)), lambda: stuffing.unlink(missing_ok=True))
    return {"bytes": nbytes}


@fault(2, asks=lambda world: "" if world.disk else "its disk is not a small tmpfs")
def full_disk(world: World, draw: random.Random) -> dict[str, Any] | None:
    """The SSD tier's file system has no room for a while."""
    return filled(world, world.disk, draw)


@fault(2, asks=lambda world: "" if world.shm else "its run directory is not on a small tmpfs")
def full_shm(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Shared memory has no room for a while."""
    return filled(world, world.shm, draw)


@fault(10, asks=lambda world: "" if world.io else "its processes have no failing I/O (not drawn, or no compiler)")
def io(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Calls on a tier's files fail, do half of the work, or are slow for a while."""
    assert world.io is not None
    tier, path = draw.choice((("ssd", world.ssd), ("remote", world.remote)))
    kinds = [
        "write EIO%0.3",
        "write ENOSPC%0.5",
        "write short%0.5",
        "sync EIO%0.5",
        "make ENOSPC%0.5",
        "open EMFILE%0.3",
    ]
    kinds += ["write rate=1000000", "read rate=1000000"]
    if world.shape.damaged == tier:
        kinds += ["read EIO%0.3", "read short%0.3", "read flip%0.1"] * 2
    rule = f"{path} {draw.choice(kinds)}"
    world.io.set(rule)
    world.later(draw.choice((0.2, 1.0)), world.io.clear)
    return {"rule": rule}


@fault(1)
def lose_memory(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Everything dies, and some or all of its shared memory is gone."""
    kill_everything(world)
    paths = world.node.paths
    what = draw.choice(("arena", "arena and words", "index", "run directory"))
    if what == "run directory":
        shutil.rmtree(paths.path, ignore_errors=True)
    elif what == "index":
        shutil.rmtree(paths.index, ignore_errors=True)
    else:
        paths.arena.unlink(missing_ok=True)
        if "words" in what:
            paths.node_shm.unlink(missing_ok=True)
    return {"lost": what}


@fault(1)
def leftovers(world: World, draw: random.Random) -> dict[str, Any] | None:
    """Everything dies, and beside what it left lies more of that kind: torn, empty, or somebody else's."""
    kill_everything(world)
    paths = world.node.paths
    if not paths.path.exists():
        return None
    number = secrets.randbelow(1 << 62) + 1
    litter = {
        paths.ring("persist"): bytes(BLOCK),
        paths.ring("nobody"): b"LMPSEG",
        paths.sessions / f"{number:016x}.lock": b"",
        paths.sessions / f"{number:016x}.holds": bytes(HEADER_BYTES // 2),
        paths.counters / "gather-1.shm": b"",
        paths.up("gather"): f'{{"pid": 1, "session": {number}, "state": "ready"}}'.encode(),
        paths.up("supervisor"): b'{"pid": 1, "state": ',
        paths.node_json: b'{"version": 1, ',
        paths.index / "dram-7" / "data.mdb": bytes(BLOCK),
    }
    for path in draw.sample(sorted(litter), 5):
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(litter[path])
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as stale:
        path = paths.socket("gather", "load")
        path.unlink(missing_ok=True)
        stale.bind(str(path))
    return {"sessions": len(SessionDir(paths.path).ids())}
