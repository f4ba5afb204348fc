"""The digests, bit for bit against the reference packages."""

import blake3
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmpipe import native

# Every length class of XXH3 and every block, chunk and subtree boundary of BLAKE3, with its neighbours.
EDGES = sorted(
    {
        max(0, edge + d)
        for edge in (0, 3, 8, 16, 64, 128, 240, 256, 1024, 2048, 3072, 4096, 8192, 16384, 31744)
        for d in (-1, 0, 1)
    }
)
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def noise(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


@pytest.mark.parametrize("n", [1, 3, 16, 37])
def test_blake3_at_the_edges(level: str, n: int) -> None:
    for item_bytes in EDGES[1:]:
        data = noise(item_bytes * n)
        got = native.blake3_many(data, item_bytes)
        assert got.shape == (n, 32) and got.dtype == np.uint8
        want = [blake3.blake3(data[i * item_bytes : (i + 1) * item_bytes]).digest() for i in range(n)]
        assert [row.tobytes() for row in got] == want, item_bytes


@relaxed
@given(item_bytes=st.integers(1, 9000), n=st.integers(0, 20), seed=st.integers(0, 2**32))
def test_blake3_anywhere(level: str, item_bytes: int, n: int, seed: int) -> None:
    data = noise(item_bytes * n, seed)
    got = native.blake3_many(data, item_bytes)
    want = [blake3.blake3(data[i * item_bytes : (i + 1) * item_bytes]).digest() for i in range(n)]
    assert [row.tobytes() for row in got] == want


def test_blake3_of_a_deep_tree(level: str) -> None:
    data = noise(3 * 1_000_003)
    got = native.blake3_many(data, 1_000_003)
    for i in range(3):
        assert got[i].tobytes() == blake3.blake3(data[i * 1_000_003 : (i + 1) * 1_000_003]).digest()


def test_blake3_of_nothing() -> None:
    assert native.blake3_many(b"", 1024).shape == (0, 32)
    assert native.blake3_many(b"", 0).shape == (0, 32)


def test_blake3_takes_arrays_and_refuses_gaps() -> None:
    tokens = np.arange(512, dtype=np.uint32).reshape(2, 256)
    got = native.blake3_many(tokens, 1024)
    assert got[1].tobytes() == blake3.blake3(tokens[1].tobytes()).digest()
    with pytest.raises(TypeError, match="data"):
        native.blake3_many(tokens[:, ::2], 512)
    with pytest.raises(TypeError, match="data"):
        native.blake3_many("text", 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="data"):
        native.blake3_many(b"12345", 2)
    with pytest.raises(ValueError, match="data"):
        native.blake3_many(b"12345", 0)


def chained(namespace: bytes, parent: bytes, content: np.ndarray) -> list[bytes]:
    keys: list[bytes] = []
    for row in content:
        parent = blake3.blake3(parent + row.tobytes(), key=namespace).digest()[:16]
        keys.append(parent)
    return keys


@pytest.mark.parametrize("n", [0, 1, 2, 511])
def test_chain(level: str, n: int) -> None:
    namespace, parent = noise(32, 1), noise(16, 2)
    content = np.frombuffer(noise(32 * n, 3), np.uint8).reshape(n, 32)
    got = native.chain_keys(namespace, parent, content)
    assert got.shape == (n, 16)
    assert [row.tobytes() for row in got] == chained(namespace, parent, content)


def test_chain_continues_from_its_last_key(level: str) -> None:
    content = np.frombuffer(noise(32 * 10), np.uint8).reshape(10, 32)
    whole = native.chain_keys(bytes(32), bytes(16), content)
    rest = native.chain_keys(bytes(32), whole[3].tobytes(), content[4:])
    assert np.array_equal(whole[4:], rest)


def test_chain_refuses_wrong_shapes() -> None:
    content = np.zeros((4, 32), np.uint8)
    with pytest.raises(ValueError, match="namespace"):
        native.chain_keys(bytes(31), bytes(16), content)
    with pytest.raises(ValueError, match="parent"):
        native.chain_keys(bytes(32), bytes(32), content)
    with pytest.raises(ValueError, match="content"):
        native.chain_keys(bytes(32), bytes(16), content[:, :16].copy())
    with pytest.raises(TypeError, match="uint8"):
        native.chain_keys(bytes(32), bytes(16), content[:, ::2])
    with pytest.raises(TypeError, match="uint8"):
        native.chain_keys(bytes(32), bytes(16), content.astype(np.int8))  # pyright: ignore[reportArgumentType]


def test_xxh3_at_every_short_length_and_the_edges(level: str) -> None:
    for nbytes in {*range(0, 300), *EDGES}:
        data = noise(nbytes)
        assert native.xxh3_128(data) == xxhash.xxh3_128(data).digest(), nbytes


@relaxed
@given(nbytes=st.integers(0, 100_000), offset=st.integers(0, 65))
def test_xxh3_anywhere(level: str, nbytes: int, offset: int) -> None:
    data = noise(nbytes + offset)
    assert native.xxh3_128(memoryview(data)[offset:]) == xxhash.xxh3_128(data[offset:]).digest()


def test_xxh3_of_pieces(level: str) -> None:
    data = noise(3_000_000)
    piece_bytes = np.array([0, 5, 2_000_000, 240, 241, 1024, 1], np.uint64)
    got = native.xxh3_128_pieces(data, piece_bytes)
    assert got.shape == (7, 16)
    at = 0
    for row, nbytes in zip(got, piece_bytes.tolist(), strict=True):
        assert row.tobytes() == xxhash.xxh3_128(data[at : at + nbytes]).digest()
        at += nbytes


def test_xxh3_pieces_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"piece_bytes\[1\]"):
        native.xxh3_128_pieces(b"123456", np.array([4, 3], np.uint64))
    with pytest.raises(ValueError, match=r"piece_bytes\[1\]"):
        native.xxh3_128_pieces(b"123456", np.array([4, 2**64 - 1], np.uint64))
    with pytest.raises(TypeError, match="uint64"):
        native.xxh3_128_pieces(b"123456", np.array([4, 2]))  # pyright: ignore[reportArgumentType]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="avx1024"):
        native._native._set_level("avx1024")
