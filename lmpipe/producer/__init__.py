"""The engine's side of lmpipe: look up, load, save. Knows no engine, never blocks one, never fails one.

    producer = Producer(run_dir, layout, model="llama-3-8b")
    prompt = producer.prompt(token_ids)                       # hashed once
    with producer.lookup(prompt) as found:                    # in this process: no socket, no lock shared with a writer
        loaded = producer.load(found, pool, page_ids)         # copied by this process; loaded.tokens are in the pages
    …compute the rest…
    ticket = producer.save(prompt, pool, page_ids)            # returns at once

When lmpipe is absent every lookup misses and every save is dropped, each counted; when it comes (back), the producer
registers again by itself. All methods may be called from any thread, but a `Prompt` belongs to one thread at a time.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lmpipe import messages as m
from lmpipe.books import NamespaceBook
from lmpipe.errors import LayoutError
from lmpipe.handles import ChunkRecords, Fidelity, SessionId, Tier
from lmpipe.keys import Extra, Namespace, Prompt, namespace_id
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.producer.accounts import Accounts, Event
from lmpipe.producer.admission import Admission
from lmpipe.producer.attachment import TIERS, Attachment, Found, Wanted
from lmpipe.producer.layers import LayerLoad, LoadResult
from lmpipe.producer.link import LeasePool, Link, slots_of
from lmpipe.producer.loading import Loader
from lmpipe.producer.pools import Pool
from lmpipe.producer.saving import PageIds, Saver, SaveTicket, chunk_records
from lmpipe.producer.wanted import ANY_FIDELITY
from lmpipe.wire import VERSION

__all__ = ["Found", "LayerLoad", "LoadResult", "MappedPages", "Producer", "SaveTicket"]

log = logging.getLogger("lmpipe.producer")

MappedPages = m.PageSource
CLOSE_S = 5.0
INVALIDATE_RETRY_S = 0.05

_EMPTY = np.empty(0, np.uint8)


class Producer:
    """One engine rank's (and cache group's) access to a node.

    Args:
        run_dir: the node's run directory; need not exist yet.
        layout: this rank's KV layout.
        model, revision, tenant, weights_epoch, rope, adapter, cache_salt: what KV depends on besides tokens; see
            `keys.Namespace`.
        root: the namespace instead, where an engine's ranks and cache groups share one; its chunk size is not used.
        chunk_tokens: tokens of a chunk, a multiple of the layout's page; None: the node's setting (256 until a node is
        seen), rounded up to a multiple of the page and of `align_tokens`.
        shard, shards: which part of each chunk's KV this rank holds.
        pages: the engine's pages where they lie in a named shared segment, or on a GPU: gather then copies them for
        saves. On a GPU `cuda.ipc.ExportedPages` makes it, and has to be marked before each save.
        saves: whether slots are wanted for saving private pages.
        copy_threads: native threads for each direction of copying.
        ttl_s: how long saved chunks stay valid; 0 for ever.
        exact: never take chunks that lost information, or were computed on such (`Fidelity`); else only where the
        topology or a lookup asks for it.

    Raises:
        LayoutError: the layout's pages do not divide the chunk.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        layout: KVLayout,
        *,
        model: str = "",
        revision: str = "",
        tenant: str = "default",
        weights_epoch: int = 0,
        rope: str = "",
        adapter: str = "",
        cache_salt: str = "",
        root: Namespace | None = None,
        name: str = "engine",
        chunk_tokens: int | None = None,
        align_tokens: int = 1,
        shard: int = 0,
        shards: int = 1,
        pages: MappedPages | m.DeviceSource | None = None,
        saves: bool = True,
        copy_threads: int = 1,
        ttl_s: int = 0,
        exact: bool = False,
        wait_s: float = 0.0,
    ) -> None:
        if not 0 <= shard < shards:
            raise LayoutError(f"shard {shard} is not one of {shards}")
        if root is None and not model:
            raise ValueError("a producer needs the name of its model: it is part of every key")
        self.layout, self.name = layout, name
        self._root = root or Namespace(
            model, revision, layout.layout_id(), layout.dtype, 0, tenant, weights_epoch, rope, adapter, cache_salt
        )
        self._shard, self._shards, self._pages, self._saves = shard, shards, pages, saves
        self._exact = exact
        self._configured_chunk, self._align = chunk_tokens, align_tokens
        self._set_chunk(chunk_tokens or layout.effective_chunk_tokens(CHUNK_TOKENS, align_tokens))
        self._ids = itertools.count(int.from_bytes(os.urandom(4), "little") << 24 | 1)
        self._accounts = Accounts(name)
        self.admission = Admission()
        self._leases = LeasePool()
        self._link = Link(
            Path(run_dir), self._hello, self._on_message, self._on_ready, self._on_lost, self._accounts.publish
        )
        self._link.asked = lambda answered: self._accounts.count(lookups_by_message=1, lookups_unanswered=not answered)
        self._loader = Loader(self._link, copy_threads)
        self._saver = Saver(self._link, self._leases, lambda: self._wanted, copy_threads, ttl_s)
        self._link.start()
        self._closed = False
        if wait_s:
            self.wait_ready(wait_s)

    def _set_chunk(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.chunk_pages = self.layout.chunk_pages(chunk_tokens)
        self.chunk_bytes = self.layout.chunk_bytes(chunk_tokens)
        self.namespace = replace(self._root, chunk_tokens=chunk_tokens).digest()
        layout = self.layout.layout_id()
        self._wanted = Wanted(layout, self.chunk_bytes, self._shard, self._shards, ANY_FIDELITY)
        self._exactly = Wanted(layout, self.chunk_bytes, self._shard, self._shards)

    def renew(self, weights_epoch: int) -> None:
        """The engine's weights are others from now on: prompts made so far find and save nothing any more."""
        self._root = replace(self._root, weights_epoch=weights_epoch)
        self._set_chunk(self.chunk_tokens)
        if (attachment := self._link.attachment) is not None:
            self._enter_namespace(attachment)

    # State.

    @property
    def state(self) -> str:
        """`ready`, `absent` (looked for at every heartbeat) or `refused` (by this node for good, said once)."""
        return self._link.state

    @property
    def reason(self) -> str:
        """Why the state is not `ready`."""
        return self._link.reason

    @property
    def mapped(self) -> bool:
        """Whether a node's index and arena are mapped: then DRAM hits are served, also while all of lmpipe is dead.
        Where gather is asked for rows instead: whether it is there.
        """
        attachment, state = self._link.attachment, self._link.state
        return attachment is not None and (state == "ready" if attachment.by_message else state != "refused")

    @property
    def exact(self) -> bool:
        """Whether every lookup is exact, because this producer was made so or the node's topology says so."""
        attachment = self._link.attachment
        return self._exact or (attachment is not None and attachment.info.topology.is_exact(self._root.tenant))

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until registered. False: still absent, or refused."""
        return self._link.wait_ready(timeout_s)

    def on(self, event: str, callback: Event) -> None:
        """Call `callback(event, chunk records)` on saved, persisted, loaded, evicted or failed, from lmpipe's thread.

        Raises:
            ValueError: no such event.
        """
        self._accounts.on(event, callback)

    def stats(self) -> dict[str, int]:
        """Counters of this producer since it was made."""
        return self._accounts.snapshot()

    # The three verbs of an engine.

    def prompt(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        extras: Iterable[Extra] = (),
        *,
        adapter: str = "",
        cache_salt: str = "",
    ) -> Prompt:
        """Hash a request's confirmed tokens, once; `Prompt.extend` adds more. `adapter`, `cache_salt`: this request's.

        Raises:
            UnsupportedError: an extra of unknown kind: do not cache this request.
            ValueError: not a one-dimensional run of token ids.
        """
        root, namespace = self.namespace, self.namespace
        if adapter or cache_salt:
            own = replace(self._root, chunk_tokens=self.chunk_tokens, adapter=adapter, cache_salt=cache_salt)
            namespace = own.digest()
        return Prompt.of(namespace, self.chunk_tokens, tokens, extras, root)

    def lookup(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        first_chunk: int = 0,
        again: bool = False,
        exact: bool = False,
    ) -> Found:
        """The longest saved run from chunk `first_chunk` on, in whole chunks of at most the prompt's first `max_tokens`
        tokens, its DRAM part held until released or loaded.

        Served from maps of this process: no message, no lock shared with a writer; where the index cannot be mapped
        (another container, another LMDB), by one message within `engines.lookup_deadline_ms`. Any trouble is a miss.
        `again`: another process of this engine has looked it up and decided; it is neither weighed nor counted once
        more. `exact`: only chunks that lost nothing and were computed on such. Else `Found.fidelity` says what is
        found, and what is computed on it has to be saved with the fidelity of the load (`LoadResult.fidelity`).
        """
        limit = prompt.tokens if max_tokens is None else min(max_tokens, prompt.tokens)
        part = prompt.part(first_chunk) if first_chunk else prompt
        found = self._find(part, limit // self.chunk_tokens - first_chunk, exact)
        if not again:
            found = self.admission.admit(found)
            self._accounts.count(lookups=1, lookup_tokens=prompt.tokens, hit_tokens=found.tokens)
        return found

    def _find(self, prompt: Prompt, chunks: int, exact: bool) -> Found:
        attachment = self._link.attachment
        if chunks <= 0 or attachment is None or self._link.state == "refused" or prompt.root != self.namespace:
            return Found(self.chunk_tokens, m.no_chunks(), _EMPTY)
        if not attachment.enter():
            return Found(self.chunk_tokens, m.no_chunks(), _EMPTY)
        try:
            wanted = self._exactly if exact or self.exact else self._wanted
            return attachment.lookup(prompt, chunks, wanted, next(self._ids))
        finally:
            attachment.leave()

    def load(
        self,
        found: Found,
        pool: Pool,
        page_ids: PageIds,
        *,
        deadline_ms: float | None = None,
        after: object = None,
    ) -> LoadResult:
        """Copy found chunks into the engine's pages and release the holds.

        Args:
            page_ids: int32 (chunks, pages of a chunk); -1 skips a page that the engine has already.
            deadline_ms: how long to wait for what lies below DRAM; None: the topology's setting.
            after: of pages on a device, what `pool.mark()` gave on the thread whose stream used them last; None: this
                thread's stream did.

        Returns:
            How many tokens, from the start of the prompt and without a gap, are now in the pages. Never raises for
            trouble in lmpipe.

        Raises:
            ValueError: page ids that are not this pool's, or not of this shape.
        """
        attachment = self._link.attachment
        if deadline_ms is None:
            deadline_ms = attachment.info.topology.engines.load_deadline_ms if attachment is not None else 0
        deadline_ns = time.monotonic_ns() + int(deadline_ms * 1e6)
        self._check_load(found, pool, page_ids)
        records = found.records[: len(page_ids)]
        result = self._loader.load(next(self._ids), found, pool, page_ids, deadline_ns, after)
        self._loaded(records, result)
        return result

    def load_layers(
        self,
        found: Found,
        pool: Pool,
        page_ids: PageIds,
        *,
        deadline_ms: float | None = None,
        after: object = None,
    ) -> LayerLoad:
        """Begin to copy found chunks into pages on a device, first layer first, and return: `wait_layer` has the
        engine's stream wait for a layer, `result` ends the load and releases the holds. Arguments are those of `load`.

        What does not lie in DRAM altogether, or goes into pages of the host, is loaded before this returns.

        Raises:
            ValueError: as `load`.
        """
        self._check_load(found, pool, page_ids)
        told = partial(self._loaded, found.records[: len(page_ids)])
        begun = self._loader.load_layers(found, pool, page_ids, after, told)
        if begun is not None:
            return begun
        return LayerLoad.over(self.load(found, pool, page_ids, deadline_ms=deadline_ms, after=after))

    def _check_load(self, found: Found, pool: Pool, page_ids: PageIds) -> None:
        try:
            self._check(pool, page_ids, found.chunk_tokens, -1)
        except ValueError:
            found.release()
            raise

    def _loaded(self, records: ChunkRecords, result: LoadResult) -> None:
        """Book a load of these chunks."""
        self.admission.observe_load(result)
        self._accounts.count(loads=1, loaded_tokens=result.tokens, loaded_bytes=result.nbytes)
        for tier, chunks in result.by_tier.items():
            self._accounts.count(**{f"hit_chunks_{tier}": chunks})
        if result.chunks:
            self._accounts.emit("loaded", records[: result.chunks])
            self._link.post("load", m.Touch(self._session(), records[: result.chunks]))
        if result.chunks < len(records):
            self._accounts.count(load_failed_chunks=len(records) - result.chunks)
            self._accounts.emit("failed", records[result.chunks :])

    def save(
        self,
        prompt: Prompt,
        pool: Pool | None,
        page_ids: PageIds,
        *,
        first_chunk: int = 0,
        fidelity: int = Fidelity.EXACT,
        exact: bool = False,
    ) -> SaveTicket:
        """Save chunks [first_chunk, first_chunk + len(page_ids)) of a prompt; returns at once.

        `fidelity` is that of what they were computed on: the largest `LoadResult.fidelity` among the loads into their
        prefix. Chunks that are known are not saved again; with `exact`, as for the lookup, those that are known less
        exactly are replaced. With private pages (`pool` given) the memory must stay unchanged until `ticket.copied` is
        set. With mapped pages (`pool` None) call `ticket.revoke()` before the engine gives a page to somebody else.

        Raises:
            ValueError: page ids that are not this pool's or not of this shape, or more chunks than the prompt has keys
            for.
        """
        count = len(page_ids)
        if first_chunk < 0 or first_chunk + count > len(prompt.keys):
            raise ValueError(
                f"chunks [{first_chunk}, {first_chunk + count}) of a prompt with {len(prompt.keys)} whole chunks"
            )
        if pool is None and self._pages is None:
            raise ValueError("no pool given, and this producer was made without mapped pages")
        self._check(pool, page_ids, prompt.chunk_tokens, 0)
        ticket = SaveTicket(next(self._ids), count, book=self._accounts.add)
        self._accounts.count(saves=1, save_chunks=count)
        if not count:
            ticket.count()
        elif prompt.tokens < self.admission.min_tokens:
            self._saver.finish(ticket, "short prompt")
        elif self.state != "ready" or prompt.root != self.namespace:
            self._saver.finish(ticket, "lmpipe absent")
        else:
            self._saver.put(ticket, prompt, first_chunk, pool, page_ids, fidelity, exact or self.exact)
        return ticket

    def _check(self, pool: Pool | None, page_ids: PageIds, chunk_tokens: int, lowest: int) -> None:
        """Refuse, on the caller's thread, what no copy may be made with."""
        if not len(page_ids):
            return
        pages = self.layout.chunk_pages(chunk_tokens)
        if page_ids.shape != (len(page_ids), pages) or page_ids.dtype != np.int32:
            raise ValueError(f"page_ids must be int32 (chunks, {pages}), got {page_ids.dtype} {page_ids.shape}")
        most = pool.pages if pool is not None else self._pages.pages if self._pages is not None else 0
        if page_ids.min() < lowest or page_ids.max() >= most:
            raise ValueError(f"page ids from {page_ids.min()} to {page_ids.max()}, the pool has {most} pages")
        if pool is not None and pool.bytes_per_page * pages != self.layout.chunk_bytes(chunk_tokens):
            raise ValueError(f"a pool of {pool.bytes_per_page} bytes for each page is not of this producer's layout")

    # The rest of the verbs.

    def prefetch(self, prompt: Prompt, *, exact: bool = False) -> int:
        """Ask for what lies below DRAM to be brought up. Returns the number of chunks asked for."""
        with self.admission.admit(self._find(prompt, len(prompt.keys), exact)) as found:
            below = found.records[found.tiers != 0]
        return len(below) if len(below) and self._link.post("load", m.Prefetch(self._session(), below)) else 0

    def cancel(self, ticket: SaveTicket) -> None:
        """Stop a save: what is not committed yet is discarded."""
        ticket.revoke()
        self._saver.finish(ticket, "cancelled")

    def touch(self, prompt: Prompt) -> None:
        """Mark a prompt's chunks as just used."""
        self._link.post("load", m.Touch(self._session(), self._records(prompt)))

    def pin(self, prompt: Prompt, ttl_s: float = 3600.0, timeout_s: float = 2.0) -> int:
        """Keep a prompt's DRAM chunks from eviction for a time. Returns how many are pinned."""
        return self._pin(prompt, True, ttl_s, timeout_s)

    def unpin(self, prompt: Prompt, timeout_s: float = 2.0) -> int:
        """End a pin."""
        return self._pin(prompt, False, 0.0, timeout_s)

    def _pin(self, prompt: Prompt, pin: bool, ttl_s: float, timeout_s: float) -> int:
        ref = next(self._ids)
        answer = self._link.ask(ref, m.Pin(self._session(), ref, pin, self._records(prompt), ttl_s), timeout_s)
        return answer.count if isinstance(answer, m.Pinned) else 0

    def invalidate(self, prompt: Prompt | None = None, timeout_s: float = 10.0) -> int:
        """Remove a prompt's chunks (None: all of this namespace) from every tier, waiting for one that is starting.
        Returns the rows removed, -1 without an answer.
        """
        deadline_s = time.monotonic() + timeout_s
        namespace = int.from_bytes(self.namespace[:8], "little")
        chunks = self._records(prompt) if prompt is not None else m.no_chunks()
        while self._link.state == "ready" and (left_s := deadline_s - time.monotonic()) > 0:
            ref = next(self._ids)
            answer = self._link.ask(ref, m.Invalidate(self._session(), ref, namespace, list(TIERS), chunks), left_s)
            if isinstance(answer, m.Invalidated):
                return answer.removed
            time.sleep(INVALIDATE_RETRY_S)  # refused: a tier below has died, or nobody has heard of it yet
        return -1

    def flush(self, prompt: Prompt | None = None, *, timeout_s: float = 30.0, tiers: Iterable[Tier | str] = ()) -> bool:
        """Wait until all saves are answered and, given a prompt, until its chunks are found in each of `tiers`."""
        end_s = time.monotonic() + timeout_s
        for ticket in list(self._saver.tickets.values()):
            ticket.wait(max(end_s - time.monotonic(), 0.0))
            if not ticket.done:
                return False
        for tier in tiers:
            while prompt is not None and not self._all_in(prompt, Tier(tier)):
                if time.monotonic() > end_s or self.state != "ready":
                    return False
                time.sleep(0.01)
        return True

    def _all_in(self, prompt: Prompt, tier: Tier) -> bool:
        attachment = self._link.attachment
        if attachment is None or not attachment.enter():
            return False
        try:
            return attachment.all_in(tier, prompt.index_keys)
        finally:
            attachment.leave()

    def close(self) -> None:
        """End the session: queued saves are given a few seconds to finish, leases and holds go back, the maps are
        dropped.
        """
        if self._closed:
            return
        self._closed = True
        self._loader.close()
        self.flush(timeout_s=CLOSE_S)
        self._saver.close()
        self._link.close(None)
        self._accounts.close()

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Below: what the link calls back.

    def _session(self) -> SessionId:
        attachment = self._link.attachment
        return attachment.session.id if attachment is not None else SessionId(1)

    def _records(self, prompt: Prompt) -> ChunkRecords:
        return chunk_records(prompt, 0, len(prompt.keys), self._wanted)

    def _enter_namespace(self, attachment: Attachment) -> None:
        """Tell the node whose chunks these will be, where it makes a difference."""
        if attachment.info.topology.tenant(self._root.tenant) is not None:
            NamespaceBook(attachment.info.paths).enter(namespace_id(self.namespace), self._root.tenant)

    def _hello(self, attachment: Attachment) -> m.Register:
        if self._configured_chunk is None:
            chunk = self.layout.effective_chunk_tokens(attachment.info.topology.chunk_tokens, self._align)
            if chunk != self.chunk_tokens:
                self._set_chunk(chunk)
        self._enter_namespace(attachment)
        return m.Register(
            session=attachment.session.id,
            versions=[VERSION],
            role="producer",
            name=self.name,
            pid=os.getpid(),
            layout=asdict(self.layout),
            chunk_tokens=self.chunk_tokens,
            shard=self._shard,
            shards=self._shards,
            namespace=self.namespace.hex(),
            leases=attachment.info.topology.engines.leases if self._saves else 0,
            pages=self._pages,
        )

    def _on_ready(self, attachment: Attachment, message: m.Registered) -> None:
        self.admission.configure(attachment.info.topology.admission)
        self._leases.reset(slots_of(message.leases))
        self._saver.registered_again(attachment.info.topology.answer_s)

    def _on_lost(self, reason: str) -> None:
        self._saver.lost(reason)

    def _on_message(self, message: m.Message) -> None:
        match message:
            case m.Saved():
                self._answered(message.save_id, len(message.chunks), "")
                self._accounts.emit("saved", message.chunks)
            case m.SaveDropped():
                if message.tier is Tier.DRAM:
                    self._answered(message.save_id, len(message.chunks), message.reason)
                else:
                    self._accounts.count(refused_chunks=len(message.chunks))
                self._accounts.emit("failed", message.chunks)
            case m.Persisted():
                self._accounts.count(persisted_chunks=len(message.chunks))
                self._accounts.emit("persisted", message.chunks)
            case m.Credit():
                self._leases.give(slots_of(message.places))
            case m.Evicted():
                self._accounts.count(evicted_chunks=len(message.chunks))
                self._accounts.emit("evicted", message.chunks)
            case m.Refused():
                log.warning("gather refused a %s: %s", message.about, message.reason)
                ticket = self._saver.tickets.get(message.ref)
                if ticket is not None:
                    self._saver.finish(ticket, f"refused: {message.reason}")
            case _:
                self._accounts.count(unexpected_messages=1)

    def _answered(self, save_id: int, chunks: int, reason: str) -> None:
        ticket = self._saver.tickets.get(save_id)
        if ticket is not None:
            ticket.count(saved=0 if reason else chunks, dropped=chunks if reason else 0, reason=reason)
            if ticket.done:
                self._saver.tickets.pop(save_id, None)
