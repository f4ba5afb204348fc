"""What is counted, by kind of process. Knows no process, no file and no exporter (exposition.py).

A worker's counters are those of its runner and, prefixed with the stage's name, those of its stages. Numbers only grow;
those named in `GAUGES` go up and down.
"""

from __future__ import annotations

from collections.abc import Sequence

RUNNER_COUNTERS = {
    "turns": "Turns of the loop",
    "busy_us": "Microseconds between waking and waiting again",
    "errors": "Expected trouble, answered or logged",
    "jobs": "Pieces of work given to worker threads",
    "jobs_failed": "Of these, ended by an exception",
    "spans_dropped": "Trace events for which there was no room",
}
SEAT_COUNTERS = {
    "messages": "Messages handled",
    "bad_frames": "Messages that could not be decoded",
    "refused": "Messages answered with a refusal by the runner",
    "below_changes": "Times that the stages below were other ones, or gone",
}
"""What the runner counts for each stage."""

STAGE_COUNTERS: dict[str, dict[str, str]] = {
    "gather": {
        "recovered_chunks": "Chunks found in the arena at start",
        "committed_chunks": "Chunks made visible",
        "known_chunks": "Chunks offered again",
        "dropped_chunks": "Chunks not taken",
        "persisted_ssd_chunks": "Chunks that the SSD tier took",
        "persisted_remote_chunks": "Chunks that the remote tier took",
        "refused_ssd_chunks": "Chunks that the SSD tier did not take",
        "refused_remote_chunks": "Chunks that the remote tier did not take",
        "promoted_chunks": "Chunks brought up from below",
        "asked_again_chunks": "Chunks sent down or asked for once more, because no answer had come",
        "lookups": "Lookups of engines that cannot map the index",
        "load_failed_chunks": "Chunks asked for that did not come",
        "evicted_chunks": "Chunks evicted from DRAM",
        "encoded_chunks": "Chunks in DRAM that were encoded",
        "encode_raw_bytes": "Bytes of these before",
        "encoded_bytes": "Bytes of these after",
        "decoded_chunks": "Chunks in DRAM that were decoded, by order",
        "left_chunks": "Chunks in DRAM that no codec could make smaller",
        "unexpected_messages": "Messages that nobody here waits for",
        "dram_used_bytes": "Bytes of the arena in use",
        "dram_capacity_bytes": "Bytes of the arena",
        "dram_rows": "Rows of the DRAM index",
        "dram_encoded_chunks": "Chunks that lie encoded in DRAM",
        "dram_saved_bytes": "Bytes that they would take more if they were raw",
        "unpersisted_rows": "Rows that a tier below has still to take",
        "producers": "Engines registered",
        "pinned_bytes": "Bytes of the arena that a GPU's driver has pinned",
    },
    "compress": {
        "encoded_chunks": "Chunks encoded",
        "encoded_bytes": "Bytes after encoding",
        "encode_raw_bytes": "Bytes before encoding",
        "decoded_chunks": "Chunks decoded",
        "decoded_bytes": "Bytes after decoding",
        "passed_chunks": "Chunks passed on as they are",
        "incompressible_chunks": "Of these, those that would not have shrunk",
        "unknown_layout_chunks": "Of these, those whose codec would have had to know their layout",
        "unencodable_chunks": "Of these, those that their codec cannot write (not numbers, or not finite ones)",
        "failed_chunks": "Chunks that could not be encoded or decoded",
        "unexpected_messages": "Messages that nobody here waits for",
        "ring_used_bytes": "Bytes of the ring in use",
        "ring_capacity_bytes": "Bytes of the ring",
    },
    "persist": {
        "written_chunks": "Chunks written",
        "written_bytes": "Bytes written",
        "read_chunks": "Chunks read",
        "read_bytes": "Bytes read",
        "dropped_chunks": "Chunks not taken",
        "load_failed_chunks": "Chunks asked for that could not be read",
        "corrupt_chunks": "Chunks whose bytes are not what was written",
        "evicted_chunks": "Chunks whose space was used again",
        "unexpected_messages": "Messages that nobody here waits for",
        "rows": "Rows of the SSD index",
        "used_bytes": "Bytes of segment files",
        "capacity_bytes": "Bytes the tier may use",
        "read_only": "1: the tier takes nothing (disk full or failed)",
        "ring_used_bytes": "Bytes of the ring in use",
        "ring_capacity_bytes": "Bytes of the ring",
    },
    "replicate": {
        "written_chunks": "Objects stored",
        "written_bytes": "Bytes stored",
        "read_chunks": "Objects fetched",
        "read_bytes": "Bytes fetched",
        "dropped_chunks": "Chunks not taken",
        "load_failed_chunks": "Chunks asked for that could not be fetched",
        "corrupt_chunks": "Objects whose bytes are not what was stored",
        "evicted_chunks": "Objects removed for room",
        "unexpected_messages": "Messages that nobody here waits for",
        "rows": "Rows of the remote index",
        "used_bytes": "Bytes of objects",
        "capacity_bytes": "Bytes the tier may use",
        "store_down": "1: the store does not answer and is not asked",
        "ring_used_bytes": "Bytes of the ring in use",
        "ring_capacity_bytes": "Bytes of the ring",
    },
}
_PRODUCER = {
    "lookups": "Lookups",
    "lookup_tokens": "Tokens looked up",
    "hit_tokens": "Tokens found",
    "lookups_by_message": "Times that gather was asked for rows, because the index cannot be mapped",
    "lookups_unanswered": "Of these, those that had no answer in time",
    "loads": "Loads",
    "loaded_tokens": "Tokens loaded",
    "loaded_bytes": "Bytes loaded",
    "hit_chunks_dram": "Chunks loaded from DRAM",
    "hit_chunks_ssd": "Chunks loaded from SSD",
    "hit_chunks_remote": "Chunks loaded from the remote tier",
    "load_failed_chunks": "Chunks found that could not be loaded",
    "saves": "Saves",
    "save_chunks": "Chunks offered",
    "saved_chunks": "Chunks visible in DRAM",
    "known_chunks": "Chunks that were there already",
    "save_dropped_chunks": "Chunks not taken",
    "persisted_chunks": "Chunks that a tier below took",
    "refused_chunks": "Chunks that a tier below did not take",
    "evicted_chunks": "Chunks evicted",
    "unexpected_messages": "Messages that nobody here waits for",
}
PRODUCER_COUNTERS = tuple(_PRODUCER)
_LEVELS = ("rows", "used_bytes", "capacity_bytes", "read_only", "store_down", "ring_used_bytes", "ring_capacity_bytes")
_DRAM_LEVELS = (
    "dram_used_bytes",
    "dram_capacity_bytes",
    "dram_rows",
    "dram_encoded_chunks",
    "dram_saved_bytes",
    "unpersisted_rows",
    "producers",
    "pinned_bytes",
)
GAUGES = frozenset(
    f"{stage}_{name}"
    for stage, table in STAGE_COUNTERS.items()
    for name in table
    if name in (_DRAM_LEVELS if stage == "gather" else _LEVELS)
)
"""Names whose numbers go up and down."""

HELP = {
    **RUNNER_COUNTERS,
    **_PRODUCER,
    **{
        f"{stage}_{name}": text
        for stage, table in STAGE_COUNTERS.items()
        for name, text in {**SEAT_COUNTERS, **table}.items()
    },
}


def worker_counters(stages: Sequence[str]) -> tuple[str, ...]:
    """Counter names of a worker process that runs these stages."""
    seats = (f"{stage}_{name}" for stage in stages for name in (*SEAT_COUNTERS, *STAGE_COUNTERS.get(stage, ())))
    return (*RUNNER_COUNTERS, *seats)
