from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

class KVConnectorOutput:
    finished_sending: set[str] | None
    finished_recving: set[str] | None
    kv_connector_worker_meta: KVConnectorWorkerMetadata | None
