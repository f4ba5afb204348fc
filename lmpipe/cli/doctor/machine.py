"""What the machine has for a node, or would have: shared memory, memory, limits, pages, processors, clock.

Each check takes what it looks at as an argument, so that a test can show it another machine.
"""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from lmpipe import native
from lmpipe.cli.check import bytes_in, existing, shared_bytes
from lmpipe.cli.doctor.finding import Finding, fail, ok, warn
from lmpipe.cli.picture import size
from lmpipe.launch.devices import Lack, lacking
from lmpipe.launch.host import memory_bytes
from lmpipe.rundir import RunDir
from lmpipe.topology import Topology

GIB = 1 << 30
SMALL_SHM_BYTES = GIB
"""Less than this is a container's default rather than somebody's choice."""
TIGHT_PART = 0.8
POPULATE_KERNEL = (5, 14)
SLOW_CLOCKS = ("hpet", "acpi_pm", "pit", "jiffies", "refined-jiffies")
MEND_SHM = "mount -o remount,size=… /dev/shm, or docker run --shm-size=…; or lower tiers.dram.capacity"


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    point: Path
    kind: str
    options: frozenset[str]
    """The mount's and its file system's."""

    @property
    def huge(self) -> str:
        """The `huge=` option of a tmpfs."""
        return next((option.removeprefix("huge=") for option in self.options if option.startswith("huge=")), "never")


def mount_of(path: Path, mountinfo: str) -> Mount:
    """The mount that a path lies on."""
    found = Mount(Path("/"), "unknown", frozenset())
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, about = left.split(), right.split()
        point = Path(fields[4])
        if path.is_relative_to(point) and len(point.parts) >= len(found.point.parts):
            found = Mount(point, about[0], frozenset((*fields[5].split(","), *about[2].split(","))))
    return found


def examine(topology: Topology | None, run_dir: Path) -> list[Finding]:
    """Everything about this machine; `topology`: what it should carry."""
    place = existing(run_dir)
    mount = mount_of(place.resolve(), Path("/proc/self/mountinfo").read_text())
    wanted = shared_bytes(topology) if topology else 0
    usage, taken = shutil.disk_usage(place), bytes_in(RunDir(run_dir))
    available = memory_bytes("MemAvailable")
    return [
        shared_memory(mount, usage.total, usage.free + taken, wanted),
        memory(available + taken, cgroup_limit(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text()), wanted),
        *gpus(topology, lacking(topology) if topology else None),
        *limits(topology, {name: resource.getrlimit(number)[0] for name, number in LIMITS.items()}),
        huge_pages(mount, Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"), wanted),
        numa(topology, Path("/sys/devices/system/node")),
        processors(topology, os.sched_getaffinity(0)),
        kernel(os.uname().release),
        clock(Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")),
    ]


def shared_memory(mount: Mount, total: int, free: int, wanted: int) -> Finding:
    """Whether the run directory's file system is memory, and large enough. `free`: what the node has is its own."""
    seen = f"{mount.point} ({mount.kind}): {size(free)} of {size(total)} free"
    seen += f", {size(wanted)} wanted" if wanted else ""
    if mount.kind not in ("tmpfs", "hugetlbfs", "ramfs"):
        return warn("shared memory", seen, f"{mount.point} is a disk; choose a run_dir in /dev/shm")
    if "ro" in mount.options:
        return fail("shared memory", f"{seen}, read-only", f"mount -o remount,rw {mount.point}")
    if wanted > free:
        return fail("shared memory", seen, MEND_SHM)
    if wanted > TIGHT_PART * free or total < SMALL_SHM_BYTES:
        return warn("shared memory", seen, MEND_SHM)
    return ok("shared memory", seen)


def cgroup_limit(root: Path, cgroup: str) -> int:
    """Bytes that this control group may have, of either version; 0: no limit. Shared memory counts."""
    limits: list[int] = []
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = [root / part / "memory.max" for part in _upwards(path)]
        elif "memory" in controllers.split(","):
            files = [root / "memory" / part / "memory.limit_in_bytes" for part in _upwards(path)]
        else:
            continue
        limits += [int(text) for file in files if file.exists() and (text := file.read_text().strip()).isdigit()]
    return min((limit for limit in limits if limit < 1 << 60), default=0)


def _upwards(path: str) -> list[str]:
    parts = Path(path.lstrip("/")).parts
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def memory(available: int, limit: int, wanted: int) -> Finding:
    """Whether there is memory behind the shared memory. `limit`: the control group's."""
    seen = f"{size(available)} available" + (f", this control group may have {size(limit)}" if limit else "")
    if wanted > available or (limit and wanted > limit):
        return fail("memory", f"{seen}, {size(wanted)} wanted", "lower tiers.dram.capacity, or raise the limit")
    if wanted > TIGHT_PART * min(available, limit or available):
        return warn("memory", f"{seen}, {size(wanted)} wanted", "leave more for the engines: lower tiers.dram.capacity")
    return ok("memory", seen)


def gpus(topology: Topology | None, lack: Lack | None) -> list[Finding]:
    """Whether what the topology's GPUs need is there; nothing where none is named."""
    if topology is None or not topology.engines.devices:
        return []
    if lack is not None:
        return [fail("GPUs", lack.seen, lack.todo)]
    return [ok("GPUs", f"a driver and CuPy are there for GPU {', '.join(topology.engines.devices)}")]


LIMITS = {
    "nofile": resource.RLIMIT_NOFILE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "fsize": resource.RLIMIT_FSIZE,
    "as": resource.RLIMIT_AS,
}


def limits(topology: Topology | None, soft: dict[str, int]) -> list[Finding]:
    """`ulimit`s: open files, and what is limited seldom and then painfully."""
    engines = topology.engines.max_producers if topology else 64
    files = 256 + 8 * engines
    said = {name: "unlimited" if value < 0 else str(value) for name, value in soft.items()}
    found = [ok("open files", f"{said['nofile']} a process (ulimit -n)")]
    if 0 <= soft["nofile"] < files:
        todo = f"ulimit -n {files}, or LimitNOFILE={files}: {engines} engines need that many"
        found = [fail("open files", f"{said['nofile']} a process", todo)]
    wanted = shared_bytes(topology) if topology else 0
    for name, flag in (("fsize", "-f"), ("as", "-v")):
        if 0 <= soft[name] <= wanted:
            found.append(
                fail(f"limit {name}", f"{size(soft[name])}, {size(wanted)} wanted", f"ulimit {flag} unlimited")
            )
    memlock = said["memlock"] if soft["memlock"] < 0 else size(soft["memlock"])
    seen = f"{memlock} (ulimit -l)"
    if topology and topology.engines.devices and 0 <= soft["memlock"] < topology.tiers.dram.capacity:
        todo = "ulimit -l unlimited, docker run --ulimit memlock=-1: else the driver may pin only a part of the arena"
        found.append(warn("locked memory", f"{seen}, {size(topology.tiers.dram.capacity)} of DRAM for GPUs", todo))
    else:
        found.append(ok("locked memory", f"{seen}; lmpipe locks none, a GPU's driver may"))
    return found


def huge_pages(mount: Mount, shmem_enabled: Path, wanted: int) -> Finding:
    """Whether the arena can have huge pages."""
    text = shmem_enabled.read_text() if shmem_enabled.exists() else ""
    kernel = text.partition("[")[2].partition("]")[0] or "unknown"
    effective = kernel if kernel in ("deny", "force") else mount.huge
    seen = f"{mount.point} huge={mount.huge}, kernel says {kernel}"
    if effective in ("never", "deny") and wanted >= 8 * GIB:
        return warn(
            "huge pages", seen, f"mount -o remount,huge=within_size {mount.point}: copies then miss the TLB less"
        )
    return ok("huge pages", seen)


def numa(topology: Topology | None, nodes: Path) -> Finding:
    """Whether processes are bound where memory is near in one place and far in another."""
    count = len([path for path in nodes.glob("node*") if path.name[4:].isdigit()]) or 1
    loose = [process.name for process in topology.processes if process.cpus is None] if topology else []
    if count > 1 and loose:
        todo = f"bind {', '.join(loose)} to the engine's NUMA node: processes[].cpus"
        return warn("NUMA", f"{count} nodes, and processes that run on any", todo)
    return ok("NUMA", f"{count} node{'s' if count > 1 else ''}")


def processors(topology: Topology | None, cpus: set[int]) -> Finding:
    """CPUs, and the instruction sets that the native module uses."""
    features = native.features()
    seen = f"{len(cpus)} CPUs, kernels for {features['level']} (of {features['levels']}), {features['copy']}"
    missing = {cpu for process in (topology.processes if topology else []) for cpu in process.cpus or ()} - cpus
    if missing:
        return fail("processors", seen, f"there is no CPU {', '.join(map(str, sorted(missing)))}: processes[].cpus")
    if features["level"] == "generic":
        return warn("processors", seen, "no AVX2 here: codecs and copies run at a fraction of their speed")
    return ok("processors", seen)


def kernel(release: str) -> Finding:
    """Whether the kernel has what shared memory is faulted in with."""
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < POPULATE_KERNEL:
        return warn("kernel", f"Linux {release}", "before 5.14 engines touch the arena's pages first while they copy")
    return ok("kernel", f"Linux {release}")


def clock(source: Path) -> Finding:
    """Whether looking at the clock is cheap."""
    name = source.read_text().strip() if source.exists() else "unknown"
    if name in SLOW_CLOCKS:
        return warn(
            "clock source", name, "each look at the clock costs a microsecond or more; boot with tsc if you can"
        )
    return ok("clock source", name)
