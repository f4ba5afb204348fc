"""One request on the scheduler's side: its keys, what was ordered for it, what is held for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.request import Request

from lmpipe.engines.vllm.identity import adapter_of
from lmpipe.engines.vllm.orders import BlockIds
from lmpipe.engines.vllm.settings import PREFIX
from lmpipe.errors import UnsupportedError
from lmpipe.handles import Fidelity
from lmpipe.keys import Extra, Prompt
from lmpipe.producer import Found, Producer

EXACT_SALT = "\0lmpipe.exact"
NULL_BLOCK = 0
"""vLLM's block for tokens that no layer of a group attends to any more."""


@dataclass(slots=True, eq=False)
class RequestState:
    """What is known of a request between its arrival and its end."""

    request: Request
    adapter: str
    extras: tuple[Extra, ...]
    salt: str
    """The request's own, as it came."""
    exact: bool
    """It asks for KV that has lost nothing."""
    apart: bool
    """What it finds in vLLM's own prefix cache has lost nothing either (`keep_apart`)."""
    fidelity: int = Fidelity.EXACT
    """Of the KV that it computes on, and so of what it saves."""
    prompt: Prompt | None = None
    ordered: int = 0
    """Chunks from the start that are saved, or ordered to be."""
    open: set[int] = field(default_factory=set[int])
    """Save orders without an answer from every rank."""
    found: Found | None = None
    computed: int = 0
    """Tokens that the engine had when `found` was looked up."""
    in_step: bool = False
    """Its load is made within the step that first computes it."""
    failed: bool = False
    """A load of it failed: the rest is computed, not tried again."""
    unsaveable: bool = False
    """Some block of it is gone already (outside a window): no later chunk can be of use."""

    def keyed(self, producer: Producer) -> Prompt:
        """Its keys, as far as its tokens are confirmed; made anew when the namespace or the chunk size has changed."""
        prompt, tokens = self.prompt, self.request.all_token_ids
        if prompt is None or prompt.root != producer.namespace:
            self.ordered = 0
            prompt = producer.prompt(tokens[:], self.extras, adapter=self.adapter, cache_salt=self.salt)
        elif len(tokens) - prompt.tokens >= producer.chunk_tokens - prompt.tokens % producer.chunk_tokens:
            prompt.extend(tokens[prompt.tokens :])
        self.prompt = prompt
        return prompt

    def release(self) -> None:
        """Let go of what is held for it."""
        found, self.found = self.found, None
        if found is not None:
            found.release()


def asks_exact(request: Request) -> bool:
    """Whether a request wants KV that has lost nothing."""
    return bool((request.kv_transfer_params or {}).get(f"{PREFIX}exact"))


def state_of(
    request: Request, adapters: dict[tuple[str, str], str], salt: str, exact: bool, apart: bool
) -> RequestState:
    """The state of a new request. `salt`: what it came with; `exact`: as it asks; `apart`: whether it is kept apart.

    Raises:
        UnsupportedError: its KV depends on something that keys do not name; it is neither loaded nor saved.
    """
    if request.prompt_embeds is not None or request.prompt_is_token_ids is not None:
        raise UnsupportedError("prompt embeddings")
    if request.pooling_params is not None:
        raise UnsupportedError("pooling")
    if request.resumable:
        raise UnsupportedError("streamed input, whose tokens are not final")
    extras = [
        Extra(
            "multimodal",
            feature.mm_position.offset,
            feature.mm_position.offset + feature.mm_position.length,
            f"{feature.modality}:{feature.identifier}".encode(),
        )
        for feature in request.mm_features
    ]
    return RequestState(request, adapter_of(request.lora_request, adapters), tuple(extras), salt, exact, apart)


def keep_apart(request: Request) -> None:
    """Give a request a part of vLLM's own prefix cache that only such requests share: blocks there may have been filled
    with KV that has lost something, or computed on it, and look like any others.
    """
    request.cache_salt = f"{request.cache_salt or ''}{EXACT_SALT}"
    request.block_hashes.clear()
    request.update_block_hashes()


def blocks_of(block_ids: Sequence[int], per_chunk: int, first: int, last: int, from_token_block: int = 0) -> BlockIds:
    """(last - first, per_chunk) block ids of chunks [first, last): -1 where there is none, and before a block."""
    ids = np.full((last - first) * per_chunk, -1, np.int32)
    there = np.asarray(block_ids[first * per_chunk : last * per_chunk], np.int32)
    ids[: len(there)] = np.where(there == NULL_BLOCK, -1, there)
    ids[: max(from_token_block - first * per_chunk, 0)] = -1
    return ids.reshape(last - first, per_chunk)
