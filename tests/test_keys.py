"""Keys: equal to a plain reference over the `blake3` package, stable for ever, and sensitive to everything KV depends
on.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from lmpipe.errors import UnsupportedError
from lmpipe.keys import Extra, Namespace, Prompt, as_tokens

SPACE = Namespace("llama", "main", 7, "bfloat16", 16)
DIGEST = SPACE.digest()


def reference(tokens: list[int], chunk: int, digest: bytes = DIGEST) -> list[bytes]:
    keys, parent = [], bytes(16)
    for at in range(0, len(tokens) // chunk * chunk, chunk):
        content = blake3(b"".join(t.to_bytes(4, "little") for t in tokens[at : at + chunk])).digest()
        parent = blake3(parent + content, key=digest).digest()[:16]
        keys.append(parent)
    return keys


@given(st.lists(st.integers(0, 2**32 - 1), max_size=700), st.sampled_from([1, 16, 256, 300]))
def test_keys_equal_the_reference(tokens: list[int], chunk: int) -> None:
    prompt = Prompt.of(DIGEST, chunk, tokens)
    assert [key.tobytes() for key in prompt.keys] == reference(tokens, chunk)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_extending_gives_the_keys_of_the_whole(tokens: list[int], cuts: list[int]) -> None:
    whole = Prompt.of(DIGEST, 16, tokens)
    grown, at = Prompt.of(DIGEST, 16, []), 0
    for cut in [*sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]:
        grown.extend(tokens[at:cut])
        at = cut
    assert grown.index_keys == whole.index_keys
    assert np.array_equal(grown.keys, whole.keys) and grown.tokens == len(tokens)


def test_golden_keys() -> None:
    """These bytes are on users' disks: a change here is a new KEY_VERSION."""
    prompt = Prompt.of(DIGEST, 16, np.arange(48, dtype=np.uint32))
    assert DIGEST.hex() == "5f0b828482d323c20b54acd560390414e60320c5cfc11cf27a98996778cab018"
    assert [key.hex() for key in prompt.index_keys] == [
        "2ea7fd942ea7fd940ae1078b015cdb156f91e65e",
        "2ea7fd94d99e71445ac2e5e4d6daee8a4b364ece",
        "2ea7fd9475648d29ead547385842fa7132fbe9b8",
    ]


def test_index_keys_of_a_prompt_are_neighbours() -> None:
    prompt = Prompt.of(DIGEST, 16, np.arange(16 * 130, dtype=np.uint32))
    anchors = [key[:4] for key in prompt.index_keys]
    assert anchors[0] == prompt.keys[0, :4].tobytes() and len(set(anchors)) == 3
    assert anchors[63] == anchors[0] != anchors[64] == prompt.keys[64, :4].tobytes()
    assert all(key[4:] == prompt.keys[at].tobytes() for at, key in enumerate(prompt.index_keys))


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SPACE, **{name: value})
        for name, value in {
            "model": "qwen",
            "revision": "v2",
            "layout": 8,
            "kv_dtype": "float16",
            "chunk_tokens": 32,
            "tenant": "b",
            "weights_epoch": 1,
            "rope": "yarn",
            "adapter": "lora-1",
            "cache_salt": "s",
            "epoch": 1,
        }.items()
    ],
    ids=lambda space: str(space),
)
def test_everything_kv_depends_on_changes_the_key(other: Namespace) -> None:
    assert other.digest() != DIGEST


def test_extras_change_only_the_chunks_they_touch_and_those_after() -> None:
    tokens = list(range(64))
    plain = Prompt.of(DIGEST, 16, tokens)
    image = Prompt.of(DIGEST, 16, tokens, [Extra("image", 20, 40, b"cat")])
    other = Prompt.of(DIGEST, 16, tokens, [Extra("image", 20, 40, b"dog")])
    moved = Prompt.of(DIGEST, 16, tokens, [Extra("image", 21, 40, b"cat")])
    assert image.index_keys[0] == plain.index_keys[0]
    assert len({p.keys[1].tobytes() for p in (plain, image, other, moved)}) == 4
    assert len({p.keys[3].tobytes() for p in (plain, image, other, moved)}) == 4


def test_an_unknown_extra_is_not_cached() -> None:
    with pytest.raises(UnsupportedError, match="prompt_embeds"):
        Prompt.of(DIGEST, 16, list(range(32)), [Extra("prompt_embeds", 0, 4, b"x")])


@pytest.mark.parametrize("tokens", [[-1], [2**32], [[1, 2]], [0.5]])
def test_what_is_no_token_is_refused(tokens: list[object]) -> None:
    with pytest.raises(ValueError):
        as_tokens(tokens)  # type: ignore[arg-type]
