"""The producers of one attached model: one for each identity (weights, adapters) it has had. Knows no request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

from transformers import PreTrainedModel

from lmpipe.engines import transformers_cache as kv
from lmpipe.engines.adapter import AttachOptions
from lmpipe.engines.transformers_identity import Identity, ModelIdentity
from lmpipe.errors import UnsupportedError
from lmpipe.producer import Producer
from lmpipe.rundir import RunDir

OPEN = 8
"""Identities whose producers stay open; the least recently used is closed."""


REGISTER_S = 0.5
"""How long to wait for a node that seems to be there."""


class ProducerSet:
    """Finds the producer of the model as it is now. Thread-safe."""

    def __init__(self, model: PreTrainedModel, run_dir: Path, options: AttachOptions) -> None:
        self._model, self._run_dir, self._options = model, run_dir, options
        self._lock = threading.Lock()
        self._inspected: tuple[ModelIdentity, kv.CacheShape] | None = None
        self._unsupported = ""
        self._open: dict[Identity, Producer] = {}
        self._closed_counts: Counter[str] = Counter()
        self._closed = False
        self.latest: Producer | None = None

    def current(self) -> tuple[Producer, kv.CacheShape]:
        """The producer to use, and the shape of what it moves. The first call runs the model on two tiny prompts.

        Raises:
            UnsupportedError: the model cannot be cached rightly, or was detached.
        """
        with self._lock:
            identity_of, shape = self._inspect()
            identity = identity_of.current()
            producer = self._open.pop(identity, None) or self._make(identity, shape)
            self._open[identity] = self.latest = producer
            oldest = self._open.pop(next(iter(self._open))) if len(self._open) > OPEN else None
        if oldest is not None:
            self._close(oldest)
        return producer, shape

    def stats(self) -> Counter[str]:
        """Counters of all producers, summed."""
        with self._lock:
            total = Counter(self._closed_counts)
            for producer in self._open.values():
                total.update(producer.stats())
        return total

    def flush(self, timeout_s: float) -> bool:
        """Wait until every save is answered."""
        end_s = time.monotonic() + timeout_s
        with self._lock:
            producers = list(self._open.values())
        return all(producer.flush(timeout_s=max(end_s - time.monotonic(), 0.0)) for producer in producers)

    def close(self) -> None:
        """Close all producers; queued saves are finished first."""
        with self._lock:
            self._closed, self.latest = True, None
            producers = list(self._open.values())
            self._open.clear()
        for producer in producers:
            self._close(producer)

    def _inspect(self) -> tuple[ModelIdentity, kv.CacheShape]:
        if self._closed:
            raise UnsupportedError("lmpipe was detached")
        if self._unsupported:
            raise UnsupportedError(self._unsupported)
        if self._inspected is None:
            try:
                kv.require_text_decoder(self._model)
                self._inspected = ModelIdentity(self._model, self._options.name), kv.probe(self._model)
            except UnsupportedError as error:
                self._unsupported = str(error)
                raise
        return self._inspected

    def _make(self, identity: Identity, shape: kv.CacheShape) -> Producer:
        options = self._options
        # A moment is enough to register, and saves the first request from being a miss.
        wait_s = REGISTER_S if RunDir(self._run_dir).node_json.exists() else 0.0
        return Producer(
            self._run_dir,
            shape.layout(),
            model=identity.model,
            revision=options.revision,
            tenant=options.tenant,
            weights_epoch=identity.weights,
            rope=identity.rope,
            adapter="|".join(part for part in (options.adapter, identity.adapter) if part),
            cache_salt=options.cache_salt,
            name="transformers",
            copy_threads=options.copy_threads,
            exact=options.exact,
            wait_s=wait_s,
        )

    def _close(self, producer: Producer) -> None:
        producer.close()
        with self._lock:
            self._closed_counts.update(producer.stats())
