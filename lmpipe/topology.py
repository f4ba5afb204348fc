"""What runs where: the topology file as one frozen tree, and the note by which others attach to a running node.

Owns the schema, its defaults and the checks between fields. Knows no process, no socket and no segment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import msgspec

from lmpipe import strict_yaml
from lmpipe.errors import NodeError, TopologyError
from lmpipe.handles import BLOCK_BYTES, Codec, Tier
from lmpipe.rundir import RunDir as RunDir
from lmpipe.rundir import default_parent, write_atomically
from lmpipe.strict_yaml import Size, nearest

NODE_VERSION = 1
StageName = Literal["gather", "compress", "persist", "replicate"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""Stage names in the order a save passes them."""

CODECS = tuple(codec.name.lower() for codec in Codec)
MIB = 1 << 20
SOCKET_PATH_BYTES = 107
"""`sun_path` of a Unix socket, without its closing zero byte."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Milliseconds = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
Rate = Annotated[float, msgspec.Meta(gt=0)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}", re.ASCII)


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker process: the stages it runs, and the CPUs it may use (None: all)."""

    name: str
    stages: list[StageName]
    cpus: list[Annotated[int, msgspec.Meta(ge=0, le=4095)]] | None = None


class DramTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arena. `slots`: how many chunks it can name (None: by capacity); a slot's header takes 128 bytes."""

    capacity: Size
    prefault: bool = True
    slots: Count | None = None


class SsdTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Segment files on a disk. `flush`: when bytes are made durable, which is before `Persisted` is said."""

    directory: str
    capacity: Size
    flush: Literal["none", "interval", "each"] = "interval"
    flush_interval_ms: Milliseconds = 200
    segment: Size = 1 << 30
    codec: str = "raw"


class RemoteTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Objects in a store."""

    url: str
    capacity: Size
    timeout_ms: Milliseconds = 2000
    codec: str = "raw"


class Tiers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where chunks are kept, fastest first."""

    dram: DramTier
    ssd: SsdTier | None = None
    remote: RemoteTier | None = None


class Rings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes in transit that a stage may allocate; for each stage at least two encoded chunks."""

    compress: Size = 128 * MIB
    persist: Size = 128 * MIB
    replicate: Size = 128 * MIB

    def capacity(self, stage: str) -> int:
        """Bytes of the ring of `stage`."""
        return {"compress": self.compress, "persist": self.persist, "replicate": self.replicate}[stage]


class Engines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each producer is granted. `leases`: arena slots lent to it at any time."""

    leases: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    max_producers: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    hold_entries: Annotated[int, msgspec.Meta(ge=64, le=1 << 20)] = 16384
    load_deadline_ms: Milliseconds = 2000


class LoadRates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes per second that a load from each tier reaches (None: measured by the producer)."""

    ssd: Rate | None = None
    remote: Rate | None = None

    def of(self, tier: Tier) -> float | None:
        """The rate given for a tier; DRAM has none: a copy is never slower than prefill."""
        return {Tier.DRAM: None, Tier.SSD: self.ssd, Tier.REMOTE: self.remote}[tier]


class Admission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is worth saving and loading. `prefill_tokens_per_s`: None is measured by the producer."""

    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 0
    prefill_tokens_per_s: Rate | None = None
    load_bytes_per_s: LoadRates = LoadRates()


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of each tier's LMDB map, taken from tmpfs as rows come; about 200 bytes a row."""

    dram: Size = 256 * MIB
    ssd: Size = 256 * MIB
    remote: Size = 256 * MIB

    def map_bytes(self, tier: Tier) -> int:
        """Map size of one tier's environment."""
        return {Tier.DRAM: self.dram, Tier.SSD: self.ssd, Tier.REMOTE: self.remote}[tier]


class Restarts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process that dies more than `budget` times within `window_s` stays down, and the status says so."""

    budget: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 5
    window_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 60


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prometheus endpoint of the supervisor (None: no endpoint)."""

    port: Port | None = None
    host: str = "127.0.0.1"


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`trace`: each worker writes a Chrome trace beside its log."""

    trace: bool = False


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One topology file. After `load`, `run_dir`, `processes` and the SSD directory are filled in and absolute."""

    name: str
    tiers: Tiers
    run_dir: str = ""
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256
    processes: list[Process] = []
    rings: Rings = Rings()
    engines: Engines = Engines()
    admission: Admission = Admission()
    index: Index = Index()
    copy_threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    heartbeat_ms: Milliseconds = 1000
    watchdog_ms: Milliseconds = 10_000
    ready_ms: Milliseconds = 60_000
    drain_ms: Milliseconds = 10_000
    restarts: Restarts = Restarts()
    metrics: Metrics = Metrics()
    profile: Profile = Profile()

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages this topology needs, in the order a save passes them."""
        return tuple(
            stage
            for stage in STAGES
            if stage == "gather" or (self.codec != "raw" and stage == "compress") or self.tier_of(stage)
        )

    @property
    def codec(self) -> str:
        """The codec of the tiers below DRAM; they take the same encoded chunk, so it is one."""
        below = self.tiers.ssd or self.tiers.remote
        return below.codec if below else "raw"

    def tier_of(self, stage: str) -> Tier | None:
        """The tier that `stage` owns, if the topology has it."""
        owned = {
            "gather": Tier.DRAM,
            "persist": Tier.SSD if self.tiers.ssd else None,
            "replicate": Tier.REMOTE if self.tiers.remote else None,
        }
        return owned.get(stage)

    @property
    def tier_names(self) -> tuple[Tier, ...]:
        """The tiers this topology has, fastest first."""
        return tuple(tier for stage in self.stages if (tier := self.tier_of(stage)) is not None)

    @property
    def rings_needed(self) -> tuple[str, ...]:
        """Stages that allocate transit slots: all but gather when chunks are encoded, else none."""
        return self.stages[1:] if self.codec != "raw" else ()

    def below(self, stage: str) -> StageName | None:
        """The stage that takes what `stage` passes on, or None after the last."""
        return next(
            (after for after in self.stages if STAGES.index(after) > STAGES.index(cast(StageName, stage))), None
        )

    def process_of(self, stage: str) -> Process:
        """The process that runs `stage`."""
        return next(process for process in self.processes if stage in process.stages)


class NodeInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`node.json`: what producers and workers read to attach."""

    version: int
    topology: Topology
    run_dir: str
    arena_id: str
    endpoints: dict[str, dict[str, str]]
    supervisor_pid: int
    created: float

    @property
    def paths(self) -> RunDir:
        """The paths of this node."""
        return RunDir(Path(self.run_dir))

    @classmethod
    def read(cls, run_dir: Path) -> NodeInfo:
        """The note in `run_dir`. Raises NodeError when there is none, or one of another version."""
        path = RunDir(run_dir).node_json
        try:
            data = path.read_bytes()
        except OSError as error:
            raise NodeError(f"no lmpipe node at {run_dir}: {error.strerror}; start one with: lmpipe up FILE") from None
        try:
            version = msgspec.json.decode(data, type=_Versioned).version
            if version != NODE_VERSION:
                raise NodeError(
                    f"{path}: version {version}, this lmpipe speaks {NODE_VERSION}; use the same lmpipe on both sides"
                )
            return msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise NodeError(f"{path}: {error}") from None

    def write(self) -> None:
        """Puts the note in its place atomically."""
        write_atomically(self.paths.node_json, msgspec.json.encode(self))


class _Versioned(msgspec.Struct):
    version: int


def load(path: Path | str) -> Topology:
    """The topology in the file `path`. Raises TopologyError: all problems, each with file, line, path and mend."""
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise TopologyError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TopologyError(f"{path}: byte {error.start} is not UTF-8 text") from None
    return parse(text, str(path), path.absolute().parent)


def parse(text: str, origin: str, base: Path) -> Topology:
    """The topology in `text`; errors call it `origin`, relative directories start at `base`. Raises TopologyError."""
    try:
        topology, marks = strict_yaml.read(text, Topology)
    except strict_yaml.Unfit as unfit:
        raise _error(origin, unfit.problems) from None
    topology = _resolved(topology, base)
    problems = [(marks.line(path), path, problem) for path, problem in _conflicts(topology)]
    if problems:
        raise _error(origin, problems)
    return topology


def _error(origin: str, problems: list[tuple[int, str, str]]) -> TopologyError:
    return TopologyError(
        "\n".join(f"{origin}:{line}: {path + ': ' if path else ''}{text}" for line, path, text in sorted(problems))
    )


def _resolved(topology: Topology, base: Path) -> Topology:
    replace = msgspec.structs.replace
    tiers = topology.tiers
    if tiers.ssd:
        tiers = replace(tiers, ssd=replace(tiers.ssd, directory=os.path.normpath(base / tiers.ssd.directory)))
    run_dir = os.path.normpath(base / topology.run_dir) if topology.run_dir else str(default_parent() / topology.name)
    topology = replace(topology, tiers=tiers, run_dir=run_dir)
    if not topology.processes:
        topology = replace(topology, processes=[Process(stage, [stage]) for stage in topology.stages])
    return topology


def _conflicts(topology: Topology) -> list[tuple[str, str]]:
    """(path, problem) for everything that is right by itself and wrong together."""
    found: list[tuple[str, str]] = []

    def wrong(path: str, problem: str) -> None:
        found.append((path, problem))

    if not _NAME.fullmatch(topology.name):
        wrong("name", "1 to 32 of a-z 0-9 . _ -, beginning with a letter or digit")
    longest = max((str(RunDir(Path(topology.run_dir)).socket(s, "save")) for s in topology.stages), key=len)
    if (excess := len(os.fsencode(longest)) - SOCKET_PATH_BYTES) > 0:
        wrong(
            "run_dir",
            f"the socket {longest} is {excess} bytes over the limit of {SOCKET_PATH_BYTES}; choose a shorter run_dir",
        )
    _check_tiers(topology, wrong)
    _check_processes(topology, wrong)
    if topology.watchdog_ms <= 2 * topology.heartbeat_ms:
        wrong(
            "watchdog_ms",
            f"must be more than two heartbeats ({2 * topology.heartbeat_ms} ms), or healthy workers would be killed",
        )
    if topology.metrics.port is not None and not topology.metrics.host:
        wrong("metrics.host", "an address to listen on is wanted, such as 127.0.0.1")
    return found


_Wrong = Callable[[str, str], None]


def _check_tiers(topology: Topology, wrong: _Wrong) -> None:
    tiers = topology.tiers
    if tiers.dram.capacity < MIB:
        wrong("tiers.dram.capacity", "at least 1MiB; a chunk of a small model takes several")
    if tiers.dram.slots and tiers.dram.slots * BLOCK_BYTES > tiers.dram.capacity:
        wrong("tiers.dram.slots", f"more slots than blocks of {BLOCK_BYTES} bytes in the capacity")
    if ssd := tiers.ssd:
        if ssd.segment % BLOCK_BYTES or ssd.segment < MIB:
            wrong("tiers.ssd.segment", f"a multiple of {BLOCK_BYTES} bytes, at least 1MiB")
        if ssd.capacity < 2 * ssd.segment:
            wrong("tiers.ssd.capacity", "at least two segments: one is reclaimed while another is written")
    if remote := tiers.remote:
        scheme, _, rest = remote.url.partition("://")
        if scheme not in ("file", "s3") or not rest:
            wrong(
                "tiers.remote.url",
                f"file:///directory or s3://bucket/prefix is wanted{nearest(scheme, ('file', 's3'))}",
            )
        elif scheme == "file" and not rest.startswith("/"):
            wrong("tiers.remote.url", "the directory must be absolute: three slashes, file:///directory")
    for name, tier in (("ssd", tiers.ssd), ("remote", tiers.remote)):
        if tier and tier.codec not in CODECS:
            wrong(
                f"tiers.{name}.codec",
                f'unknown codec "{tier.codec}"{nearest(tier.codec, CODECS)} (codecs: {", ".join(CODECS)})',
            )
    if tiers.ssd and tiers.remote and tiers.ssd.codec != tiers.remote.codec:
        wrong(
            "tiers.remote.codec",
            f"must be that of tiers.ssd ({tiers.ssd.codec}): both tiers take the same encoded chunk",
        )
    for stage in topology.rings_needed:
        if topology.rings.capacity(stage) < MIB:
            wrong(f"rings.{stage}", "at least 1MiB; two encoded chunks must fit")
    for tier in topology.tier_names:
        if topology.index.map_bytes(tier) < MIB:
            wrong(f"index.{tier}", "at least 1MiB")


def _check_processes(topology: Topology, wrong: _Wrong) -> None:
    names: set[str] = set()
    placed: dict[str, str] = {}
    for i, process in enumerate(topology.processes):
        at = f"processes[{i}]"
        if not _NAME.fullmatch(process.name) or process.name == "supervisor":
            wrong(f"{at}.name", "1 to 32 of a-z 0-9 . _ -, beginning with a letter or digit, and not supervisor")
        if process.name in names:
            wrong(f"{at}.name", f'a second process is named "{process.name}"')
        names.add(process.name)
        if not process.stages:
            wrong(f"{at}.stages", "a process runs at least one stage")
        if process.cpus is not None and not process.cpus:
            wrong(f"{at}.cpus", "no CPU is left; leave the field out to use all")
        for j, stage in enumerate(process.stages):
            if stage in placed:
                wrong(f"{at}.stages[{j}]", f'{stage} is already placed in the process "{placed[stage]}"')
            elif stage not in topology.stages:
                lacks = (
                    "no tier below has a codec other than raw"
                    if stage == "compress"
                    else f"there is no tiers.{_TIER_FIELD[stage]}"
                )
                wrong(f"{at}.stages[{j}]", f"{stage} has nothing to do here: {lacks}")
            placed.setdefault(stage, process.name)
    if missing := [stage for stage in topology.stages if stage not in placed]:
        wrong("processes", f"not placed in any process: {', '.join(missing)}")


_TIER_FIELD = {"persist": "ssd", "replicate": "remote"}
