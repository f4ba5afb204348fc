import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

@dataclass
class KVConnectorTransferResults:
    finished_sending: set[str] = field(default_factory=set[str])
    finished_recving: set[str] = field(default_factory=set[str])
    failed_recving: set[str] = field(default_factory=set[str])

class SupportsHMA(ABC):
    @abstractmethod
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]: ...

class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1

class KVConnectorHandshakeMetadata(ABC): ...
class KVConnectorMetadata(ABC): ...

class KVConnectorWorkerMetadata(ABC):
    @abstractmethod
    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata: ...

class KVConnectorBase_V1(ABC):
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None: ...
    @property
    def requires_kv_delivery(self) -> bool: ...
    def _get_connector_metadata(self) -> KVConnectorMetadata: ...
