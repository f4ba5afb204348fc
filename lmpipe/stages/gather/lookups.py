"""Lookups by message, for engines that cannot map the index: what each tier has of a prompt.

The answer is what the engine would have read itself, so that its own rules (shards, fidelity, expiry) decide there as
they always do, and its own holds guard what it takes. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lmpipe import messages as m
from lmpipe.handles import CHUNK, SessionId, Tier
from lmpipe.index import BATCH_KEYS, IndexReader
from lmpipe.index_row import RECORD_BYTES
from lmpipe.tiers.dram import DramTier


class Lookups:
    """Reads DRAM's rows where gather has them, those of the tiers below in their indexes."""

    def __init__(self, dram: DramTier, below: dict[Tier, IndexReader]) -> None:
        self._dram, self._below = dram, below

    def answer(self, session: SessionId, lookup: m.Lookup) -> m.Found:
        """Every tier's rows up to the first chunk that none has, as far as one message reaches."""
        rows: list[tuple[int, int, int]] = []
        values: list[bytes] = []
        left = m.MAX_CHUNKS
        for at, each in enumerate(self._rows([key.tobytes() for key in lookup.keys])):
            there = [(tier, value) for tier, value in enumerate(each) if value]
            left -= sum(len(value) // RECORD_BYTES for _, value in there)
            if not there or left < 0:
                break
            rows += [(at, tier, len(value) // RECORD_BYTES) for tier, value in there]
            values += [value for _, value in there]
        table = np.array(rows, np.int32).reshape(len(rows), 3)
        return m.Found(session, lookup.ref, [Tier.DRAM, *self._below], table, np.frombuffer(b"".join(values), CHUNK))

    def _rows(self, keys: list[bytes]) -> Iterator[tuple[bytes | None, ...]]:
        """For each key the value that each tier has; read in batches, because most lookups end soon."""
        for at in range(0, len(keys), BATCH_KEYS):
            batch = keys[at : at + BATCH_KEYS]
            dram = [row.value if (row := self._dram.row(key)) is not None else None for key in batch]
            yield from zip(dram, *(reader.rows(batch) for reader in self._below.values()), strict=True)
