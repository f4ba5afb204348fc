"""Which codec a chunk gets: that of the tier, set as the topology says, or its tenant's own. Knows no tier's bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lmpipe.codecs import ChunkCodec, calibration, codec_named
from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.int4h import Int4hCodec
from lmpipe.errors import NodeError
from lmpipe.settings import Topology


def configured(topology: Topology, name: str) -> ChunkCodec:
    """The codec of that name, with the topology's settings.

    Raises:
        KeyError: there is none of that name.
        NodeError: no calibration file is named, or it cannot be read.
        FormatError: what is named is no calibration file.
    """
    settings = topology.codecs
    if name == "int4h":
        return Int4hCodec(settings.int4h.sink_tokens, settings.int4h.edge_layers)
    if name == "adaptive":
        path = settings.adaptive.calibration
        if not path:
            raise NodeError("adaptive needs the file that `lmpipe calibrate MODEL` writes: name it here")
        try:
            return AdaptiveCodec(calibration.read(Path(path)))
        except OSError as error:
            raise NodeError(f"{path}: {error.strerror}; `lmpipe calibrate MODEL` writes such a file") from None
    return codec_named(name)


class Choice:
    """The codecs of one node. `tenant_of` gives the tenant of a namespace id, empty where nothing is known of it."""

    def __init__(self, topology: Topology, tenant_of: Callable[[int], str]) -> None:
        self._tenant_of = tenant_of
        self._below = configured(topology, topology.codec)
        self._dram = configured(topology, topology.tiers.dram.codec)
        self._encodes_dram = topology.tiers.dram.codec != "raw"
        self._own = {tenant.name: configured(topology, tenant.codec) for tenant in topology.tenants if tenant.codec}

    def below(self, namespace_id: int) -> ChunkCodec:
        """For the tiers below DRAM, which take the same encoded chunk."""
        return self._own.get(self._tenant_of(namespace_id), self._below) if self._own else self._below

    def dram(self, namespace_id: int) -> ChunkCodec:
        """For DRAM: raw for all tenants where the tier's codec is."""
        if not self._own or not self._encodes_dram:
            return self._dram
        return self._own.get(self._tenant_of(namespace_id), self._dram)
