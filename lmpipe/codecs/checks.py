"""What a topology may not ask of codecs: to compute with pages of an unknown order, to lose where all has to be
exact, to do without a calibration. Each problem with its path in the topology and its mend.
"""

from __future__ import annotations

from collections.abc import Iterable

from lmpipe.codecs import CODECS, ChunkCodec
from lmpipe.codecs.choice import configured
from lmpipe.errors import FormatError, NodeError
from lmpipe.settings import Tiers, Topology

Problems = list[tuple[str, str]]
"""(path in the topology, problem and mend)."""


def conflicts(topology: Topology) -> Problems:
    """Codecs that what the topology says of its engines and tenants does not allow; for `topology.load`."""
    found = _numeric(topology.codec_names) if topology.engines.opaque_pages else []
    return found + _lossy(topology) + _uncalibrated(topology)


def misfits(tiers: Tiers, *, opaque: bool) -> Problems:
    """Of each tier whose codec cannot take the chunks of an engine.

    Args:
        opaque: whether the order inside the engine's pages is unknown (`KVLayout.opaque_page_bytes`).
    """
    return _numeric(tiers.codec_names) if opaque else []


def _numeric(named: Iterable[tuple[str, str]]) -> Problems:
    bytewise = _one_of(codec.name for codec in CODECS.values() if not codec.numeric)
    problem = "computes with the numbers in a page, whose order is unknown where pages are opaque; choose"
    return [
        (path, f"{name} {problem} {bytewise} here")
        for path, name in named
        if (codec := _codec(name)) is not None and codec.numeric
    ]


def _lossy(topology: Topology) -> Problems:
    exact = _one_of(codec.name for codec in CODECS.values() if not codec.fidelity)
    found: Problems = []

    def refuse_losses(named: Iterable[tuple[str, str]], at: str, mend: str) -> None:
        for path, name in named:
            if (codec := _codec(name)) is not None and codec.fidelity:
                found.append((at or path, f"{name} loses information, and {mend.format(path)}"))

    if topology.engines.exact:
        mend = f"engines.exact is true: choose {exact} here, or let only those tenants be exact that need it"
        refuse_losses(topology.codec_names, "", mend)
        return found
    for i, tenant in enumerate(topology.tenants):
        if tenant.exact and tenant.codec:
            own = f"tenants[{i}].codec"
            refuse_losses([(own, tenant.codec)], own, f"the tenant is to be exact: choose {exact} here")
        elif tenant.exact:
            mend = f"{{}} is this tenant's too: give it {exact} as a codec of its own"
            refuse_losses(topology.tiers.codec_names, f"tenants[{i}].exact", mend)
    return found


def _uncalibrated(topology: Topology) -> Problems:
    for _, name in topology.codec_names:
        if _codec(name) is not None:
            try:
                configured(topology, name)
            except (NodeError, FormatError) as error:
                return [("codecs.adaptive.calibration", str(error))]
    return []


def _codec(name: str) -> ChunkCodec | None:
    """None: of an unknown name, which is another check's to refuse."""
    return next((codec for codec in CODECS.values() if codec.name == name), None)


def _one_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
