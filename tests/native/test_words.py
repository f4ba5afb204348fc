"""Shared words: whole, bounded, and the same words for every mapping."""

import mmap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lmpipe import native


def test_operations() -> None:
    words = native.Words(bytearray(64), 8, 7)
    assert len(words) == 7
    words.store(2, 2**64 - 1)
    assert words.load(2) == 2**64 - 1
    assert words.fetch_add(2, 3) == 2**64 - 1 and words.load(2) == 2
    assert words.fetch_or(2, 5) == 2 and words.load(2) == 7
    assert words.fetch_and(2, 4) == 7 and words.load(2) == 4
    assert words.exchange(2, 9) == 4
    assert not words.cas(2, 4, 1) and words.load(2) == 9
    assert words.cas(2, 9, 1) and words.load(2) == 1
    native.fence()


def test_place_and_snapshot() -> None:
    memory = np.zeros(16, np.uint64)
    words = native.Words(memory, 24, 4)
    words.store(0, 7)
    assert memory[3] == 7
    memory[6] = 8
    copy = words.snapshot()
    assert copy.tolist() == [7, 0, 0, 8] and copy.dtype == np.uint64
    memory[6] = 9
    assert copy[3] == 8


def test_two_mappings_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        writer = native.Words(mmap.mmap(file.fileno(), 4096), 0, 512)
        reader = native.Words(mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ), 0, 512)
    writer.store(511, 42)
    assert reader.load(511) == 42 and reader.snapshot()[511] == 42


def test_read_only_memory_refuses_stores() -> None:
    words = native.Words(bytes(64), 0, 8)
    for store in (
        lambda: words.store(0, 1),
        lambda: words.exchange(0, 1),
        lambda: words.cas(0, 0, 1),
        lambda: words.fetch_add(0, 1),
        lambda: words.fetch_or(0, 1),
        lambda: words.fetch_and(0, 1),
    ):
        with pytest.raises(ValueError, match="read-only"):
            store()


@pytest.mark.parametrize(("offset", "count"), [(0, 9), (8, 8), (72, 0), (2**63, 1), (0, 2**61), (0, 2**64 - 1)])
def test_words_have_to_fit(offset: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"offset_bytes|count"):
        native.Words(bytearray(64), offset, count)


def test_bad_places() -> None:
    with pytest.raises(ValueError, match="8-byte aligned"):
        native.Words(np.zeros(8, np.uint64), 4, 2)
    with pytest.raises(TypeError, match="buffer"):
        native.Words([1, 2], 0, 1)  # pyright: ignore[reportArgumentType]
    words = native.Words(bytearray(64), 0, 2)
    with pytest.raises(ValueError, match="word 2 of 2"):
        words.load(2)
    with pytest.raises(ValueError, match="word 2 of 2"):
        words.store(2, 0)
    with pytest.raises(TypeError):
        words.store(0, -1)
    with pytest.raises(TypeError):
        words.store(0, 2**64)


def test_no_increment_is_lost_among_threads() -> None:
    words = native.Words(bytearray(8), 0, 1)

    def count() -> None:
        for _ in range(5000):
            words.fetch_add(0, 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert words.load(0) == 20_000


def test_the_buffer_is_kept_alive_and_then_let_go() -> None:
    mapping = mmap.mmap(-1, 4096)
    words = native.Words(mapping, 0, 8)
    with pytest.raises(BufferError):
        mapping.close()
    del words
    mapping.close()


def test_nothing_leaks() -> None:
    memory = bytearray(1 << 16)
    tracemalloc.start()
    try:
        for _ in range(50):
            native.Words(memory, 0, 8192).snapshot()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            native.Words(memory, 0, 8192).snapshot()
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
    finally:
        tracemalloc.stop()
    memory.append(0)  # a buffer that is still exported could not grow
