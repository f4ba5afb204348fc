"""What a user sets in `kv_connector_extra_config`, and what is refused at start-up, with its cause and its mend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import vllm
from vllm.config import VllmConfig

from lmpipe.engines import run_dir_of
from lmpipe.errors import UnsupportedError

SUPPORTED = "0.32"
"""The vLLM whose connector interface this was written and tested against: any release 0.32.x."""
DEFAULT_NODE = "vllm-cpu"
PREFIX = "lmpipe."

_DRAFTS_WITHOUT_KV = ("ngram", "suffix")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of the extra config, each written with `lmpipe.` before it.

    `node`: run directory of a node, or the name of a topology. `name`: as `lmpipe status` shows the engine. `tenant`
    keeps caches apart. `pages`: "shared" puts the KV cache into shared memory, or exports it from its GPU, and gather
    copies saves from it; "private" has this process copy them. `copy_threads`: threads of a worker that copy, on CPUs.
    `load_deadline_ms`: what has not come by then is computed (None: the node's setting). `free_deadline_ms`: how long
    the blocks of a finished request may wait for its saves. `exact`: load no KV that lost information in a codec, nor
    any that was computed on such; for one request, `lmpipe.exact` in its `kv_transfer_params`. `any_version`: run with
    a vLLM that was not tested.
    """

    node: str = DEFAULT_NODE
    name: str = "vllm"
    tenant: str = "default"
    pages: Literal["shared", "private"] = "shared"
    copy_threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    load_deadline_ms: Annotated[int, msgspec.Meta(ge=0)] | None = None
    free_deadline_ms: Annotated[int, msgspec.Meta(ge=0)] = 1000
    exact: bool = False
    any_version: bool = False

    @property
    def run_dir(self) -> Path:
        """The node's run directory."""
        return run_dir_of(self.node)


def settings_of(config: VllmConfig) -> Settings:
    """The settings in a vLLM configuration.

    Raises:
        UnsupportedError: a setting that is not known or not allowed.
    """
    assert config.kv_transfer_config is not None
    extra: dict[str, Any] = config.kv_transfer_config.kv_connector_extra_config
    given = {key.removeprefix(PREFIX): value for key, value in extra.items() if key.startswith(PREFIX)}
    try:
        return msgspec.convert(given, Settings)
    except msgspec.ValidationError as error:
        known = ", ".join(PREFIX + name for name in Settings.__struct_fields__)
        raise UnsupportedError(f"kv_connector_extra_config: {error} (known: {known})") from None


def check(config: VllmConfig, settings: Settings) -> None:
    """Refuse what could end in a wrong token or in an empty answer.

    Raises:
        UnsupportedError: what is wrong, and what to set instead.
    """
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    assert transfer is not None
    version = ".".join(vllm.__version__.split(".")[:2])
    if version != SUPPORTED and not settings.any_version:
        raise UnsupportedError(
            f"vLLM {vllm.__version__} was not tested with this lmpipe, which supports {SUPPORTED}.x: install that,"
            f' or set "{PREFIX}any_version": true in kv_connector_extra_config at your own risk'
        )
    if transfer.kv_load_failure_policy != "recompute":
        raise UnsupportedError(
            "with kv_load_failure_policy=fail a chunk that could not be loaded ends its request with an empty answer:"
            ' set "kv_load_failure_policy": "recompute" in --kv-transfer-config'
        )
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedError("pipeline parallel engines are not supported: use tensor parallelism")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedError("context parallel engines are not supported: blocks are spread over ranks by token")
    draft = config.speculative_config
    if draft is not None and draft.method not in _DRAFTS_WITHOUT_KV:
        raise UnsupportedError(
            f"speculative decoding by {draft.method!r} keeps KV of a draft model, which lmpipe does not key:"
            f" use {' or '.join(_DRAFTS_WITHOUT_KV)}, or none"
        )
    device = config.device_config.device_type
    if device == "cpu" and config.model_config.use_mla and not config.scheduler_config.enable_chunked_prefill:
        raise UnsupportedError(
            "vLLM's MLA prefill on CPUs ignores what is cached, which is why vLLM turns its own prefix cache off there:"
            " loaded KV would give other tokens. Run this model without the connector"
        )
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(f"KV on {device!r} is not supported: this connector runs on CPUs and on GPUs")
