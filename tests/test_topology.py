"""The topology file: what it gives, what it refuses and with which words."""

from __future__ import annotations

import hashlib
import os
import textwrap
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe import topology as tp
from lmpipe.errors import NodeError, TopologyError
from lmpipe.handles import Tier
from lmpipe.rundir import RunDir, write_atomically
from lmpipe.strict_yaml import parse_size
from lmpipe.topology import NodeInfo, Topology

SHIPPED = sorted((Path(__file__).parent.parent / "topologies").glob("*.yaml"))
MINIMAL = "name: a\ntiers: {dram: {capacity: 1GiB}}\n"


def parse(text: str) -> Topology:
    return tp.parse(textwrap.dedent(text), "f.yaml", Path("/base"))


def problems(text: str) -> list[str]:
    with pytest.raises(TopologyError) as error:
        parse(text)
    return str(error.value).splitlines()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_right(path: Path) -> None:
    topology = tp.load(path)
    assert topology.name == path.stem
    assert sorted(stage for process in topology.processes for stage in process.stages) == sorted(topology.stages)


def test_defaults() -> None:
    topology = parse(MINIMAL)
    assert topology.stages == ("gather",)
    assert [process.name for process in topology.processes] == ["gather"]
    assert topology.run_dir == f"/dev/shm/lmpipe-{os.getuid()}/a"
    assert (topology.chunk_tokens, topology.watchdog_ms, topology.metrics.port) == (256, 10_000, None)
    assert topology.tier_names == (Tier.DRAM,)
    assert topology.rings_needed == ()


def test_stages_follow_the_tiers() -> None:
    tiers = "dram: {capacity: 1GiB}, ssd: {directory: d, capacity: 2GiB%s}, remote: {url: file:///r, capacity: 1GiB%s}"
    text = f"name: a\ntiers: {{{tiers}}}\n"
    raw, encoded = parse(text % (", codec: raw", ", codec: raw")), parse(text % ("", ""))
    assert raw.stages == ("gather", "persist", "replicate")
    assert encoded.stages == ("gather", "compress", "persist", "replicate")
    assert encoded.rings_needed == ("compress", "persist", "replicate")
    assert encoded.codec == "split" and encoded.tiers.dram.codec == "raw", "lossless below DRAM, and only there"
    assert raw.tiers.ssd is not None and raw.tiers.ssd.directory == "/base/d"
    assert encoded.process_of("persist").name == "persist"


def test_compress_is_there_for_one_tenant_alone() -> None:
    tiers = "tiers: {dram: {capacity: 1GiB}, ssd: {directory: d, capacity: 2GiB, codec: raw}}\n"
    for tenants, encodes in (("[]", False), ("[{name: t, codec: raw}]", False), ("[{name: t, codec: zstd}]", True)):
        topology = parse(f"name: a\n{tiers}tenants: {tenants}\n")
        assert topology.encodes is encodes and ("compress" in topology.stages) is encodes
        assert topology.rings_needed == (("compress", "persist") if encodes else ())
    assert not parse(MINIMAL + "tenants: [{name: t, codec: zstd}]").encodes, "nothing is below"


def test_who_is_exact() -> None:
    some = parse(MINIMAL + "tenants: [{name: t, exact: true}, {name: u}]")
    assert [some.is_exact(tenant) for tenant in ("t", "u", "default")] == [True, False, False]
    assert all(parse(MINIMAL + "engines: {exact: true}\ntenants: [{name: u}]").is_exact(name) for name in "uv")


def test_directories_start_at_the_file() -> None:
    text = "name: a\ntiers: {dram: {capacity: 1GiB}, remote: {url: 'file:../r', capacity: 1GiB}}\nrun_dir: n"
    topology = parse(text)
    assert topology.tiers.remote is not None
    assert topology.tiers.remote.url == "file:///r"
    assert topology.run_dir == "/base/n"
    calibrated = parse(MINIMAL + "codecs: {adaptive: {calibration: ../bits.json}}")
    assert calibrated.codecs.adaptive.calibration == "/bits.json" and not topology.codecs.adaptive.calibration


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4096B", 4096), ("64KiB", 65536), ("1.5GiB", 3 << 29), ("2GB", 2_000_000_000), ("1 TiB", 1 << 40)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "1", "1 gib", "-1GiB", "1e3KiB", "1GiB2", "٣GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|unit"):
        parse_size(text)


def test_every_problem_at_once_with_line_path_and_nearest_name() -> None:
    found = problems(
        """\
        name: a
        tires: {}
        tiers:
          dram:
            capacity: 1GIB
            prefault: maybe
          ssd: {directory: d, capacty: 1GiB, flush: eech}
        chunk_tokens: 010
        """
    )
    assert found[0].startswith('f.yaml:2: tires: unknown field; did you mean "tiers"? (fields here: name, ')
    assert found[1].startswith('f.yaml:5: tiers.dram.capacity: unknown unit "GIB"; did you mean "GiB"?')
    assert found[2] == "f.yaml:6: tiers.dram.prefault: maybe: Expected `bool`, got `str`"
    assert found[3] == "f.yaml:7: tiers.ssd.capacity: this field is missing and has no default"
    assert found[4].startswith('f.yaml:7: tiers.ssd.capacty: unknown field; did you mean "capacity"?')
    assert found[5] == 'f.yaml:7: tiers.ssd.flush: "eech" is none of none, interval, each; did you mean "each"?'
    assert found[6] == "f.yaml:8: chunk_tokens: 010 is not a decimal number"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("name: b", "f.yaml:3: name: this field stands here twice"),
        ("name_: 3", "f.yaml:3: name_: unknown field"),
        ("chunk_tokens: 0", "f.yaml:3: chunk_tokens: 0: Expected `int` >= 1"),
        ("chunk_tokens: '256'", "f.yaml:3: chunk_tokens: 256: Expected `int`, got `str`"),
        ("chunk_tokens: 1:30", "is not a decimal number"),
        ("run_dir: 7", 'run_dir: text is wanted, this is a number: put it in quotes, "7"'),
        ("run_dir: !!python/object:os.x y", "has no meaning here"),
        ('run_dir: "\\0"', "run_dir: control characters are not allowed"),
        (f"run_dir: /{'x' * 90}", "bytes over the limit of 107; choose a shorter run_dir"),
        ("watchdog_ms: 2000", "watchdog_ms: must be more than two heartbeats (2000 ms)"),
        ("metrics: {port: 70000}", "metrics.port: 70000: Expected `int` <= 65535"),
        ("metrics: 3", "metrics: fields are wanted here"),
        ("processes: {}", "processes: a list is wanted here"),
        ("processes: [{name: g, stages: []}]", "a process runs at least one stage"),
        ("processes: [{name: supervisor, stages: [gather]}]", "and not supervisor"),
        ("processes: [{name: g, stages: [gathr]}]", '"gathr" is none of gather, compress, persist, replicate; did'),
        ("processes: [{name: g, stages: [persist]}]", "persist has nothing to do here: there is no tiers.ssd"),
        ("processes: [{name: g, stages: [compress]}]", "no tier below has a codec other than raw"),
        ("processes: [{name: g, stages: [persist]}]", "processes: not placed in any process: gather"),
        ("processes: [{name: g, stages: [gather]}, {name: g, stages: [gather]}]", 'a second process is named "g"'),
        ("processes: [{name: g, stages: [gather, gather]}]", 'gather is already placed in the process "g"'),
        ("processes: [{name: g, stages: [gather], cpus: [-1]}]", "cpus[0]: -1: Expected `int` >= 0"),
        ("tenants: [{codec: raw}]", "tenants[0].name: this field is missing"),
        ("tenants: [{name: t}, {name: t, exact: true}]", 'tenants[1].name: a second entry for the tenant "t"'),
        ("tenants: [{name: t, codec: int4}]", 'tenants[0].codec: unknown codec "int4"; did you mean "int4h"?'),
        ("tenants: [{name: t, exakt: true}]", 'tenants[0].exakt: unknown field; did you mean "exact"?'),
        ("codecs: {int4h: {sink_tokens: 65536}}", "codecs.int4h.sink_tokens: 65536: Expected `int` <= 65535"),
        ("codecs: {split: {}}", "codecs.split: unknown field"),
    ],
)  # fmt: skip
def test_refuses(more: str, problem: str) -> None:
    assert any(problem in line for line in problems(MINIMAL + more))


DRAM = "dram: {capacity: 1GiB}"


@pytest.mark.parametrize(
    ("tiers", "problem"),
    [
        ("dram: {capacity: 1KiB}", "f.yaml:2: tiers.dram.capacity: at least 1MiB"),
        ("dram: {capacity: 1MiB, slots: 1000}", "tiers.dram.slots: more slots than blocks"),
        (DRAM + ", ssd: {directory: d, capacity: 1GiB}", "at least two segments"),
        (DRAM + ", ssd: {directory: d, capacity: 1GiB, segment: 10000}", "a multiple of 4096"),
        (DRAM + ", ssd: {directory: d, capacity: 2GiB, codec: zst}", 'unknown codec "zst"; did you mean "zstd"?'),
        (DRAM + ", remote: {url: fil:///x, capacity: 1GiB}", 'is wanted; did you mean "file"?'),
        (DRAM + ", remote: {url: file://x, capacity: 1GiB}", "three slashes"),
        (DRAM + ", remote: {url: 'file:', capacity: 1GiB}", "s3://bucket/prefix is wanted"),
        (
            DRAM + ", ssd: {directory: d, capacity: 2GiB}, remote: {url: s3://b, capacity: 1GiB, codec: zstd}",
            "tiers.remote.codec: must be that of tiers.ssd (split)",
        ),
    ],
)
def test_refuses_tiers(tiers: str, problem: str) -> None:
    assert any(problem in line for line in problems(f"name: a\ntiers: {{{tiers}}}"))


NO_MAPPINGS = ["", "[", "a: b: c", "- 1", "7", "&a [*a]", "a: *b", "---\na: 1\n---\nb: 2", '"\\UFFFFFFFF"', "\x07"]


@pytest.mark.parametrize("text", [*NO_MAPPINGS, "[" * 5000])
def test_no_topology_at_all(text: str) -> None:
    assert problems(text)[0].startswith("f.yaml:")


def test_load_of_what_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="No such file"):
        tp.load(tmp_path / "none.yaml")
    with pytest.raises(TopologyError, match="Is a directory"):
        tp.load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    with pytest.raises(TopologyError, match="byte 6 is not UTF-8"):
        tp.load(tmp_path / "bytes.yaml")


TIERS = (tp.Tiers, tp.DramTier, tp.SsdTier, tp.RemoteTier)
KINDS = (Topology, *TIERS, tp.Process, tp.Rings, tp.Metrics, tp.Restarts, tp.Codecs, tp.Int4h, tp.Adaptive, tp.Tenant)
KEYS = st.sampled_from(sorted({field.name for kind in KINDS for field in msgspec.structs.fields(kind)}))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["1GiB", "gather", "persist", "zstd", "raw", "file:///x", "a"])
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=6)
)


def accepted_or_refused(text: str) -> None:
    try:
        topology = parse(text)
    except TopologyError as error:
        assert all(line.startswith("f.yaml:") for line in str(error).splitlines())
    else:
        assert msgspec.json.decode(msgspec.json.encode(topology), type=Topology) == topology


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=8))
def test_random_trees(tree: dict[str, object]) -> None:
    accepted_or_refused(yaml.safe_dump({"name": "a", "tiers": {"dram": {"capacity": "1GiB"}}} | tree))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200) | st.text("&*![]{}:-?|>'\"%@`#, \n\tab01~<=", max_size=60))
def test_random_text(text: str) -> None:
    accepted_or_refused(text)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([path.read_text() for path in SHIPPED]), st.integers(0, 800), st.text(max_size=3), st.integers(0, 4)
)
def test_random_edits(text: str, at: int, new: str, cut: int) -> None:
    accepted_or_refused(text[:at] + new + text[at + cut :])


def info(run_dir: Path) -> NodeInfo:
    topology = msgspec.structs.replace(parse(MINIMAL), run_dir=str(run_dir))
    return NodeInfo(tp.NODE_VERSION, topology, str(run_dir), "00", {"gather": {"save": "ipc:///x"}}, 1, 2.5)


def test_node_info_goes_there_and_back(tmp_path: Path) -> None:
    info(tmp_path).write()
    assert NodeInfo.read(tmp_path) == info(tmp_path)
    assert RunDir(tmp_path).node_json.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["node.json"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "no lmpipe node"), ("{}", "version"), ('{"version": 99}', "version 99"), ('{"version": 2}', "missing")],
)
def test_node_info_of_another_kind(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        write_atomically(RunDir(tmp_path).node_json, content.encode())
    with pytest.raises(NodeError, match=problem):
        NodeInfo.read(tmp_path)


def test_node_json_changes_with_its_version_only() -> None:
    """Who reads it has to know every field. Another digest: raise NODE_VERSION, then pin the new one here."""
    schema = msgspec.json.encode(msgspec.json.schema(NodeInfo), order="sorted")
    assert (tp.NODE_VERSION, hashlib.sha256(schema).hexdigest()[:16]) == (2, "d467f2eb1378cb30")


UUID = "GPU-00112233-4455-6677-8899-AABBCCddeeff"


def test_devices_by_number_or_uuid() -> None:
    text = MINIMAL + f"engines: {{devices: [0, '1', {UUID}, {UUID.replace('GPU', 'MIG')}, GPU-0123456789abcdef]}}\n"
    found = parse(text).engines.devices
    assert found == ["0", "1", UUID, UUID.replace("GPU", "MIG"), "GPU-0123456789abcdef"]


@pytest.mark.parametrize(
    ("engines", "problem"),
    [
        ("devices: [gpu0]", 'engines.devices[0]: "gpu0" is no GPU; write its UUID as nvidia-smi -L shows it, or its'),
        ("devices: [0, true]", 'engines.devices[1]: "True" is no GPU'),
        ("devices: [-1]", 'engines.devices[0]: "-1" is no GPU'),
        (f"devices: [{UUID}0]", "engines.devices[0]: "),
        ("devices: 0", "engines.devices: a list is wanted here"),
        ("device: [0]", 'engines.device: unknown field; did you mean "devices"?'),
        ("devices: [1, 1]", "engines.devices[1]: a second entry for the GPU 1"),
        (f"devices: {list(range(17))}", "engines.devices: 17 GPUs, one node takes 16"),
    ],
)
def test_devices_that_are_none(engines: str, problem: str) -> None:
    (found,) = problems(MINIMAL + f"engines: {{{engines}}}\n")
    assert found.startswith(f"f.yaml:3: {problem}")


def test_a_run_directory_is_not_taken_for_the_one_beside_another_s() -> None:
    line = "ends with .pages, as the directory beside a node's does; choose another run_dir or name"
    assert problems(MINIMAL.replace("name: a", "name: a.pages")) == [f"f.yaml:1: run_dir: {line}"]
    assert problems(MINIMAL + "run_dir: /x/a.pages\n") == [f"f.yaml:3: run_dir: {line}"]
    assert RunDir(Path("/x/a")).pages == Path("/x/a.pages")
