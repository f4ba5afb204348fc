"""What runs where: reading a topology file and checking it, and the note by which others attach to a running node.

Owns the checks between fields and `node.json`; the schema is in settings.py. Knows no process, socket or segment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from lmpipe import strict_yaml
from lmpipe.errors import NodeError, TopologyError
from lmpipe.handles import BLOCK_BYTES, Codec
from lmpipe.rundir import PAGES_SUFFIX, default_parent, write_atomically
from lmpipe.rundir import RunDir as RunDir
from lmpipe.settings import MIB
from lmpipe.settings import STAGES as STAGES
from lmpipe.settings import Adaptive as Adaptive
from lmpipe.settings import Admission as Admission
from lmpipe.settings import Codecs as Codecs
from lmpipe.settings import DramTier as DramTier
from lmpipe.settings import Engines as Engines
from lmpipe.settings import Index as Index
from lmpipe.settings import Int4h as Int4h
from lmpipe.settings import LoadRates as LoadRates
from lmpipe.settings import Metrics as Metrics
from lmpipe.settings import Process as Process
from lmpipe.settings import Profile as Profile
from lmpipe.settings import RemoteTier as RemoteTier
from lmpipe.settings import Restarts as Restarts
from lmpipe.settings import Rings as Rings
from lmpipe.settings import SsdTier as SsdTier
from lmpipe.settings import StageName as StageName
from lmpipe.settings import Tenant as Tenant
from lmpipe.settings import Tiers as Tiers
from lmpipe.settings import Topology as Topology
from lmpipe.strict_yaml import nearest

NODE_VERSION = 2
"""Of `node.json`. Goes up with every change of a field in it, the topology's included: a test pins its schema."""
CODECS = tuple(codec.name.lower() for codec in Codec)
MAX_DEVICES = 16
SOCKET_PATH_BYTES = 107
"""`sun_path` of a Unix socket, without its closing zero byte."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}", re.ASCII)


class NodeInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`node.json`: what producers and workers read to attach."""

    version: int
    topology: Topology
    run_dir: str
    arena_id: str
    endpoints: dict[str, dict[str, str]]
    supervisor_pid: int
    created: float
    index_identity: str = ""
    """What who maps the index must have in common with its writers (`index.reader_identity`); empty: not known."""
    sessions_identity: str = ""
    """Which directory the sessions are in (`shm.session.SessionDir.identity`): a container may have another one under
    the same name, where nobody sees the holds of its engines. Empty: not known."""
    lmpipe: str = ""
    """Version of the package that the node's processes run; empty: not known."""

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
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NodeError(f"{path}: {error}") from None

    def write(self) -> None:
        """Puts the note in its place atomically."""
        write_atomically(self.paths.node_json, msgspec.json.encode(self))


class _Versioned(msgspec.Struct):
    version: int


Conflicts = Callable[[Topology], list[tuple[str, str]]]
"""Gives (path, problem) for everything in a topology that is right by itself and wrong together."""


def _none(_: Topology) -> list[tuple[str, str]]:
    return []


def load(path: Path | str, also: Conflicts = _none) -> Topology:
    """The topology in the file `path`. Raises TopologyError: all problems, each with file, line, path and mend.

    `also` finds what this file does not know of: `codecs.checks.conflicts`.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise TopologyError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TopologyError(f"{path}: byte {error.start} is not UTF-8 text") from None
    return parse(text, str(path), path.absolute().parent, also)


def parse(text: str, origin: str, base: Path, also: Conflicts = _none) -> Topology:
    """The topology in `text`; errors call it `origin`, relative directories start at `base`. Raises TopologyError."""
    try:
        topology, marks = strict_yaml.read(text, Topology)
    except strict_yaml.Unfit as unfit:
        raise _error(origin, unfit.problems) from None
    topology = _resolved(topology, base)
    problems = [(marks.line(path), path, problem) for path, problem in _conflicts(topology) + also(topology)]
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
    if tiers.remote and re.match("file:[^/]", tiers.remote.url):
        place = os.path.normpath(base / tiers.remote.url.removeprefix("file:"))
        tiers = replace(tiers, remote=replace(tiers.remote, url=f"file://{place}"))
    codecs = topology.codecs
    if codecs.adaptive.calibration:
        calibration = os.path.normpath(base / codecs.adaptive.calibration)
        codecs = replace(codecs, adaptive=replace(codecs.adaptive, calibration=calibration))
    run_dir = os.path.normpath(base / topology.run_dir) if topology.run_dir else str(default_parent() / topology.name)
    topology = replace(topology, tiers=tiers, codecs=codecs, run_dir=run_dir)
    if not topology.processes:
        topology = replace(topology, processes=[Process(stage, [stage]) for stage in topology.stages])
    return topology


def _conflicts(topology: Topology) -> list[tuple[str, str]]:
    """The `Conflicts` that need nothing but the topology."""
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
    if topology.run_dir.endswith(PAGES_SUFFIX):
        wrong(
            "run_dir",
            f"ends with {PAGES_SUFFIX}, as the directory beside a node's does; choose another run_dir or name",
        )
    devices = topology.engines.devices
    for i, device in enumerate(devices):
        if device in devices[:i]:
            wrong(f"engines.devices[{i}]", f"a second entry for the GPU {device}")
    if len(devices) > MAX_DEVICES:
        wrong("engines.devices", f"{len(devices)} GPUs, one node takes {MAX_DEVICES}")
    _check_tiers(topology, wrong)
    _check_tenants(topology, wrong)
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
                f"file:///directory, file:directory or s3://bucket/prefix is wanted{nearest(scheme, ('file', 's3'))}",
            )
        elif scheme == "file" and not rest.startswith("/"):
            wrong("tiers.remote.url", "the directory must be absolute: three slashes, file:///directory")
    for path, name in topology.codec_names:
        if name not in CODECS:
            wrong(path, f'unknown codec "{name}"{nearest(name, CODECS)} (codecs: {", ".join(CODECS)})')
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


def _check_tenants(topology: Topology, wrong: _Wrong) -> None:
    names: set[str] = set()
    for i, tenant in enumerate(topology.tenants):
        if tenant.name in names:
            wrong(f"tenants[{i}].name", f'a second entry for the tenant "{tenant.name}"')
        names.add(tenant.name)


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
                    "no tier below has a codec other than raw, and no tenant"
                    if stage == "compress"
                    else f"there is no tiers.{_TIER_FIELD[stage]}"
                )
                wrong(f"{at}.stages[{j}]", f"{stage} has nothing to do here: {lacks}")
            placed.setdefault(stage, process.name)
    if missing := [stage for stage in topology.stages if stage not in placed]:
        wrong("processes", f"not placed in any process: {', '.join(missing)}")


_TIER_FIELD = {"persist": "ssd", "replicate": "remote"}
