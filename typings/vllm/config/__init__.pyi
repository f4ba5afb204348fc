from typing import Any, Literal

class KVTransferConfig:
    kv_connector_extra_config: dict[str, Any]
    kv_load_failure_policy: Literal["recompute", "fail"]
    @property
    def is_kv_producer(self) -> bool: ...
    @property
    def is_kv_consumer(self) -> bool: ...

class ParallelConfig:
    world_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    decode_context_parallel_size: int
    prefill_context_parallel_size: int

class HfConfig:
    def to_dict(self) -> dict[str, Any]: ...

class ModelConfig:
    model: str
    revision: str | None
    architecture: str
    dtype: Any
    quantization: str | None
    seed: int
    max_model_len: int
    use_mla: bool
    hf_config: HfConfig
    hf_text_config: HfConfig

class SchedulerConfig:
    enable_chunked_prefill: bool
    async_scheduling: bool | None

class CacheConfig:
    block_size: int
    hash_block_size: int | None
    cache_dtype: str

class LoadConfig:
    load_format: str
    download_dir: str | None

class DeviceConfig:
    device_type: str

class SpeculativeConfig:
    method: str | None

class CompilationConfig:
    static_forward_context: dict[str, Any]

class KVEventsConfig:
    enable_kv_cache_events: bool

class VllmConfig:
    kv_transfer_config: KVTransferConfig | None
    parallel_config: ParallelConfig
    model_config: ModelConfig
    scheduler_config: SchedulerConfig
    cache_config: CacheConfig
    load_config: LoadConfig
    device_config: DeviceConfig
    speculative_config: SpeculativeConfig | None
    compilation_config: CompilationConfig
    kv_events_config: KVEventsConfig | None
