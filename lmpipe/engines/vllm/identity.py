"""Which model this is: what the key namespace takes from vLLM's configuration and from the weight files.

The name under which a model is served is no part of it: the same files in another directory, or on another machine, are
the same model, and other files under the same name are not. Files are sampled, not read whole: size, both ends, and
`SAMPLES` blocks in between, so that another checkpoint or one fine-tuning step gives another namespace. Weights that
change while vLLM runs are not seen; `reset_cache`, which vLLM calls then, starts a namespace of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import vllm
from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest

from lmpipe import native
from lmpipe.engines.vllm.geometry import GroupPages
from lmpipe.engines.vllm.settings import Settings
from lmpipe.errors import UnsupportedError
from lmpipe.keys import Namespace

log = logging.getLogger("lmpipe.vllm")

SAMPLES = 64
SAMPLE_BYTES = 4096
END_BYTES = 65_536
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

_NOT_IDENTITY = {"_name_or_path", "transformers_version", "architectures", "use_cache"}
_MOVING_ROPE = ("dynamic", "longrope", "yarn")
"""Rotary schemes whose frequencies vLLM may derive from the longest prompt it takes."""


def _digest(data: bytes) -> str:
    return native.blake3_many(data, len(data)).tobytes().hex()


def _plain(value: Any) -> bytes:
    return orjson.dumps(value, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)


def digest_of_files(paths: Iterable[Path]) -> str:
    """One digest of files by name, size and samples."""
    parts: list[bytes] = []
    for path in sorted(paths):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            reads = [(0, END_BYTES), (max(size - END_BYTES, 0), END_BYTES)]
            reads += [(size * at // SAMPLES, SAMPLE_BYTES) for at in range(1, SAMPLES)]
            samples = b"".join(os.pread(file.fileno(), nbytes, offset) for offset, nbytes in reads)
        parts.append(f"{path.name} {size} {_digest(samples)}\n".encode())
    return _digest(b"".join(parts))


def _files(model: str, revision: str | None, cache: str | None) -> list[Path]:
    directory = Path(model)
    if directory.is_file():
        return [directory]
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
        except (OSError, ValueError) as error:
            log.debug("no local snapshot of %s: %s", model, error)
            return []
    return [path for path in directory.iterdir() if path.suffix in WEIGHTS]


def _weights(config: VllmConfig) -> str:
    model, load = config.model_config, config.load_config
    if load.load_format == "dummy":
        return f"dummy {vllm.__version__} {model.seed}"
    files = _files(model.model, model.revision, load.download_dir)
    if files:
        return digest_of_files(files)
    if model.revision is None:
        raise UnsupportedError(
            f"the weight files of {model.model} are not on this machine, and no revision is named: nothing says which"
            " weights these are. Set --revision, or serve a local directory"
        )
    return f"{model.model}@{model.revision}"


def namespace_of(config: VllmConfig, groups: tuple[GroupPages, ...], shards: int, settings: Settings) -> Namespace:
    """The root of keys of this engine, the same in every rank and every process that serves this model.

    Raises:
        UnsupportedError: nothing says which weights these are.
    """
    model, cache = config.model_config, config.cache_config
    fields: dict[str, Any] = {k: v for k, v in model.hf_config.to_dict().items() if k not in _NOT_IDENTITY}
    text: dict[str, Any] = model.hf_text_config.to_dict()
    rope: Any = text.get("rope_parameters") or text.get("rope_scaling") or {}
    shown = _plain(rope).decode()
    if any(name in shown for name in _MOVING_ROPE):
        rope = {"rope": rope, "max_model_len": model.max_model_len}
    code = {
        "architecture": model.architecture,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache_dtype": str(cache.cache_dtype),
        "weights": _weights(config),
    }
    # With the number of shards: rows of another number would stand in each other's way.
    layouts = orjson.dumps([shards, *(group.layout.layout_id() for group in groups)])
    return Namespace(
        model=f"vllm:{model.architecture}#{_digest(_plain([fields, code]))}",
        revision="",
        layout=int(_digest(layouts)[:16], 16),
        kv_dtype=groups[0].layout.dtype,
        chunk_tokens=0,
        tenant=settings.tenant,
        rope=_plain(rope).decode(),
    )


def adapter_of(lora: LoRARequest | None, known: dict[tuple[str, str], str]) -> str:
    """What keys take from a request's LoRA adapter. `known` remembers adapters by name and path.

    Raises:
        UnsupportedError: its files cannot be read, so nothing says which adapter it is.
    """
    if lora is None:
        return ""
    name = (lora.lora_name, lora.lora_path)
    if name not in known or lora.load_inplace:
        try:
            files = [path for path in Path(lora.lora_path).iterdir() if path.is_file()]
            known[name] = f"lora#{digest_of_files(files)}"
        except OSError as error:
            raise UnsupportedError(f"the files of adapter {lora.lora_name!r} cannot be read: {error}") from error
    return known[name]
