"""Which codec a topology gives whose chunks, and what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe.codecs import CODECS, ChunkCodec, Source, calibration
from lmpipe.codecs.checks import conflicts, misfits
from lmpipe.codecs.choice import Choice, configured
from lmpipe.codecs.header import Header
from lmpipe.errors import FormatError, NodeError, TopologyError
from lmpipe.handles import Codec
from lmpipe.layout import KVLayout
from lmpipe.topology import Topology, parse

LAYOUT = KVLayout.dense(2, 1, 64, "bfloat16")
LOSSY = sorted(codec.name for codec in CODECS.values() if codec.fidelity)
LOSSLESS = sorted(codec.name for codec in CODECS.values() if not codec.fidelity)
NAMES = st.sampled_from(sorted(codec.name for codec in CODECS.values() if codec.name != "adaptive"))


def text_of(dram: str = "raw", below: str = "raw", more: str = "") -> str:
    return (
        f"name: a\n{more}\ntiers:\n  dram: {{capacity: 1GiB, codec: {dram}}}\n"
        f"  ssd: {{directory: d, capacity: 2GiB, codec: {below}}}\n"
        f"  remote: {{url: file:///r, capacity: 1GiB, codec: {below}}}\n"
    )


def topology(dram: str = "raw", below: str = "raw", more: str = "", base: Path = Path("/base")) -> Topology:
    return parse(text_of(dram, below, more), "f.yaml", base)


def refused(dram: str = "raw", below: str = "raw", more: str = "", base: Path = Path("/base")) -> list[str]:
    try:
        parse(text_of(dram, below, more), "f.yaml", base, conflicts)
    except TopologyError as error:
        return str(error).splitlines()
    return []


def tenant_of(namespace: int) -> str:
    return {1: "one", 2: "two"}.get(namespace, "")


def header(codec: ChunkCodec) -> Header:
    raw = np.ones(LAYOUT.chunk_bytes(16) // 2, np.uint16).tobytes()
    into = bytearray(codec.bound(len(raw)))
    size = codec.encode(memoryview(raw), memoryview(into), Source(LAYOUT, 16, 0))
    return Header.unpack(memoryview(into)[:size], codec.number, len(raw))


def test_a_tenant_s_own_codec_goes_before_the_tiers() -> None:
    tenants = "tenants: [{name: one, codec: raw}, {name: two, exact: true}]"
    choice = Choice(topology("fp8", "zstd", tenants), tenant_of)
    assert [choice.below(n).number for n in (0, 1, 2)] == [Codec.ZSTD, Codec.RAW, Codec.ZSTD]
    assert [choice.dram(n).number for n in (0, 1, 2)] == [Codec.FP8, Codec.RAW, Codec.FP8]


def test_dram_stays_raw_for_everybody_unless_it_has_a_codec() -> None:
    choice = Choice(topology("raw", "zstd", "tenants: [{name: one, codec: fp8}]"), tenant_of)
    assert [choice.dram(n).number for n in (0, 1)] == [Codec.RAW, Codec.RAW]
    assert [choice.below(n).number for n in (0, 1)] == [Codec.ZSTD, Codec.FP8]


def test_settings_reach_the_codec(tmp_path: Path) -> None:
    more = "codecs: {int4h: {sink_tokens: 7, edge_layers: 1}}"
    found = header(configured(topology(more=more), "int4h"))
    assert (found.sink_tokens, found.edge_layers) == (7, 1)
    assert header(configured(topology(), "int4h")).sink_tokens == 4

    bits = [[[3], [4]], [[8], [3]]]
    made = calibration.Calibration(1, "m", 2, 2, 1, 64, 5.0, bits, [[[[0.3, 0.2, 0.1]] * 1] * 2] * 2)
    calibration.write(tmp_path / "bits.json", made)
    set_up = topology("raw", "adaptive", "codecs: {adaptive: {calibration: bits.json}}", tmp_path)
    assert header(Choice(set_up, tenant_of).below(0)).extra_bytes == 4


@pytest.mark.parametrize(("content", "problem"), [(None, "No such file"), (b"{}", "bits.json"), (b"\xff", "bits.json")])
def test_a_calibration_that_is_none_is_refused_at_check_time(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / "bits.json").write_bytes(content)
    more = "codecs: {adaptive: {calibration: bits.json}}"
    found = refused("raw", "adaptive", more, tmp_path)
    assert len(found) == 1 and found[0].startswith("f.yaml:2: codecs.adaptive.calibration: ") and problem in found[0]
    assert not refused("raw", "zstd", more, tmp_path), "which nobody needs"
    with pytest.raises((NodeError, FormatError)):
        configured(topology("raw", "adaptive", more, tmp_path), "adaptive")


def test_adaptive_without_a_calibration_says_what_is_missing() -> None:
    (found,) = refused("raw", "adaptive")
    assert "codecs.adaptive.calibration: adaptive needs the file that `lmpipe calibrate MODEL` writes" in found


@pytest.mark.parametrize("name", [name for name in LOSSY if name != "adaptive"])
def test_exact_engines_and_a_codec_that_loses(name: str) -> None:
    (found,) = refused(name, "raw", "engines: {exact: true}")
    assert found.startswith(f"f.yaml:4: tiers.dram.codec: {name} loses information, and engines.exact is true: choose ")
    assert all(exact in found for exact in LOSSLESS)
    paths = [line.split(": ")[1] for line in refused("raw", name, "engines: {exact: true}")]
    assert paths == ["tiers.ssd.codec", "tiers.remote.codec"]
    (found,) = refused(more=f"engines: {{exact: true}}\ntenants: [{{name: t, codec: {name}}}]")
    assert "tenants[0].codec" in found


@pytest.mark.parametrize("name", [name for name in LOSSY if name != "adaptive"])
def test_an_exact_tenant_and_a_codec_that_loses(name: str) -> None:
    found = refused("raw", name, "tenants: [{name: t, exact: true}]")
    assert len(found) == 2 and all("f.yaml:2: tenants[0].exact" in line for line in found)
    assert "tiers.ssd.codec is this tenant's too: give it" in found[1] and "as a codec of its own" in found[1]
    assert not refused("raw", name, "tenants: [{name: t, exact: true, codec: zstd}, {name: u}]")
    (found_own,) = refused("raw", "raw", f"tenants: [{{name: t, exact: true, codec: {name}}}]")
    assert "tenants[0].codec" in found_own and "the tenant is to be exact" in found_own


def test_opaque_pages_and_a_codec_of_numbers() -> None:
    found = refused("fp8", "zstd", "engines: {opaque_pages: true}\ntenants: [{name: t, codec: int4h}]")
    assert [line.split(": ")[1] for line in found] == ["tenants[0].codec", "tiers.dram.codec"]
    tiers = topology("fp8", "zstd").tiers
    assert [path for path, _ in misfits(tiers, opaque=True)] == ["tiers.dram.codec"]
    assert not misfits(tiers, opaque=False)


@settings(max_examples=200, deadline=None)
@given(
    dram=NAMES,
    below=NAMES,
    exact=st.booleans(),
    opaque=st.booleans(),
    tenants=st.lists(st.tuples(st.booleans(), st.none() | NAMES), max_size=3),
)
def test_what_is_accepted_keeps_its_word(
    dram: str, below: str, exact: bool, opaque: bool, tenants: list[tuple[bool, str | None]]
) -> None:
    names = [f"t{i}" for i in range(len(tenants))]
    listed = ", ".join(
        f"{{name: {name}, exact: {str(is_exact).lower()}" + (f", codec: {own}" if own else "") + "}"
        for name, (is_exact, own) in zip(names, tenants, strict=True)
    )
    words = f"engines: {{exact: {str(exact).lower()}, opaque_pages: {str(opaque).lower()}}}\ntenants: [{listed}]"
    made = topology(dram, below, words)
    choice = Choice(made, lambda namespace: names[namespace] if namespace < len(names) else "")
    given_out = {name: (choice.below(at), choice.dram(at)) for at, name in enumerate([*names, "somebody else"])}
    numeric = any(codec.numeric for codecs in given_out.values() for codec in codecs)
    lossy = any(codec.fidelity for name, codecs in given_out.items() if made.is_exact(name) for codec in codecs)
    if not conflicts(made):
        assert not (opaque and numeric) and not lossy
    elif not opaque and not exact and not any(is_exact for is_exact, _ in tenants):
        pytest.fail(f"refused for nothing: {conflicts(made)}")
