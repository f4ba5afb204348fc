"""What an engine adapter is given and gives: options, the attachment, what was done for a request. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from lmpipe.handles import Fidelity, Tier
from lmpipe.producer import Producer


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """How an engine is attached.

    `name` and `revision` name the model (default: what its config says); its weights are part of every key in any
    case. `tenant`, `adapter` and `cache_salt` keep caches apart. `on_unsupported`: run what lmpipe cannot do rightly
    without a cache ("bypass", with one log line for each reason) or raise `UnsupportedError` ("raise").
    `save_answers`: save the KV of generated tokens too. `load_deadline_ms`: what has not been loaded by then is
    computed (None: the node's setting). `min_tokens`: shorter prompts are neither looked up nor saved.
    `copy_threads`: threads of this process that copy KV. `exact`: take no KV that lost information in a codec, nor any
    that was computed on such; for one request, `generate(…, lmpipe_exact=True)`.
    """

    name: str | None = None
    revision: str = ""
    tenant: str = "default"
    adapter: str = ""
    cache_salt: str = ""
    on_unsupported: Literal["bypass", "raise"] = "bypass"
    save_answers: bool = True
    load_deadline_ms: int | None = None
    min_tokens: int = 0
    copy_threads: int = 1
    exact: bool = False


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What lmpipe did for one request (all rows of a batch together).

    `hit_tokens` were loaded instead of computed, `hit_by_tier` splits them, `fidelity` is that of the least exact
    (`handles.Fidelity`; 0: nothing was lost); `saved_tokens` were handed to the producer to be saved; `reason` is
    "loaded", "miss", "short", the producer's state when it was not ready, or why the request went without a cache.
    """

    prompt_tokens: int = 0
    hit_tokens: int = 0
    hit_by_tier: dict[Tier, int] = field(default_factory=dict[Tier, int])
    fidelity: int = Fidelity.EXACT
    loaded_bytes: int = 0
    lookup_ms: float = 0.0
    load_ms: float = 0.0
    save_ms: float = 0.0
    saved_tokens: int = 0
    reason: str = ""


class Attachment(Protocol):
    """One engine with lmpipe switched on."""

    @property
    def last(self) -> RequestInfo | None:
        """What was done for the latest request."""
        ...

    @property
    def producer(self) -> Producer | None:
        """The producer in use; None while nothing could be cached."""
        ...

    def stats(self) -> dict[str, int]:
        """Counters of this attachment and of its producers."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Wait until all saves are answered."""
        ...

    def detach(self) -> None:
        """Give the engine back as it was, and close the producers."""
        ...


class Adapter(Protocol):
    """How one kind of engine is recognised and attached."""

    def claims(self, model: object) -> bool:
        """Whether this adapter knows how to attach `model`."""
        ...

    def attach(self, model: object, run_dir: Path, options: AttachOptions) -> Attachment:
        """Switch lmpipe on."""
        ...
