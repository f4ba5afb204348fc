class KVCacheSpec:
    block_size: int

class AttentionSpec(KVCacheSpec):
    num_kv_heads: int
    head_size: int

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
