MEDIUM_CPU: str

class KVCacheEvent: ...

class BlockStored(KVCacheEvent):
    def __init__(
        self,
        *,
        block_hashes: list[bytes | int],
        parent_block_hash: bytes | int | None,
        token_ids: list[int],
        block_size: int,
        lora_id: int | None,
        medium: str | None,
        lora_name: str | None,
        ownership: str | None = None,
    ) -> None: ...

class BlockRemoved(KVCacheEvent):
    def __init__(
        self, *, block_hashes: list[bytes | int], medium: str | None, ownership: str | None = None
    ) -> None: ...

class AllBlocksCleared(KVCacheEvent): ...
