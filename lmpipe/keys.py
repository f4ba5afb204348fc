"""Names of chunks: two levels of BLAKE3, the same in every process and on every machine.

    content[i] = BLAKE3(tokens of chunk i as little-endian uint32 ‖ extras of chunk i)
    key[i]     = BLAKE3_keyed(namespace digest, key[i-1] ‖ content[i])[:16]        key[-1] = sixteen zero bytes

The first level is independent from chunk to chunk, so the native module hashes many at once in SIMD lanes; only 48
bytes per chunk go through the serial second level. In the index a key stands as anchor ‖ key, where the anchor is the
first 4 bytes of the key that
opens its group of 64 chunks: a prompt's rows become neighbours in the B-tree. The tensor-parallel rank is not in the
chain.

Owns what a key is made of. Does not know where a chunk is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt
import orjson

from lmpipe import native
from lmpipe.errors import UnsupportedError

KEY_VERSION = 1
KEY_BYTES = 16
ANCHOR_BYTES = 4
GROUP_CHUNKS = 64
KNOWN_EXTRAS = frozenset({"image", "audio", "video", "multimodal"})

_ROOT = bytes(KEY_BYTES)

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Extra:
    """Something other than token ids that the KV of a token range depends on.

    `kind` must be one of `KNOWN_EXTRAS`; `digest` names the content (an image's hash, say); tokens `[first, last)`
    depend on it.
    """

    kind: str
    first: int
    last: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Namespace:
    """The root of keys: two chunks may share bytes only if all of this is equal."""

    model: str
    revision: str
    layout: int
    kv_dtype: str
    chunk_tokens: int
    tenant: str = "default"
    weights_epoch: int = 0
    rope: str = ""
    adapter: str = ""
    cache_salt: str = ""
    epoch: int = 0

    def digest(self) -> bytes:
        """32 bytes: BLAKE3 of the fields as sorted JSON, with the key version."""
        fields = orjson.dumps({**asdict(self), "key_version": KEY_VERSION}, option=orjson.OPT_SORT_KEYS)
        return native.blake3_many(fields, len(fields)).tobytes()


def namespace_id(digest: bytes) -> int:
    """The 8 bytes of a namespace's digest that chunk records carry, as an integer."""
    return int.from_bytes(digest[:8], "little")


def as_tokens(tokens: Sequence[int] | npt.NDArray[np.integer]) -> Tokens:
    """Token ids, one dimension, as contiguous little-endian uint32.

    Raises:
        ValueError: not one-dimensional, or an id outside [0, 2**32).
    """
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens must have one dimension, got shape {array.shape}")
    if array.dtype != np.uint32:
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"tokens must be integers, got dtype {array.dtype}")
        if array.size and (int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF):
            raise ValueError("a token id lies outside [0, 2**32): placeholders and padding are never keyed")
        array = array.astype("<u4")
    return np.ascontiguousarray(array)


def _content(tokens: Tokens, chunk_tokens: int, first_chunk: int, extras: Iterable[Extra]) -> npt.NDArray[np.uint8]:
    """Level one for whole chunks: (n, 32). `tokens` begin at chunk `first_chunk` of the prompt."""
    count = len(tokens) // chunk_tokens
    whole = tokens[: count * chunk_tokens]
    content = native.blake3_many(whole.view(np.uint8).data, chunk_tokens * 4)
    spans: dict[int, list[bytes]] = {}
    for extra in sorted(extras, key=lambda e: (e.first, e.last, e.kind, e.digest)):
        if extra.kind not in KNOWN_EXTRAS:
            raise UnsupportedError(
                f"unknown extra {extra.kind!r} (known: {', '.join(sorted(KNOWN_EXTRAS))}): do not cache"
            )
        for chunk in range(extra.first // chunk_tokens, -(-extra.last // chunk_tokens)):
            # Positions relative to the chunk: the content hash stays free of where the chunk stands.
            first, last = extra.first - chunk * chunk_tokens, extra.last - chunk * chunk_tokens
            mark = orjson.dumps([extra.kind, max(first, 0), min(last, chunk_tokens), min(first, 0), extra.digest.hex()])
            spans.setdefault(chunk - first_chunk, []).append(mark)
    for chunk, marks in spans.items():
        if 0 <= chunk < count:
            body = whole[chunk * chunk_tokens : (chunk + 1) * chunk_tokens].tobytes() + b"".join(marks)
            content[chunk] = native.blake3_many(body, len(body))[0]
    return content


@dataclass(slots=True)
class Prompt:
    """One request's tokens and the keys of its whole chunks, hashed once and extended as tokens are confirmed.

    Only confirmed tokens belong here: no speculative drafts, no padding, no placeholders. Not thread-safe.
    """

    namespace: bytes
    """Digest that opens the chain: 32 bytes."""
    chunk_tokens: int
    tokens: int = 0
    keys: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, KEY_BYTES), np.uint8))
    """(chunks, 16)."""
    index_keys: list[bytes] = field(default_factory=list[bytes])
    """anchor ‖ key of every whole chunk, as the index stores them."""
    root: bytes = b""
    """Digest of the namespace that is invalidated as one: `namespace`, without this request's adapter and salt."""
    _tail: Tokens = field(default_factory=lambda: np.empty(0, np.uint32))
    _extras: list[Extra] = field(default_factory=list[Extra])

    def __post_init__(self) -> None:
        self.root = self.root or self.namespace

    @classmethod
    def of(
        cls,
        namespace: bytes,
        chunk_tokens: int,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        extras: Iterable[Extra] = (),
        root: bytes = b"",
    ) -> Prompt:
        """Hash a prompt. `root`: the namespace that `namespace` was made from, if it is not that itself.

        Raises:
            UnsupportedError: an extra of unknown kind; the prompt must not be cached.
            ValueError: tokens that cannot be keyed.
        """
        prompt = cls(namespace, chunk_tokens, root=root)
        prompt.extend(tokens, extras)
        return prompt

    @classmethod
    def of_keys(cls, root: bytes, chunk_tokens: int, keys: npt.NDArray[np.uint8]) -> Prompt:
        """A prompt whose (chunks, 16) keys were made in another process; it cannot be extended."""
        prompt = cls(b"", chunk_tokens, len(keys) * chunk_tokens, keys, root=root)
        prompt.index_keys = prompt._anchored(0)
        return prompt

    def part(self, first: int) -> Prompt:
        """The chunks from `first` on, for lookups only: the anchors of records count from the whole prompt's start."""
        tokens = max(self.tokens - first * self.chunk_tokens, 0)
        return Prompt(self.namespace, self.chunk_tokens, tokens, self.keys[first:], self.index_keys[first:], self.root)

    def extend(self, tokens: Sequence[int] | npt.NDArray[np.integer], extras: Iterable[Extra] = ()) -> None:
        """Append confirmed tokens; hashes only the chunks that become whole."""
        if not self.namespace:
            raise ValueError("a prompt made of keys cannot be extended: the chain's namespace is not known here")
        fresh = as_tokens(tokens)
        self._extras.extend(extras)
        self.tokens += len(fresh)
        pending = np.concatenate((self._tail, fresh)) if len(self._tail) else fresh
        count = len(pending) // self.chunk_tokens
        self._tail = pending[count * self.chunk_tokens :].copy()
        if not count:
            return
        done = len(self.keys)
        content = _content(pending, self.chunk_tokens, done, self._extras)
        parent = self.keys[-1].tobytes() if done else _ROOT
        keys = native.chain_keys(self.namespace, parent, content)
        self.keys = np.concatenate((self.keys, keys)) if done else keys
        self.index_keys += self._anchored(done)

    def anchors(self, first: int = 0) -> npt.NDArray[np.uint8]:
        """(chunks - first, 4): the anchor of every chunk from `first` on."""
        groups = np.arange(first, len(self.keys)) // GROUP_CHUNKS * GROUP_CHUNKS
        return self.keys[groups, :ANCHOR_BYTES]

    def _anchored(self, first: int) -> list[bytes]:
        flat, count = self.keys.tobytes(), len(self.keys)
        keys: list[bytes] = []
        while first < count:
            opens = first // GROUP_CHUNKS * GROUP_CHUNKS
            end = min(opens + GROUP_CHUNKS, count)
            anchor = flat[opens * KEY_BYTES : opens * KEY_BYTES + ANCHOR_BYTES]
            keys += [anchor + flat[at : at + KEY_BYTES] for at in range(first * KEY_BYTES, end * KEY_BYTES, KEY_BYTES)]
            first = end
        return keys
