"""The producers of one attached model: one for each identity (weights, adapters) it has had. Knows no request.

Also the choice, made once, of how its KV is moved.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from lmpipe.engines import transformers_cache as kv
from lmpipe.engines.adapter import AttachOptions
from lmpipe.engines.transformers_identity import Identity, ModelIdentity
from lmpipe.engines.transformers_memory import HostMemory, Memory
from lmpipe.errors import DeviceError, DeviceLost, UnsupportedError
from lmpipe.producer import Producer
from lmpipe.rundir import RunDir

OPEN = 8
"""Identities whose producers stay open; the least recently used is closed."""

REGISTER_S = 0.5
"""How long to wait for a node that seems to be there."""

KERNEL_DEVICES = frozenset({"cuda"})
"""Types of torch's devices for which there are kernels; AMD's GPUs are of this type too."""

log = logging.getLogger("lmpipe.transformers")


@dataclass(frozen=True, slots=True)
class Opened:
    """Whom to ask for the model as it is now, the shape of what is moved, and from and to where."""

    producer: Producer
    shape: kv.CacheShape
    memory: Memory


class _Device(Protocol):
    """`transformers_device.Device`, which is imported only for a model on a GPU."""

    def memory(self) -> Memory: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Inspected:
    """What is found out once. `device`: whose kernels move the KV; None: it goes through memory of the host."""

    identity: ModelIdentity
    shape: kv.CacheShape
    device: _Device | None


class ProducerSet:
    """Finds the producer of the model as it is now. Thread-safe."""

    def __init__(
        self,
        model: PreTrainedModel,
        run_dir: Path,
        options: AttachOptions,
        kernel_devices: frozenset[str],
    ) -> None:
        self._model, self._run_dir, self._options = model, run_dir, options
        self._kernel_devices = kernel_devices
        self._lock = threading.Lock()
        self._inspected: _Inspected | None = None
        self._unsupported = ""
        self._open: dict[Identity, Opened] = {}
        self._closed_counts: Counter[str] = Counter()
        self._closed = False
        self.latest: Producer | None = None

    def current(self) -> Opened:
        """What to use for the next request. The first call runs the model on two tiny prompts.

        Raises:
            UnsupportedError: the model cannot be cached rightly, or was detached.
        """
        with self._lock:
            inspected = self._inspect()
            identity = inspected.identity.current()
            opened = self._open.pop(identity, None) or self._make(identity, inspected)
            self._open[identity], self.latest = opened, opened.producer
            oldest = self._open.pop(next(iter(self._open))) if len(self._open) > OPEN else None
        if oldest is not None:
            self._close(oldest)
        return opened

    def stats(self) -> Counter[str]:
        """Counters of all producers, summed."""
        with self._lock:
            total = Counter(self._closed_counts)
            for opened in self._open.values():
                total.update(opened.producer.stats())
        return total

    def flush(self, timeout_s: float) -> bool:
        """Wait until every save is answered."""
        end_s = time.monotonic() + timeout_s
        with self._lock:
            producers = [opened.producer for opened in self._open.values()]
        return all(producer.flush(timeout_s=max(end_s - time.monotonic(), 0.0)) for producer in producers)

    def close(self) -> None:
        """Close all producers; queued saves are finished first."""
        with self._lock:
            self._closed, self.latest = True, None
            all_opened = list(self._open.values())
            self._open.clear()
        for opened in all_opened:
            self._close(opened)
        if self._inspected is not None and self._inspected.device is not None:
            self._inspected.device.close()

    def _inspect(self) -> _Inspected:
        if self._closed:
            raise UnsupportedError("lmpipe was detached")
        if self._unsupported:
            raise UnsupportedError(self._unsupported)
        if self._inspected is None:
            try:
                kv.require_text_decoder(self._model)
                identity, shape = ModelIdentity(self._model, self._options.name), kv.probe(self._model)
                self._inspected = _Inspected(identity, shape, _device_of(shape, self._kernel_devices, self._run_dir))
            except UnsupportedError as error:
                self._unsupported = str(error)
                raise
        return self._inspected

    def _make(self, identity: Identity, inspected: _Inspected) -> Opened:
        options, shape, device = self._options, inspected.shape, inspected.device
        # A moment is enough to register, and saves the first request from being a miss.
        wait_s = REGISTER_S if RunDir(self._run_dir).node_json.exists() else 0.0
        producer = Producer(
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
        return Opened(producer, shape, HostMemory() if device is None else device.memory())

    def _close(self, opened: Opened) -> None:
        opened.producer.close()
        opened.memory.close()
        with self._lock:
            self._closed_counts.update(opened.producer.stats())


def _device_of(shape: kv.CacheShape, kernel_devices: frozenset[str], run_dir: Path) -> _Device | None:
    """The one device on which all KV lies, if kernels can be run there. Why not is said."""
    devices = dict.fromkeys(shape.devices)
    names = ", ".join(map(str, devices))
    known = all(device.type in kernel_devices for device in devices)
    if known and len(devices) == 1:
        try:
            # Needs Triton and CuPy, which nobody has to have without a GPU.
            from lmpipe.engines.transformers_device import Device  # noqa: PLC0415

            return Device(shape, run_dir)
        except (ImportError, DeviceError, DeviceLost) as error:
            why = f"{error}; pip install 'lmpipe[gpu]'" if isinstance(error, ImportError) else str(error)
    else:
        why = "the layers lie on several devices" if known else "there are no kernels for it"
    if any(device.type != "cpu" for device in devices):
        log.warning("the KV on %s goes through memory of the host: %s", names, why)
    return None
