class KVCacheSpec:
    block_size: int

class AttentionSpec(KVCacheSpec):
    num_kv_heads: int
    head_size: int
    head_size_v: int
    kv_quant_mode: int
    state_content_bytes: int | None
    tokens_per_state: object

class KVCacheGroupSpec:
    layer_names: list[str]
    kv_cache_spec: KVCacheSpec
    is_eagle_group: bool
    host_resident: bool
    enable_kv_transfer: bool

class KVCacheConfig:
    num_blocks: int
    kv_cache_groups: list[KVCacheGroupSpec]
    kv_cache_layout: str | None
    kv_tp_replicas: int
    @property
    def needs_kv_cache_zeroing(self) -> bool: ...
