"""The schema of a topology: one frozen tree with its defaults, and what follows from it. Knows no file and no check."""

from __future__ import annotations

from typing import Annotated, Literal, cast, get_args

import msgspec

from lmpipe.handles import Tier
from lmpipe.strict_yaml import Device, Size

StageName = Literal["gather", "compress", "persist", "replicate"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""Stage names in the order a save passes them."""

MIB = 1 << 20

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Milliseconds = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
Rate = Annotated[float, msgspec.Meta(gt=0)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker process: the stages it runs, and the CPUs it may use (None: all)."""

    name: str
    stages: list[StageName]
    cpus: list[Annotated[int, msgspec.Meta(ge=0, le=4095)]] | None = None


class DramTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arena. `slots`: how many chunks it can name (None: by capacity); a slot's header takes 128 bytes. `codec`:
    chunks are encoded with it some time after they were saved, so that more of them fit.
    """

    capacity: Size
    prefault: bool = True
    slots: Count | None = None
    codec: str = "raw"


class SsdTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Segment files on a disk. `flush`: when bytes are made durable, which is before `Persisted` is said."""

    directory: str
    capacity: Size
    flush: Literal["none", "interval", "each"] = "interval"
    flush_interval_ms: Milliseconds = 200
    segment: Size = 1 << 30
    codec: str = "split"


class RemoteTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Objects in a store."""

    url: str
    capacity: Size
    timeout_ms: Milliseconds = 2000
    codec: str = "split"


class Tiers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where chunks are kept, fastest first."""

    dram: DramTier
    ssd: SsdTier | None = None
    remote: RemoteTier | None = None

    @property
    def codec_names(self) -> list[tuple[str, str]]:
        """The codec of each tier, after its path in the topology."""
        named = {"dram": self.dram, "ssd": self.ssd, "remote": self.remote}
        return [(f"tiers.{name}.codec", tier.codec) for name, tier in named.items() if tier]


class Int4h(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sink_tokens` of a prompt's start, and the first and last `edge_layers` layers, are kept in 8 bits."""

    sink_tokens: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 4
    edge_layers: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


class Adaptive(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`calibration`: the file that `lmpipe calibrate` wrote, relative to the topology file."""

    calibration: str = ""


class Codecs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What codecs are set to; encoded chunks say it of themselves, so that others can be read all the same."""

    int4h: Int4h = Int4h()
    adaptive: Adaptive = Adaptive()


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tenant whose chunks are treated in a way of their own. `codec`: instead of the tiers' (in DRAM only where that
    has one); `exact`: as `engines.exact`, for this tenant alone.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    codec: str | None = None
    exact: bool = False


class Rings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes in transit that a stage may allocate; for each stage at least two encoded chunks."""

    compress: Size = 128 * MIB
    persist: Size = 128 * MIB
    replicate: Size = 128 * MIB

    def capacity(self, stage: str) -> int:
        """Bytes of the ring of `stage`."""
        return {"compress": self.compress, "persist": self.persist, "replicate": self.replicate}[stage]


class Engines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each producer is granted. `leases`: arena slots lent to it at any time. `opaque_pages`: engines are expected
    whose pages have an unknown inner order (vLLM on CPUs); codecs that compute with numbers are then refused at once.
    `exact`: chunks that lost information, or were computed on such, are never offered; codecs that lose are refused.
    `lookup_deadline_ms`: how long a lookup waits, where the index cannot be mapped and gather has to be asked.
    `devices`: GPUs on which engines' pages may lie; gather then uses CUDA (HIP), and needs CuPy and a driver.
    """

    leases: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    max_producers: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    hold_entries: Annotated[int, msgspec.Meta(ge=64, le=1 << 20)] = 16384
    load_deadline_ms: Milliseconds = 2000
    lookup_deadline_ms: Milliseconds = 50
    opaque_pages: bool = False
    exact: bool = False
    devices: list[Device] = []


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
    """So does an engine's process that itself moves its KV on a GPU."""


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One topology file. After `load`, `run_dir`, `processes` and the SSD directory are filled in and absolute."""

    name: str
    tiers: Tiers
    run_dir: str = ""
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256
    processes: list[Process] = []
    codecs: Codecs = Codecs()
    tenants: list[Tenant] = []
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
            if stage == "gather" or (self.encodes and stage == "compress") or self.tier_of(stage)
        )

    @property
    def encodes(self) -> bool:
        """Whether any tenant's chunks are encoded for the tiers below DRAM."""
        below = self.tiers.ssd or self.tiers.remote
        return below is not None and {self.codec, *(tenant.codec or "raw" for tenant in self.tenants)} != {"raw"}

    @property
    def codec(self) -> str:
        """The codec of the tiers below DRAM, for tenants without one of their own; all take the same encoded chunk."""
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
    def answer_s(self) -> float:
        """How long an answer between processes that live may take; then it, or the question, is taken for lost."""
        return 3 * self.watchdog_ms / 1000

    @property
    def tier_names(self) -> tuple[Tier, ...]:
        """The tiers this topology has, fastest first."""
        return tuple(tier for stage in self.stages if (tier := self.tier_of(stage)) is not None)

    @property
    def rings_needed(self) -> tuple[str, ...]:
        """Stages that allocate transit slots: all but gather when chunks are encoded, else none."""
        return self.stages[1:] if self.encodes else ()

    @property
    def codec_names(self) -> list[tuple[str, str]]:
        """Every codec that is named, by tier or by tenant, after the path where it stands or would stand."""
        named = self.tiers.codec_names
        own = [(f"tenants[{i}].codec", tenant.codec) for i, tenant in enumerate(self.tenants) if tenant.codec]
        return named + own

    def tenant(self, name: str) -> Tenant | None:
        """What is said of a tenant, if anything is."""
        return next((tenant for tenant in self.tenants if tenant.name == name), None)

    def is_exact(self, tenant: str) -> bool:
        """Whether a tenant's requests are only ever given chunks that lost nothing."""
        own = self.tenant(tenant)
        return self.engines.exact or (own is not None and own.exact)

    def below(self, stage: str) -> StageName | None:
        """The stage that takes what `stage` passes on, or None after the last."""
        return next(
            (after for after in self.stages if STAGES.index(after) > STAGES.index(cast(StageName, stage))), None
        )

    def process_of(self, stage: str) -> Process:
        """The process that runs `stage`."""
        return next(process for process in self.processes if stage in process.stages)
