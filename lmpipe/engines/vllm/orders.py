"""What the scheduler's side tells the workers with each step, and what they answer. Pickled by vLLM, never by us."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmpipe.keys import Namespace
from lmpipe.layout import KVLayout
from lmpipe.producer import LoadResult

Keys = npt.NDArray[np.uint8]
"""(chunks, 16)."""
BlockIds = npt.NDArray[np.int32]
"""(chunks, blocks of a chunk); -1 where the engine has, or needs, no block."""


@dataclass(frozen=True, slots=True)
class Handshake(KVConnectorHandshakeMetadata):
    """What the scheduler has to know of a worker: its layouts by cache group, and whose shard they are."""

    root: Namespace
    layouts: tuple[KVLayout, ...]
    windowed: tuple[bool, ...]
    """By cache group: whether the engine takes blocks back from requests that still run."""
    align_tokens: int
    shards: int


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Save chunks [first, first + n) of a request, which its pages hold after this step."""

    order: int
    request: str
    keys: Keys
    """From the prompt's start to the last chunk that is saved."""
    first: int
    blocks: tuple[BlockIds, ...]
    """By cache group."""
    fidelity: int
    """Of what the chunks were computed on."""
    exact: bool
    """Whether the request asks for exact KV."""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Load chunks [first, len(keys)) into a request's blocks."""

    request: str
    keys: Keys
    first: int
    blocks: tuple[BlockIds, ...]
    exact: bool
    in_step: bool
    """The forward of this very step computes on it; otherwise the request is scheduled when it is through."""


@dataclass(slots=True)
class Orders(KVConnectorMetadata):
    """One step's orders."""

    root: bytes = b""
    """Digest of the namespace that the keys belong to."""
    chunk_tokens: int = 0
    weights_epoch: int | None = None
    """Set by `reset_cache`: the namespace from now on."""
    saves: list[SaveOrder] = field(default_factory=list[SaveOrder])
    loads: list[LoadOrder] = field(default_factory=list[LoadOrder])
    revoked: list[str] = field(default_factory=list[str])
    """Requests whose pages may be given to others from this step on."""
    late: list[int] = field(default_factory=list[int])
    """Save orders of requests that go on, but some of whose pages may be given to others from the next step on."""
    delayed: list[str] = field(default_factory=list[str])
    """Finished requests whose blocks stay until their saves are through."""
    prefill_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One rank's load, all cache groups together."""

    request: str
    wanted_chunks: int
    result: LoadResult
    in_step: bool

    @property
    def failed(self) -> bool:
        """Whether something of it has to be computed."""
        return self.result.chunks < self.wanted_chunks


@dataclass(slots=True)
class Reports(KVConnectorWorkerMetadata):
    """What the workers have to say after a step."""

    settled: dict[int, tuple[int, bool]] = field(default_factory=dict[int, tuple[int, bool]])
    """By save order: how many ranks have its answer, and whether all of it can be found."""
    loads: list[LoadReport] = field(default_factory=list[LoadReport])
    prefill: tuple[int, float] = (0, 0.0)
    """Prompt tokens computed in this step, and the seconds it took."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reports:
        """One answer of several ranks."""
        assert isinstance(other, Reports)
        settled = dict(self.settled)
        for order, (ranks, whole) in other.settled.items():
            before, all_whole = settled.get(order, (0, True))
            settled[order] = before + ranks, all_whole and whole
        prefill = max(self.prefill, other.prefill, key=lambda p: p[1])
        return Reports(settled, self.loads + other.loads, prefill)

    def __bool__(self) -> bool:
        return bool(self.settled or self.loads or self.prefill[0])
