import enum
from collections.abc import Sequence
from typing import Any

from vllm.lora.request import LoRARequest

class RequestStatus(enum.IntEnum):
    FINISHED_STOPPED = ...
    FINISHED_LENGTH_CAPPED = ...

class _Position:
    offset: int
    length: int

class _Feature:
    modality: str
    identifier: str
    mm_position: _Position

class Request:
    request_id: str
    status: RequestStatus
    num_computed_tokens: int
    num_prompt_tokens: int
    all_token_ids: Sequence[int]
    block_hashes: list[bytes]
    cache_salt: str | None
    lora_request: LoRARequest | None
    mm_features: list[_Feature]
    prompt_embeds: Any
    prompt_is_token_ids: list[bool] | None
    pooling_params: Any
    resumable: bool
    skip_reading_prefix_cache: bool
    kv_transfer_params: dict[str, Any] | None
    @property
    def num_tokens(self) -> int: ...
    def is_finished(self) -> bool: ...
    def update_block_hashes(self) -> None: ...
