"""A node seen from outside: what its supervisor publishes and its processes count, as one tree. Changes nothing."""

from __future__ import annotations

import time

import msgspec

from lmpipe.handles import Tier
from lmpipe.launch.claim import WorkerNote, lock_holder
from lmpipe.launch.counter_files import read_counters
from lmpipe.rundir import RunDir
from lmpipe.supervisor import NodeState, ProcessState
from lmpipe.topology import NodeInfo

_TIER_GAUGES = {
    Tier.DRAM: ("gather_dram_rows", "gather_dram_used_bytes", "gather_dram_capacity_bytes"),
    Tier.SSD: ("persist_rows", "persist_used_bytes", "persist_capacity_bytes"),
    Tier.REMOTE: ("replicate_rows", "replicate_used_bytes", "replicate_capacity_bytes"),
}
_TIER_TROUBLE = {Tier.SSD: ("persist_read_only", "read-only"), Tier.REMOTE: ("replicate_store_down", "store down")}


class ProcessView(msgspec.Struct, frozen=True):
    """A worker. `uptime_s` is 0 when it does not run. `state`: what its supervisor says; when that is dead, what the
    kernel and the worker say: `ready`, `starting` or `dead`.
    """

    name: str
    state: str
    pid: int
    uptime_s: float
    restarts: int
    last_exit: str
    stages: list[str]


class TierView(msgspec.Struct, frozen=True):
    """A tier. `trouble`: why it takes nothing at present, or empty. `encoded_chunks` and `saved_bytes`, of DRAM: how
    many chunks lie there encoded, and how much more room they would take raw.
    """

    tier: str
    rows: int
    used_bytes: int
    capacity_bytes: int
    trouble: str
    encoded_chunks: int = 0
    saved_bytes: int = 0


class EngineView(msgspec.Struct, frozen=True):
    """A producer, in its present life."""

    name: str
    pid: int
    lookup_tokens: int
    hit_tokens: int
    loaded_bytes: int
    hit_chunks: dict[str, int]
    saved_chunks: int
    dropped_chunks: int


class Overview(msgspec.Struct, frozen=True):
    """A node. `state`: that of its supervisor; `orphaned` when that is dead and workers live, `dead` when none does."""

    name: str
    run_dir: str
    state: str
    supervisor_pid: int
    uptime_s: float
    processes: list[ProcessView]
    tiers: list[TierView]
    engines: list[EngineView]
    counters: dict[str, dict[str, int]]


def overview(info: NodeInfo) -> Overview:
    """The node as it is now."""
    paths, topology = info.paths, info.topology
    state = NodeState.read(paths.up("supervisor"))
    pid = lock_holder(paths.supervisor_lock)
    now = time.time()
    counted = {path.stem: values for path, values in read_counters(paths)}
    stages: dict[str, list[str]] = {process.name: [*process.stages] for process in topology.processes}
    processes = state.processes if state else []
    if not pid:
        processes = [_orphan(paths, process) for process in processes]
    alone = "orphaned" if any(process.pid for process in processes) else "dead"
    return Overview(
        name=topology.name,
        run_dir=info.run_dir,
        state=alone if not pid else state.state if state else "starting",
        supervisor_pid=pid,
        uptime_s=max(0.0, now - info.created),
        processes=[
            ProcessView(
                p.name, p.state, p.pid, max(0.0, now - p.started) * bool(p.pid), p.restarts, p.last_exit, stages[p.name]
            )
            for p in processes
        ],
        tiers=[_tier(tier, info, counted) for tier in topology.tier_names],
        engines=_engines(paths, set(stages), counted),
        counters=counted,
    )


def _orphan(paths: RunDir, process: ProcessState) -> ProcessState:
    """A process without a supervisor, as it is now."""
    pid, note = lock_holder(paths.role(process.name)), WorkerNote.read(paths.up(process.name))
    state = "dead" if not pid else note.state if note is not None and note.pid == pid else "starting"
    return msgspec.structs.replace(process, pid=pid, state=state)


def _tier(tier: Tier, info: NodeInfo, counted: dict[str, dict[str, int]]) -> TierView:
    values = {name: value for part in counted.values() for name, value in part.items()}
    rows, used, capacity = (values.get(name, 0) for name in _TIER_GAUGES[tier])
    gauge, text = _TIER_TROUBLE.get(tier, ("", ""))
    tiers = info.topology.tiers
    configured = {Tier.DRAM: tiers.dram, Tier.SSD: tiers.ssd, Tier.REMOTE: tiers.remote}[tier]
    in_dram = tier is Tier.DRAM
    return TierView(
        tier,
        rows,
        used,
        capacity or (configured.capacity if configured else 0),
        text if values.get(gauge) else "",
        values.get("gather_dram_encoded_chunks", 0) if in_dram else 0,
        values.get("gather_dram_saved_bytes", 0) if in_dram else 0,
    )


def _engines(paths: RunDir, workers: set[str], counted: dict[str, dict[str, int]]) -> list[EngineView]:
    found: list[EngineView] = []
    for stem, values in counted.items():
        name, _, pid = stem.rpartition("-")
        if name in workers or "lookups" not in values:
            continue
        hits = {tier.value: values.get(f"hit_chunks_{tier.value}", 0) for tier in Tier}
        found.append(
            EngineView(
                name,
                int(pid),
                values["lookup_tokens"],
                values["hit_tokens"],
                values["loaded_bytes"],
                hits,
                values["saved_chunks"],
                values["save_dropped_chunks"],
            )
        )
    return found
