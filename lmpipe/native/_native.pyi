"""The C++ extension. Array arguments are taken as they are: another dtype, rank or a gap in memory is a TypeError."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def blake3_many(data: Buffer, item_bytes: int) -> NDArray[np.uint8]:
    """BLAKE3 of each item of `data`, which is items of `item_bytes` bytes back to back.

    Returns shape (n, 32). Fastest in multiples of 16 items. ValueError if `data` is not a whole number of items.
    """

def chain_keys(namespace: bytes, parent: bytes, content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """key[i] = BLAKE3_keyed(namespace, key[i-1] || content[i])[:16], where key[-1] is `parent`.

    `namespace` has 32 bytes, `parent` 16, `content` shape (n, 32). Returns shape (n, 16). ValueError on another length.
    """

def xxh3_128(data: Buffer) -> bytes:
    """XXH3 with 128 bits (seed 0) as its 16 canonical, big-endian bytes: `xxhash.xxh3_128(data).digest()`."""

def xxh3_128_pieces(data: Buffer, piece_bytes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """XXH3-128 of consecutive pieces of `data`, the first at its start.

    `piece_bytes` has shape (n,), the result (n, 16). ValueError if the pieces run past the data.
    """

def split_encode(src: Buffer, dst: Buffer, dtype: int) -> int:
    """Codec `split` without its header: table, body and tail into `dst`; bytes written.

    `dtype`: 1 bf16, 2 fp16, 3 fp32. ValueError if `dst` is too short, or `src` has 4 GiB or more.
    """

def split_decode(src: Buffer, dst: Buffer, dtype: int) -> str:
    """The inverse: fills `dst`. Returns what is wrong with `src`, "" where nothing is; `dst` may be partly written."""

class Words:
    """`count` 64-bit words in a buffer, from an 8-byte aligned place on, shared with other threads and processes.

    The buffer is kept alive (an mmap cannot be closed while this exists). On a read-only buffer all that stores is a
    ValueError, and so is an index past the end.
    """

    def __init__(self, buffer: Buffer, offset_bytes: int, count: int) -> None: ...
    def __len__(self) -> int: ...
    def load(self, i: int) -> int:
        """Acquire: what was written before the store of this value is visible."""

    def store(self, i: int, v: int) -> None:
        """Release."""

    def exchange(self, i: int, v: int) -> int:
        """Stores and returns the old value; sequentially consistent, as all that follow."""

    def cas(self, i: int, expected: int, desired: int) -> bool:
        """Stores `desired` if the word is `expected`; whether it did."""

    def fetch_add(self, i: int, v: int) -> int:
        """Adds modulo 2^64; returns the old value."""

    def fetch_or(self, i: int, v: int) -> int: ...
    def fetch_and(self, i: int, v: int) -> int: ...
    def snapshot(self) -> NDArray[np.uint64]:
        """A copy of all words, shape (count,), then an acquire fence. Each word is whole, not all of one instant."""

def fence() -> None:
    """A sequentially consistent fence of this thread."""

class Headers:
    """The state words of `count` slots: 64 bits, generation << 8 | state, at `offset_bytes` + slot * `stride_bytes`.

    Both are multiples of 8. The buffer is kept alive and only read. ValueError if a state word would lie outside.
    """

    def __init__(self, buffer: Buffer, offset_bytes: int, stride_bytes: int, count: int) -> None: ...
    def __len__(self) -> int: ...

class HoldTable:
    """The owner's side of a table of holds: `entries` entries of two 64-bit words, (slot << 32 | generation, request).

    Word 0 of a free entry is 0. The list of free ones is kept in this object, so a table has one owner; entries that
    are in use when it is made stay so until they are released. Safe to share among threads.
    """

    def __init__(self, buffer: Buffer, offset_bytes: int, entries: int) -> None: ...
    @property
    def free(self) -> int:
        """Entries that can be taken."""

    def take(
        self,
        headers: Headers,
        slots: NDArray[np.uint32],
        generations: NDArray[np.uint32],
        committed_state: int,
        request: int,
    ) -> NDArray[np.uint32]:
        """Holds slots in order, up to the first that is not in `committed_state` with its generation (low 32 bits).

        It also ends when no entry is free. `slots` and `generations` have shape (n,); returns the entries taken, shape
        (m,) with m <= n: entry i holds slots[i], whose payload may be read until the entry is released. ValueError on
        a slot that `headers` does not have.
        """

    def release(self, entries: NDArray[np.uint32]) -> None:
        """Gives entries back, shape (m,). ValueError if one is not taken or named twice; then none is released."""

class Region:
    """Mapped memory: of a buffer (an mmap, an array), which is kept alive; read-only if the buffer is."""

    def __init__(self, buffer: Buffer) -> None: ...
    @staticmethod
    def at(address: int, nbytes: int, writable: bool, owner: object) -> Region:
        """Memory known by its address, such as a tensor's data_ptr(). `owner` keeps it mapped and is kept alive."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def writable(self) -> bool: ...

def populate(region: Region, offset: int, nbytes: int, write: bool) -> None:
    """Faults in the pages of a range, for reading or for writing; what they hold stays.

    OSError when the system has no memory for them (a full tmpfs: EFAULT), where touching would be a SIGBUS. Without
    MADV_POPULATE_* (Linux before 5.14) the pages are touched. ValueError past the region's end, or to write if it is
    read-only.
    """

class PagePool:
    """An engine's paged KV memory: plane p's page j is `page_bytes[p]` long and lies in `regions[plane_region[p]]` at
    `plane_offset[p]` + j * `page_stride[p]`.

    The arrays have shape (planes,). All bounds are checked here, once; ValueError names the argument and the plane.
    """

    def __init__(
        self,
        regions: list[Region],
        plane_region: NDArray[np.uint32],
        plane_offset: NDArray[np.uint64],
        page_stride: NDArray[np.uint64],
        page_bytes: NDArray[np.uint64],
        pages: int,
    ) -> None: ...
    @property
    def pages(self) -> int: ...
    @property
    def planes(self) -> int: ...
    @property
    def bytes_per_page(self) -> int:
        """Of one page id over all planes: a chunk's payload has this times its pages."""

class Copier:
    """Copies with `threads` threads (1 to 256), of which the caller is one. The others start at the first large copy,
    sleep between copies and are made anew in a forked child. Calls from several threads take turns.

    A payload holds the planes in order, and in each the chunk's pages in order. Copies of 1 MiB and more run without
    the interpreter lock.
    """

    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    def gather(self, pool: PagePool, page_ids: NDArray[np.int32], dst: Region, dst_offsets: NDArray[np.uint64]) -> int:
        """Pages to payloads. `page_ids` has shape (chunks, pages_per_chunk), `dst_offsets` (chunks,), in bytes.

        Returns the bytes copied. ValueError on a page id outside the pool or a payload outside `dst`, before anything
        is copied. All stores are done, and ordered before later ones, when it returns.
        """

    def scatter(self, pool: PagePool, page_ids: NDArray[np.int32], src: Region, src_offsets: NDArray[np.uint64]) -> int:
        """Payloads to pages: the inverse of gather, except that a page id of -1 leaves its page out."""

    def memcpy(self, dst: Region, dst_offset: int, src: Region, src_offset: int, nbytes: int) -> None:
        """The C library's memcpy with the range shared out equally: what copies are measured against."""

MAX_HEAD_DIM: int
"""Numbers of a vector that codecs of vectors take at most."""

def fp8_encode(src: Buffer, dtype: int, dim: int, dst: Buffer) -> bool:
    """Body of an `fp8` chunk: an exponent for each vector, then a code for each number.

    `src` is vectors of `dim` numbers; `dtype` as headers have it (1 bf16, 2 fp16, 3 fp32). False if a number is NaN or
    infinite. ValueError if `src` is not whole vectors or `dst` of another length. Large ones run without the
    interpreter lock, here and below.
    """

def fp8_decode(src: Buffer, dtype: int, dim: int, dst: Buffer) -> bool:
    """The inverse; False if an exponent is damaged."""

def rotated_encode(src: Buffer, dtype: int, dim: int, bits: NDArray[np.uint8], dst: Buffer) -> bool:
    """Body of an `int4h` or `adaptive` chunk: fp16 scales, fp16 minima, bit planes.

    `bits` has shape (vectors,): 3, 4 or 8 each. False if a number is NaN or infinite, or a minimum or scale does not
    fit fp16. ValueError as above.
    """

def rotated_decode(src: Buffer, dtype: int, dim: int, bits: NDArray[np.uint8], dst: Buffer) -> bool:
    """The inverse; False if a scale or minimum is damaged."""

def features() -> dict[str, str | bool]:
    """What this build and this CPU use: `level`, `levels` (all that can run), `blake3`, `copy`, `compiler`, ..."""

def _set_level(name: str) -> None:  # pyright: ignore[reportUnusedFunction]
    """For tests: use the kernels of another level. ValueError if this CPU cannot."""
