"""`lmpipe check`, and the picture it draws."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from lmpipe import topology as tp
from lmpipe.cli.check import shared_bytes, warnings_of
from lmpipe.cli.picture import draw, size

Lmpipe = Callable[..., tuple[int, str, str]]
SHIPPED = sorted((Path(__file__).parents[2] / "topologies").glob("*.yaml"))
TWO = """
name: two
run_dir: /dev/shm/two
processes:
  - {name: front, stages: [gather, compress], cpus: [0]}
  - {name: persist, stages: [persist]}
tiers:
  dram: {capacity: 1GiB}
  ssd: {directory: /tmp, capacity: 2GiB, codec: zstd}
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files(lmpipe: Lmpipe, path: Path) -> None:
    status, out, _ = lmpipe("check", path)
    assert status == 0
    assert out.startswith(f"{path}: right\n")
    assert "│ gather" in out


def test_json_has_every_default(lmpipe: Lmpipe) -> None:
    status, out, _ = lmpipe("check", SHIPPED[0], "--json")
    found = json.loads(out)
    assert status == 0
    assert found["topology"]["chunk_tokens"] == 256
    assert isinstance(found["warnings"], list)


def test_wrong_file(lmpipe: Lmpipe, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: a\ntiers: {dran: {}}\n")
    status, out, err = lmpipe("check", tmp_path / "bad.yaml")
    assert (status, out) == (2, "")
    assert 'bad.yaml:2: tiers.dran: unknown field; did you mean "dram"?' in err


def topology(text: str) -> tp.Topology:
    return tp.parse(textwrap.dedent(text), "f.yaml", Path("/tmp"))


def test_picture_lines_up() -> None:
    lines = draw(topology(TWO)).splitlines()
    boxes = lines[: lines.index("")]
    assert {len(line) for line in boxes[1:-1]} == {len(boxes[1])}
    assert "process front on CPU 0" in boxes[0]
    assert sum("───▶" in line for line in boxes) == 1
    assert lines[-1].split() == ["ssd", "index", "256", "MiB", "/tmp"]


def test_warns_about_this_machine(tmp_path: Path) -> None:
    small = f"name: a\nrun_dir: {tmp_path}/n\ntiers: {{dram: {{capacity: 1MiB}}}}\nindex: {{dram: 1MiB}}"
    assert warnings_of(topology(small)) == []
    large = TWO.replace("1GiB", "900TiB").replace("2GiB", "800TiB").replace("[0]", "[4000]")
    found = "\n".join(warnings_of(topology(large)))
    assert "900 TiB of shared memory are wanted" in found
    assert "tiers.ssd wants 800 TiB" in found
    assert "process front: this machine has no CPU 4000 for it" in found


def test_shared_bytes_counts_what_is_made() -> None:
    assert shared_bytes(topology(TWO)) == (1024 + 2 * 128 + 2 * 256) << 20


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (3 << 50, "3 PiB")])
def test_size(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
