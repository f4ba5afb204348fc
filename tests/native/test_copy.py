"""Page copies against a twin in NumPy, and what they refuse."""

import mmap
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmpipe import native

U8, U32, I32, U64 = np.uint8, np.uint32, np.int32, np.uint64


@dataclass
class Case:
    """A pool of planes of different page sizes, spread over two regions, with gaps and odd offsets."""

    memories: list[np.ndarray]
    plane_region: list[int]
    plane_offset: list[int]
    page_stride: list[int]
    page_bytes: list[int]
    pages: int

    @classmethod
    def make(cls, page_bytes: list[int], gap_bytes: int, pages: int, seed: int = 0) -> "Case":
        rng = np.random.default_rng(seed)
        sizes, region, offset = [13, 7], [], []
        for p, nbytes in enumerate(page_bytes):
            region.append(p % 2)
            offset.append(sizes[p % 2])
            sizes[p % 2] += (nbytes + gap_bytes) * pages + p
        memories = [rng.integers(0, 256, size, dtype=U8) for size in sizes]
        return cls(memories, region, offset, [b + gap_bytes for b in page_bytes], page_bytes, pages)

    def pool(self) -> native.PagePool:
        return native.PagePool(
            [native.Region(memory) for memory in self.memories],
            np.array(self.plane_region, U32),
            np.array(self.plane_offset, U64),
            np.array(self.page_stride, U64),
            np.array(self.page_bytes, U64),
            self.pages,
        )

    def page(self, plane: int, page: int) -> np.ndarray:
        start = self.plane_offset[plane] + page * self.page_stride[plane]
        return self.memories[self.plane_region[plane]][start : start + self.page_bytes[plane]]

    def payload(self, ids: np.ndarray) -> np.ndarray:
        """The twin of gather, of one chunk."""
        return np.concatenate([self.page(p, j) for p in range(len(self.page_bytes)) for j in ids.tolist()])

    def scatter(self, ids: np.ndarray, payload: np.ndarray) -> None:
        """The twin of scatter, of one chunk."""
        at = 0
        for p, nbytes in enumerate(self.page_bytes):
            for j in ids.tolist():
                if j >= 0:
                    self.page(p, j)[:] = payload[at : at + nbytes]
                at += nbytes

    def chunk_bytes(self, pages_per_chunk: int) -> int:
        return sum(self.page_bytes) * pages_per_chunk


def check(case: Case, ids: np.ndarray, threads: int, start: int) -> None:
    """Gathers, compares with the twin, scatters something else, compares again."""
    chunks, pages_per_chunk = ids.shape
    chunk_bytes, copier, pool = case.chunk_bytes(pages_per_chunk), native.Copier(threads), case.pool()
    offsets = start + np.arange(chunks, dtype=U64)[::-1] * U64(chunk_bytes + 3)
    payloads = np.full(start + chunks * (chunk_bytes + 3), 0xEE, U8)
    want = payloads.copy()
    for c, offset in enumerate(offsets.tolist()):
        want[offset : offset + chunk_bytes] = case.payload(ids[c])
    assert copier.gather(pool, ids, native.Region(payloads), offsets) == chunks * chunk_bytes
    assert np.array_equal(payloads, want)

    back = ids.copy()
    back[:, 0] = -1
    fresh = np.random.default_rng(9).integers(0, 256, payloads.size, dtype=U8)
    twin = Case(
        [memory.copy() for memory in case.memories],
        case.plane_region,
        case.plane_offset,
        case.page_stride,
        case.page_bytes,
        case.pages,
    )
    for c, offset in enumerate(offsets.tolist()):
        twin.scatter(back[c], fresh[offset : offset + chunk_bytes])
    copied = copier.scatter(pool, back, native.Region(fresh), offsets)
    assert copied == chunks * (chunk_bytes - case.chunk_bytes(1))
    for memory, expected in zip(case.memories, twin.memories, strict=True):
        assert np.array_equal(memory, expected)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    page_bytes=st.lists(st.integers(1, 5000) | st.sampled_from([64, 128, 256, 4096, 32768]), min_size=1, max_size=3),
    gap_bytes=st.sampled_from([0, 1, 64]),
    chunks=st.integers(1, 3),
    pages_per_chunk=st.integers(1, 9),
    threads=st.integers(1, 3),
    start=st.integers(0, 70),
    shuffled=st.booleans(),
)
def test_against_the_twin(
    level: str,
    page_bytes: list[int],
    gap_bytes: int,
    chunks: int,
    pages_per_chunk: int,
    threads: int,
    start: int,
    shuffled: bool,
) -> None:
    used = chunks * pages_per_chunk
    case = Case.make(page_bytes, gap_bytes, used + 2)
    ids = np.random.default_rng(used).permutation(used + 2)[:used] if shuffled else np.arange(1, used + 1)
    check(case, ids.astype(I32).reshape(chunks, pages_per_chunk), threads, start)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(
    ("page_bytes", "pages_per_chunk", "chunks"),
    [
        ([32768] * 4, 16, 2),  # an engine's paged KV
        ([128] * 6, 256, 16),  # a tensor whose page is a token
        ([3_000_001], 2, 1),  # blocks of all layers
        ([100, 700_000], 3, 2),
    ],
)
def test_large_transfers(level: str, page_bytes: list[int], pages_per_chunk: int, chunks: int, threads: int) -> None:
    used = pages_per_chunk * chunks
    case = Case.make(page_bytes, 0, used + 5)
    # Half of the chunks' pages follow each other, the others are anywhere.
    ids = np.arange(used)
    ids[: used // 2] = np.random.default_rng(1).permutation(used // 2)
    check(case, ids.astype(I32).reshape(chunks, pages_per_chunk), threads, 5)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5_000_017])
def test_memcpy(nbytes: int, threads: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, nbytes + 10, dtype=U8)
    target = np.zeros(nbytes + 10, U8)
    native.Copier(threads).memcpy(native.Region(target), 3, native.Region(source), 7, nbytes)
    assert np.array_equal(target[3 : 3 + nbytes], source[7 : 7 + nbytes])
    assert not target[:3].any() and not target[3 + nbytes :].any()


def test_a_region_by_address() -> None:
    memory = np.arange(100, dtype=U8)
    region = native.Region.at(memory.ctypes.data, 100, True, memory)
    assert (region.address, region.nbytes, region.writable) == (memory.ctypes.data, 100, True)
    target = np.zeros(100, U8)
    native.Copier(1).memcpy(native.Region(target), 0, region, 0, 100)
    assert np.array_equal(target, memory)
    references = sys.getrefcount(memory)
    del region
    assert sys.getrefcount(memory) == references - 1
    with pytest.raises(ValueError, match="address"):
        native.Region.at(0, 1, False, None)
    with pytest.raises(ValueError, match="nbytes"):
        native.Region.at(2**64 - 1, 2, False, None)


def test_a_bad_page_id_copies_nothing() -> None:
    case = Case.make([64], 0, 8)
    payload = np.zeros(8 * 64, U8)
    before = case.memories[0].copy()
    copier, pool, region, offsets = native.Copier(1), case.pool(), native.Region(payload), np.zeros(1, U64)
    for bad in (8, -2, 2**31 - 1, -(2**31)):
        ids = np.array([[0, 1, bad]], I32)
        with pytest.raises(ValueError, match=r"page_ids\[0, 2\]"):
            copier.gather(pool, ids, region, offsets)
        with pytest.raises(ValueError, match=r"page_ids\[0, 2\]"):
            copier.scatter(pool, ids, region, offsets)
    with pytest.raises(ValueError, match="scatter only"):
        copier.gather(pool, np.array([[0, -1]], I32), region, offsets)
    assert not payload.any() and np.array_equal(before, case.memories[0])


def test_bad_arguments() -> None:
    case = Case.make([64], 0, 8)
    copier, pool, ids = native.Copier(1), case.pool(), np.zeros((2, 2), I32)
    region, offsets = native.Region(np.zeros(256, U8)), np.array([0, 128], U64)
    with pytest.raises(TypeError, match="int32"):
        copier.gather(pool, ids.astype(np.int64), region, offsets)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="int32"):
        copier.gather(pool, np.zeros((2, 4), I32)[:, ::2], region, offsets)
    with pytest.raises(TypeError, match="uint64"):
        copier.gather(pool, ids, region, offsets.astype(np.int64))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="dst_offsets: 1 for 2 chunks"):
        copier.gather(pool, ids, region, offsets[:1].copy())
    with pytest.raises(ValueError, match=r"dst_offsets\[1\]"):
        copier.gather(pool, ids, region, np.array([0, 129], U64))
    with pytest.raises(ValueError, match=r"src_offsets\[0\]"):
        copier.scatter(pool, ids, region, np.array([2**64 - 1, 0], U64))
    with pytest.raises(ValueError, match="dst: the memory is read-only"):
        copier.gather(pool, ids, native.Region(bytes(256)), offsets)
    with pytest.raises(ValueError, match="threads"):
        native.Copier(0)
    with pytest.raises(ValueError, match="overlap"):
        copier.memcpy(region, 0, region, 10, 100)
    with pytest.raises(ValueError, match="src_offset"):
        copier.memcpy(region, 0, native.Region(bytes(8)), 0, 9)


def test_a_read_only_pool_is_gathered_from_only() -> None:
    pool = native.PagePool(
        [native.Region(bytes(range(64)))],
        np.zeros(1, U32),
        np.zeros(1, U64),
        np.full(1, 16, U64),
        np.full(1, 16, U64),
        4,
    )
    assert (pool.pages, pool.planes, pool.bytes_per_page) == (4, 1, 16)
    payload = np.zeros(16, U8)
    copier, ids = native.Copier(1), np.array([[2]], I32)
    assert copier.gather(pool, ids, native.Region(payload), np.zeros(1, U64)) == 16
    assert payload.tolist() == list(range(32, 48))
    with pytest.raises(ValueError, match="pool: the memory is read-only"):
        copier.scatter(pool, ids, native.Region(payload), np.zeros(1, U64))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"plane_region": [0, 2]}, r"plane_region\[1\]"),
        ({"plane_offset": [0, 10**6]}, r"plane_offset\[1\]"),
        ({"page_stride": [63, 64]}, r"page_stride\[0\].*overlap"),
        ({"page_stride": [64, 2**63]}, r"page_stride\[1\]"),
        ({"page_bytes": [0, 64]}, r"page_bytes\[0\]"),
        ({"page_bytes": [64]}, "page_bytes: 1 for 2 planes"),
        ({"pages": 0}, "pages"),
        ({"pages": 2**31}, "pages"),
        ({"pages": 9}, r"plane_offset\[0\]"),
    ],
)
def test_a_pool_that_does_not_fit(changed: dict[str, list[int] | int], match: str) -> None:
    case = Case.make([64, 64], 0, 8)
    for name, value in changed.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=match):
        case.pool()


def test_other_python_threads_run_during_a_large_copy() -> None:
    nbytes = 64 << 20
    source, target = mmap.mmap(-1, nbytes), mmap.mmap(-1, nbytes)
    copier, regions = native.Copier(2), (native.Region(target), native.Region(source))
    steps, ended, interval = 0, False, sys.getswitchinterval()

    def step() -> None:
        nonlocal steps
        while not ended:
            steps += 1
            time.sleep(0)

    # With so long an interval the other thread runs only while this one has given the lock up by itself.
    sys.setswitchinterval(100)
    thread = threading.Thread(target=step)
    try:
        thread.start()
        for _ in range(100):
            before = steps
            copier.memcpy(regions[0], 0, regions[1], 0, nbytes)
            if steps > before:
                break
        assert steps > before
    finally:
        ended = True
        sys.setswitchinterval(interval)
        thread.join()


def test_copies_from_many_threads_take_turns() -> None:
    copier, errors = native.Copier(3), []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                source = np.random.default_rng(seed).integers(0, 256, 3 << 20, dtype=U8)
                target = np.zeros_like(source)
                copier.memcpy(native.Region(target), 0, native.Region(source), 0, source.size)
                assert np.array_equal(target, source)
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_forked_child_copies_with_threads_of_its_own() -> None:
    script = """
import os, warnings
import numpy as np
from lmpipe import native
warnings.simplefilter("ignore")
source = np.arange(1 << 20, dtype=np.uint64)
copier = native.Copier(2)
def copy():
    target = np.zeros_like(source)
    copier.memcpy(native.Region(target), 0, native.Region(source), 0, source.nbytes)
    return bool(np.array_equal(source, target))
assert copy()
child = os.fork()
if child == 0:
    os._exit(0 if copy() and copy() else 1)
assert os.waitpid(child, 0)[1] == 0 and copy()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("write", [False, True])
def test_populate_keeps_what_is_there(tmp_path: Path, write: bool) -> None:
    path = tmp_path / "pages"
    path.write_bytes(bytes(range(256)) * 256)
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 65536)
    native.populate(native.Region(memory), 4097, 20_000, write)
    native.populate(native.Region(memory), 65536, 0, write)
    assert memory[:] == bytes(range(256)) * 256


def test_populate_refuses() -> None:
    region = native.Region(mmap.mmap(-1, 8192))
    with pytest.raises(ValueError, match="nbytes"):
        native.populate(region, 1, 8192, True)
    with pytest.raises(ValueError, match="read-only"):
        native.populate(native.Region(bytes(10)), 0, 10, True)


@pytest.mark.skipif(not native.features()["madvise_populate"], reason="touching is all that this system has")
def test_populate_says_when_the_memory_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(65536))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 65536)
        file.truncate(4096)
    with pytest.raises(OSError) as caught:
        native.populate(native.Region(memory), 0, 65536, True)
    assert caught.value.errno
