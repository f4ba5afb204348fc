"""One call of `generate` through the cache: load what all rows have, and afterwards save what is new.

The rows of a batch share one cache tensor per layer, so what is loaded is a common number of columns: for each row its
padding (zeros, masked),
then its longest saved prefix; the row with the least decides. Knows neither models nor refusals.
"""

from __future__ import annotations

import copy
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from lmpipe.engines import transformers_cache as kv
from lmpipe.engines.adapter import RequestInfo
from lmpipe.engines.transformers_memory import LoadTensors, page_ids
from lmpipe.engines.transformers_producers import Opened
from lmpipe.engines.transformers_request import Request, Row
from lmpipe.errors import UnsupportedError
from lmpipe.handles import Fidelity, Tier
from lmpipe.keys import Prompt
from lmpipe.producer import Found, SaveTicket

SAVES_IN_FLIGHT = 16
"""Saves whose tensors are still being read; beyond this a save is dropped, so that memory stays bounded."""
COPIED_S = 5.0
"""How long generate waits for its saves where they hold memory that the next one needs; then they are given up."""


@dataclass(slots=True)
class _Row:
    """One prompt on its way: its keys, how many of its tokens were loaded, and how exact those are."""

    row: Row
    prompt: Prompt
    loaded: int = 0
    fidelity: int = Fidelity.EXACT


class Pass:
    """Looks up at once; `load`, then generate with `cache`, then `save`."""

    def __init__(
        self,
        request: Request,
        opened: Opened,
        new_cache: Callable[[], DynamicCache],
        exact: bool,
    ) -> None:
        self.request, self._exact, self._new_cache = request, exact, new_cache
        self.producer, self._shape, self._memory = opened.producer, opened.shape, opened.memory
        self._started = time.perf_counter()
        self.cache = new_cache()
        self._rows = [_Row(row, self.producer.prompt(row.tokens)) for row in request.rows]
        self.info = RequestInfo(prompt_tokens=sum(len(row.tokens) for row in request.rows))

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not loaded."""
        return self.info.prompt_tokens - sum(row.loaded for row in self._rows)

    def forget(self) -> None:
        """After a failed load: nothing was loaded."""
        self.cache = self._new_cache()
        self.info = RequestInfo(prompt_tokens=self.info.prompt_tokens, reason="load failed")
        for row in self._rows:
            row.loaded, row.fidelity = 0, Fidelity.EXACT

    @torch.no_grad()
    def load(self, deadline_ms: int | None) -> None:
        """Look up all rows and fill the cache with what they have in common; at least one column is left to compute."""
        found = [self.producer.lookup(row.prompt, exact=self._exact) for row in self._rows]
        looked = time.perf_counter()
        try:
            columns = min(row.row.pad + hit.tokens for row, hit in zip(self._rows, found, strict=True))
            columns = min(columns, self.request.columns - 1)
            self.info = replace(self.info, lookup_ms=(looked - self._started) * 1e3, reason="miss")
            # Columns that are padding in every row are no gain.
            if columns > min(row.row.pad for row in self._rows):
                self._fill(found, columns, deadline_ms)
                self.info = replace(self.info, load_ms=(time.perf_counter() - looked) * 1e3)
        finally:
            for hit in found:
                hit.release()

    def _fill(self, found: list[Found], columns: int, deadline_ms: int | None) -> None:
        tensors = LoadTensors(self._shape, self._memory, len(self._rows), columns)
        chunk = self.producer.chunk_tokens
        tiers: Counter[Tier] = Counter()
        reached, loaded_bytes, shortfall = columns, 0, ""
        for index, (row, hit) in enumerate(zip(self._rows, found, strict=True)):
            pad = row.row.pad
            tensors.clear_padding(index, min(pad, columns))
            chunks = -(-max(columns - pad, 0) // chunk)
            pages = page_ids(chunks, chunk, pad, columns)
            result = self.producer.load(hit, tensors.pool(index), pages, deadline_ms=deadline_ms)
            row.fidelity = result.fidelity
            reached = min(reached, pad + result.tokens)
            loaded_bytes += result.nbytes
            shortfall = shortfall or result.reason
            tiers.update(result.by_tier)
        for row in self._rows:
            row.loaded = max(reached - row.row.pad, 0)
        hits = sum(row.loaded for row in self._rows)
        if not hits:
            for row in self._rows:
                row.fidelity = Fidelity.EXACT
            self.info = replace(self.info, reason=f"miss: {shortfall}")
            return
        tensors.into(self.cache, reached, self.request.expand)
        self.info = replace(
            self.info,
            hit_tokens=hits,
            hit_by_tier={tier: chunks * chunk for tier, chunks in tiers.items()},
            fidelity=max(row.fidelity for row in self._rows),
            loaded_bytes=loaded_bytes,
            reason=f"loaded in part: {shortfall}" if shortfall else "loaded",
        )

    @torch.no_grad()
    def save(self, sequences: torch.Tensor, answers: bool, tickets: deque[SaveTicket]) -> None:
        """Hand new chunks to the producer: of prompts, and of `answers` where the KV is in the sequences' order.

        Raises:
            UnsupportedError: the cache is not what this generate should have left; nothing is saved.
        """
        started = time.perf_counter()
        request = self.request
        layers = kv.full_layers(self.cache)
        batch, _, columns, _ = layers[0][0].shape
        expected = columns if request.beams else sequences.shape[1] - 1
        if batch != len(self._rows) * request.expand or columns != expected or columns < request.columns:
            raise UnsupportedError(f"the cache has {batch} rows of {columns} columns, which is not what was generated")
        # After a beam search rows are not in the order of the sequences; the prompts' parts are alike in any order.
        answers = answers and not request.beams
        seen: set[bytes] = set()
        saved: list[SaveTicket] = []
        for index, row in enumerate(self._rows):
            for twin in range(request.expand if answers else 1):
                at = index * request.expand + twin
                prompt = row.prompt
                if answers:
                    prompt = copy.deepcopy(prompt) if twin + 1 < request.expand else prompt
                    answer = sequences[at, request.columns : columns].cpu().numpy()
                    prompt.extend(_without_padding(answer, request.pad_token) if len(sequences) > 1 else answer)
                saved += self._save_row(prompt, layers, at, row, seen, tickets)
        if saved and not self._memory.has_room(sum(keys.nbytes + values.nbytes for keys, values in layers)):
            self._wait_copied(saved)
        tokens = sum(ticket.chunks for ticket in saved) * self.producer.chunk_tokens
        self.info = replace(self.info, saved_tokens=tokens, save_ms=(time.perf_counter() - started) * 1e3)

    def _wait_copied(self, saved: list[SaveTicket]) -> None:
        """Hold generate up rather than let the next one of this size run out of memory, which saves still keep."""
        end_s = time.monotonic() + COPIED_S
        for ticket in saved:
            if not ticket.copied.wait(max(end_s - time.monotonic(), 0.0)):
                self.producer.cancel(ticket)

    def _save_row(
        self,
        prompt: Prompt,
        layers: kv.Layers,
        at: int,
        row: _Row,
        seen: set[bytes],
        tickets: deque[SaveTicket],
    ) -> list[SaveTicket]:
        """Save what of a row is neither loaded nor saved by an earlier row, in one save or none."""
        chunk = self.producer.chunk_tokens
        first = row.loaded // chunk
        while first < len(prompt.index_keys) and prompt.index_keys[first] in seen:
            first += 1
        chunks = len(prompt.index_keys) - first
        while tickets and tickets[0].copied.is_set():
            tickets.popleft()
        if chunks <= 0 or prompt.root != self.producer.namespace or len(tickets) >= SAVES_IN_FLIGHT:
            return []
        seen.update(prompt.index_keys[first:])
        start = row.row.pad + first * chunk
        pool = self._memory.pool(layers, at, start, start + chunks * chunk, writable=False)
        pages = page_ids(chunks, chunk, 0, chunks * chunk)
        # What was computed on chunks that lost something is no more exact than they are.
        ticket = self.producer.save(prompt, pool, pages, first_chunk=first, fidelity=row.fidelity, exact=self._exact)
        tickets.append(ticket)
        return [ticket]


def _without_padding(answer: Any, pad_token: int | None) -> Any:
    """An answer up to the first token of the padding that follows a row which ended before the others."""
    end = len(answer)
    while pad_token is not None and end and int(answer[end - 1]) == pad_token:
        end -= 1
    return answer[: min(end + 1, len(answer))]
