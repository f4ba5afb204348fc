"""What a codec is told of a chunk. Knows no codec."""

from __future__ import annotations

from dataclasses import dataclass

from lmpipe.layout import KVLayout


@dataclass(frozen=True, slots=True)
class Source:
    """What an encoder is told of a chunk beside its bytes. `layout`: None where it is not known."""

    layout: KVLayout | None = None
    chunk_tokens: int = 0
    position: int = 0
    """Index of the chunk in its prompt: the first one has the sink tokens."""


ANY = Source()
