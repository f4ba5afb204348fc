"""Slots, holds, streaming copies and shared words, each between processes that go as fast as they can."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torture import torture

SECONDS = 3.0

COUNT = """
import mmap, sys
from lmpipe import native
path, turns = sys.argv[1], int(sys.argv[2])
with open(path, "r+b") as file:
    words = native.Words(mmap.mmap(file.fileno(), 4096), 0, 8)
for turn in range(turns):
    words.fetch_add(0, 1)
    words.fetch_or(1, 1 << turn % 64)
    while not words.cas(2, 0, 1):
        pass
    words.store(3, words.load(3) + 1)
    words.store(2, 0)
"""


@pytest.fixture
def private(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_no_byte_is_wrong_under_writers_readers_eviction_and_deaths(private: Path) -> None:
    found = torture(private, SECONDS, writers=1)
    assert found.wrong == 0


def test_reading_without_holds_goes_wrong(private: Path) -> None:
    """Or the test above would prove nothing."""
    assert torture(private, 1.0, writers=1, holding=False).wrong > 0


def test_no_update_of_a_shared_word_is_lost_between_processes(private: Path) -> None:
    path = private / "words"
    path.write_bytes(bytes(4096))
    turns = 20_000
    children = [subprocess.Popen([sys.executable, "-c", COUNT, path, str(turns)]) for _ in range(2)]
    try:
        assert [child.wait(100) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    words = np.frombuffer(path.read_bytes(), np.uint64)
    assert words[0] == words[3] == 2 * turns, "added, and counted under a lock made of compare-and-swap"
    assert words[1] == 2**64 - 1 and words[2] == 0
