"""Counters and the node's words."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lmpipe.errors import SegmentError
from lmpipe.handles import Tier
from lmpipe.shm.counters import Counters
from lmpipe.shm.descriptor import HEADER_BYTES, SegmentKind
from lmpipe.shm.node import NodeWords
from lmpipe.shm.segment import Segment


def test_others_read_what_one_counts(run_dir: Path) -> None:
    path = run_dir / "a.shm"
    counters = Counters.create(path, ["saves", "lag", "größe"])
    counters.add("saves")
    counters.add(counters.index["saves"], 4)
    counters.set("lag", -7)
    counters.add("größe", 1 << 62)
    counters.add("lag", -3)
    assert (counters.get("saves"), counters.get(1)) == (5, -10)
    assert Counters.read(path) == {"saves": 5, "lag": -10, "größe": 1 << 62}
    counters.close()
    assert Counters.read(path)["saves"] == 5
    counters.close(unlink=True)
    with pytest.raises(SegmentError, match="no such segment"):
        Counters.read(path)


def test_threads_lose_no_count(run_dir: Path) -> None:
    counters = Counters.create(run_dir / "a.shm", [f"c{i}" for i in range(600)])
    threads = [threading.Thread(target=lambda: [counters.add("c599") for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.get("c599") == 20_000
    counters.close()


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_names_are_names(run_dir: Path, names: list[str]) -> None:
    with pytest.raises(SegmentError, match="need names"):
        Counters.create(run_dir / "a.shm", names)


@pytest.mark.parametrize(
    ("json", "count", "words"),
    [(b"[1", 1, "no JSON list"), (b"7", 1, "no JSON list"), (b'["a"]', 2, "2 counters and 1")],
)
def test_damaged_names_are_an_error(run_dir: Path, json: bytes, count: int, words: str) -> None:
    Segment.create(run_dir / "a.shm", SegmentKind.COUNTERS, 12_288, count=count, json=json).close()
    with pytest.raises(SegmentError, match=words):
        Counters.read(run_dir / "a.shm")


def test_node_words(run_dir: Path) -> None:
    made = NodeWords.create(run_dir / "node.shm")
    other = NodeWords.attach(run_dir / "node.shm")
    assert [made.index_generation(tier) for tier in Tier] == [0, 0, 0]
    for number, tier in enumerate(Tier, 5):
        made.set_index_generation(tier, number)
    assert [other.index_generation(tier) for tier in Tier] == [5, 6, 7]
    assert (other.epoch, made.advance_epoch(), other.epoch) == (0, 1, 1)
    for node in (made, other, made):
        node.close()


def test_a_node_segment_that_is_too_short(run_dir: Path) -> None:
    with (
        Segment.create(run_dir / "n", SegmentKind.NODE, HEADER_BYTES) as short,
        pytest.raises(SegmentError, match="do not fit"),
    ):
        NodeWords(short)
