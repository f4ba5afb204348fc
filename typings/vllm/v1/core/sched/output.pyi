class KVConnectorBlockState:
    def get_block_ids(self, req_id: str) -> tuple[list[int], ...] | None: ...

class SchedulerOutput:
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    preempted_req_ids: set[str] | None
    kv_connector_block_state: KVConnectorBlockState | None
