"""Segments of a node: made once, taken over when they fit, taken back when the start fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmpipe import topology as tp
from lmpipe.errors import SegmentError
from lmpipe.handles import Tier
from lmpipe.launch.segments import Segments
from lmpipe.rundir import RunDir
from lmpipe.shm.node import NodeWords
from lmpipe.topology import Topology

TEXT = """
name: n
run_dir: {run_dir}
tiers:
  dram: {{capacity: {capacity}, slots: 64}}
  ssd: {{directory: ssd, capacity: 2GiB, codec: zstd}}
rings: {{compress: 1MiB, persist: 2MiB}}
"""


class Place:
    """A run directory and what is said about it."""

    def __init__(self, path: Path) -> None:
        self.paths = RunDir(path)
        self.said: list[str] = []
        self.progress: list[tuple[str, int, int]] = []

    def topology(self, capacity: str = "2MiB") -> Topology:
        return tp.parse(TEXT.format(run_dir=self.paths.path, capacity=capacity), "f.yaml", Path("/tmp"))

    def segments(self, capacity: str = "2MiB") -> Segments:
        return Segments(self.paths, self.topology(capacity), self.said.append, lambda *step: self.progress.append(step))

    def files(self) -> set[str]:
        return {path.name for path in self.paths.path.iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "n").mkdir(mode=0o700)
    yield Place(tmp_path / "n")


def test_makes_all_of_them(place: Place) -> None:
    segments = place.segments()
    assert len(segments.build()) == 16
    assert place.files() == {"arena.shm", "node.shm", "ring.compress.shm", "ring.persist.shm"}
    assert not segments.took_over
    assert place.progress[-1][0] == "ring.persist"
    assert place.said == []


def test_takes_over_what_fits(place: Place) -> None:
    arena_id = place.segments().build()
    node = NodeWords.attach(place.paths.node_shm)
    node.set_index_generation(Tier.DRAM, 7)
    node.close()
    place.paths.ring("compress").unlink()  # whoever claims the directory removes the rings
    place.paths.ring("persist").unlink()
    again = place.segments()
    assert again.build() == arena_id
    assert again.took_over
    assert place.said[0].startswith("arena: taken over as it is")
    node = NodeWords.attach(place.paths.node_shm)
    assert node.index_generation(Tier.DRAM) == 7
    node.close()


def spoil(place: Place, how: str) -> str:
    if how == "another size":
        return "3MiB"
    with place.paths.arena.open("r+b") as file:
        if how == "cut":
            file.truncate(8192)
        else:
            file.write(b"garbage!")
    return "2MiB"


@pytest.mark.parametrize("how", ["another size", "cut", "garbage"])
def test_makes_anew_what_does_not_fit(place: Place, how: str) -> None:
    arena_id = place.segments().build()
    for path in place.paths.path.glob("ring.*"):
        path.unlink()
    capacity = spoil(place, how)
    again = place.segments(capacity)
    assert again.build() != arena_id
    assert not again.took_over
    assert place.said[0].startswith("arena: cannot be taken over, what it held is lost: ")


def test_no_room_leaves_nothing(place: Place) -> None:
    with pytest.raises(SegmentError, match=r"bytes are wanted and \d+ bytes are free"):
        place.segments("1000TiB").build()
    assert place.files() == set()


def test_a_later_failure_takes_back_what_was_made_and_leaves_what_was_there(place: Place) -> None:
    place.segments().build()
    place.paths.ring("persist").unlink()  # the other ring is in the way
    with pytest.raises(SegmentError, match="exists already"):
        place.segments().build()
    assert place.files() == {"arena.shm", "node.shm", "ring.compress.shm"}
