"""Two processes over one file: `evictor` overwrites slots that nobody holds, `reader` holds slots and reads them.

    python holds_torture.py (prepare | evictor | reader) FILE ROUNDS

Layout: 0 state words, 4096 hold table, 8192 finished word, 16384 payloads. A payload is its generation, everywhere.
Prints one line of JSON.
"""

import json
import mmap
import random
import sys
from pathlib import Path

import numpy as np

from lmpipe import native

SLOTS, HOLDS, PAYLOAD_BYTES = 4, 16, 16 * 1024
HOLD_TABLE, FINISHED, PAYLOADS = 4096, 8192, 16384
FILE_BYTES = PAYLOADS + SLOTS * PAYLOAD_BYTES
WRITING, COMMITTED, DOOMED = 1, 2, 3


def evict(memory: mmap.mmap, rounds: int) -> dict[str, int]:
    states = native.Words(memory, 0, SLOTS)
    holds = native.Words(memory, HOLD_TABLE, 2 * HOLDS)
    finished = native.Words(memory, FINISHED, 1)
    payloads, source = native.Region(memory), np.zeros(PAYLOAD_BYTES // 8, np.uint64)
    pool = native.PagePool(
        [native.Region(source)],
        np.zeros(1, np.uint32),
        np.zeros(1, np.uint64),
        np.full(1, PAYLOAD_BYTES, np.uint64),
        np.full(1, PAYLOAD_BYTES, np.uint64),
        1,
    )
    copier = native.Copier(1)
    evicted = kept = 0
    while not finished.load(0) and evicted + kept < 50 * rounds:
        slot = random.randrange(SLOTS)
        generation = states.load(slot) >> 8
        if not states.cas(slot, generation << 8 | COMMITTED, generation << 8 | DOOMED):
            continue
        native.fence()
        words = holds.snapshot()[::2]
        if np.any((words >> np.uint64(32) == slot) & (words != 0)):
            states.store(slot, generation << 8 | COMMITTED)
            kept += 1
            continue
        generation += 1
        states.store(slot, generation << 8 | WRITING)
        native.fence()
        source[:] = generation
        copier.gather(
            pool,
            np.zeros((1, 1), np.int32),
            payloads,
            np.array([PAYLOADS + slot * PAYLOAD_BYTES], np.uint64),
        )
        states.store(slot, generation << 8 | COMMITTED)
        evicted += 1
    return {"evicted": evicted, "kept": kept}


def read(memory: mmap.mmap, rounds: int) -> dict[str, int]:
    states = native.Words(memory, 0, SLOTS)
    headers = native.Headers(memory, 0, 8, SLOTS)
    table = native.HoldTable(memory, HOLD_TABLE, HOLDS)
    payload = np.frombuffer(memory, np.uint64, offset=PAYLOADS).reshape(SLOTS, -1)
    held = refused = torn = 0
    while held < rounds:
        slot = random.randrange(SLOTS)
        generation = states.load(slot) >> 8 & 0xFFFFFFFF
        entries = table.take(headers, np.array([slot], np.uint32), np.array([generation], np.uint32), COMMITTED, held)
        if not len(entries):
            refused += 1
            continue
        torn += int(not np.all(payload[slot] == generation))
        table.release(entries)
        held += 1
    native.Words(memory, FINISHED, 1).store(0, 1)
    return {"held": held, "refused": refused, "torn": torn}


def prepare(memory: mmap.mmap, rounds: int) -> dict[str, int]:
    np.frombuffer(memory, np.uint64, offset=PAYLOADS)[:] = 1
    states = native.Words(memory, 0, SLOTS)
    for slot in range(SLOTS):
        states.store(slot, 1 << 8 | COMMITTED)
    return {}


def main(role: str, path: str, rounds: str) -> None:
    with Path(path).open("r+b") as file:
        file.truncate(FILE_BYTES)
        memory = mmap.mmap(file.fileno(), FILE_BYTES)
    print(json.dumps({"prepare": prepare, "evictor": evict, "reader": read}[role](memory, int(rounds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
