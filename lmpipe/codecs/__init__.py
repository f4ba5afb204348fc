"""Codecs: one file each, encode and decode side by side, buffers owned by the caller. Knows no slot and no tier."""

from __future__ import annotations

from typing import Protocol

from lmpipe.codecs.raw import RawCodec
from lmpipe.codecs.source import ANY as ANY
from lmpipe.codecs.source import Source as Source
from lmpipe.codecs.zstd import ZstdCodec
from lmpipe.handles import Codec, Fidelity
from lmpipe.settings import Tiers, Topology


class ChunkCodec(Protocol):
    """How a chunk's bytes are written smaller. Instances hold no state: any thread may use them.

    Encoded bytes describe themselves; what a codec was configured with is of no use to a decoder.
    """

    @property
    def number(self) -> Codec:
        """As stored with every chunk."""
        ...

    @property
    def name(self) -> str:
        """As the topology writes it."""
        ...

    @property
    def fidelity(self) -> Fidelity:
        """`EXACT`: decoding gives back every bit."""
        ...

    @property
    def numeric(self) -> bool:
        """Whether it has to know the order inside a page (`KVLayout.canonical`); False: bytes are bytes to it."""
        ...

    def bound(self, raw_bytes: int) -> int:
        """Bytes that `dst` of `encode` must have at least."""
        ...

    def encode(self, src: memoryview, dst: memoryview, source: Source) -> int:
        """Write `src` into `dst`; the number of bytes written.

        Raises:
            ValueError: `dst` is shorter than the result.
            CannotEncode: the chunk cannot be written this way (no layout, not a number, another dtype): keep it raw.
        """
        ...

    def decode(self, src: memoryview, dst: memoryview) -> None:
        """Inverse of `encode`: fills `dst`, whose length is the payload's before encoding.

        Raises:
            FormatError: `src` is damaged, or holds a payload of another length. `dst` may be partly written.
        """
        ...


CODECS: dict[Codec, ChunkCodec] = {codec.number: codec for codec in (RawCodec(), ZstdCodec())}


def codec_named(name: str) -> ChunkCodec:
    """The codec that a topology names.

    Raises:
        KeyError: there is none of that name.
    """
    return {codec.name: codec for codec in CODECS.values()}[name]


def misfits(tiers: Tiers, *, opaque: bool) -> list[tuple[str, str]]:
    """(path in the topology, problem and mend) of each tier whose codec cannot take the chunks of an engine.

    Args:
        opaque: whether the order inside the engine's pages is unknown (`KVLayout.opaque_page_bytes`).
    """
    return _numeric(tiers.codec_names) if opaque else []


def conflicts(topology: Topology) -> list[tuple[str, str]]:
    """Codecs that what the topology says of its engines and tenants does not allow; for `topology.load`."""
    found = _numeric(topology.codec_names) if topology.engines.opaque_pages else []
    if topology.engines.exact:
        mend = "engines.exact is true: choose {} here, or let exact be true for those tenants only that need it"
        found += [(path, _loses(name, mend)) for path, name in topology.codec_names if _is_lossy(name)]
        return found
    for i, tenant in enumerate(topology.tenants):
        if not tenant.exact:
            continue
        if tenant.codec:
            named, path = [("its codec", tenant.codec)], f"tenants[{i}].codec"
        else:
            named, path = topology.tiers.codec_names, f"tenants[{i}].exact"
        for where, name in named:
            if _is_lossy(name):
                found.append((path, _loses(name, f"the tenant is exact ({where}): give it {{}} as a codec of its own")))
    return found


def _numeric(named: list[tuple[str, str]]) -> list[tuple[str, str]]:
    bytewise = _one_of([codec.name for codec in CODECS.values() if not codec.numeric])
    return [
        (
            path,
            f"{name} computes with the numbers in a page, whose order is unknown where pages are opaque; choose"
            f" {bytewise} here",
        )
        for path, name in named
        if any(codec.name == name and codec.numeric for codec in CODECS.values())
    ]


def _is_lossy(name: str) -> bool:
    return any(codec.name == name and codec.fidelity for codec in CODECS.values())


def _loses(name: str, mend: str) -> str:
    exact = _one_of([codec.name for codec in CODECS.values() if not codec.fidelity])
    return f"{name} loses information, and {mend.format(exact)}"


def _one_of(names: list[str]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
