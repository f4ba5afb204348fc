"""The names of remote objects, from which a listing rebuilds the index. Knows no store.

      <namespace>/<anchor><key>/<shard>-<shards>-<layout>-<codec>-<fidelity>-<position>-<raw>-<stored>-<saved>-<expires>

Everything of the chunk record but `place`, in lower-case hexadecimal digits: fixed width for namespace, anchor and key,
else without leading zeros. So a namespace and a chunk are prefixes that a store can list.
"""

from __future__ import annotations

import re

import numpy as np

from lmpipe.errors import FormatError
from lmpipe.handles import BLOCK_BYTES, CHUNK

_NUMBERS = (
    "shard",
    "shards",
    "layout",
    "codec",
    "fidelity",
    "position",
    "raw_bytes",
    "nbytes",
    "saved_at",
    "expires_at",
)
_NAME = re.compile(r"([0-9a-f]{16})/([0-9a-f]{8})([0-9a-f]{32})/([0-9a-f]{1,16}(?:-[0-9a-f]{1,16}){9})")


def object_name(record: np.void) -> str:
    """The object of a record."""
    return f"{chunk_prefix(record)}/{'-'.join(format(int(record[name]), 'x') for name in _NUMBERS)}"


def namespace_prefix(namespace: int) -> str:
    """What the names of a namespace's objects begin with."""
    return format(namespace, "016x")


def chunk_prefix(record: np.void) -> str:
    """What the names of all objects of a chunk begin with."""
    name = record["anchor"].tobytes() + record["key"].tobytes()
    return f"{namespace_prefix(int(record['namespace']))}/{name.hex()}"


def parse_name(name: str, nbytes: int) -> np.void:
    """Inverse of `object_name`; `nbytes` is the object's size.

    Raises:
        FormatError: not a name of ours, or not one that fits an object of this size.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise FormatError(f"object {name!r}: not a name of lmpipe")
    namespace, anchor, key, numbers = match.groups()
    record = np.zeros(1, CHUNK)[0]
    record["namespace"] = int(namespace, 16)
    record["anchor"], record["key"] = np.void(bytes.fromhex(anchor)), np.void(bytes.fromhex(key))
    try:
        for field, digits in zip(_NUMBERS, numbers.split("-"), strict=True):
            record[field] = int(digits, 16)
    except OverflowError:
        raise FormatError(f"object {name!r}: a number is out of range") from None
    if object_name(record) != name:
        raise FormatError(f"object {name!r}: not as lmpipe writes it")
    if int(record["nbytes"]) + BLOCK_BYTES != nbytes or int(record["shard"]) >= int(record["shards"]):
        raise FormatError(f"object {name!r}: does not fit its {nbytes} bytes")
    return record
