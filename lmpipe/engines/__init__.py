"""The engines lmpipe can attach to: a registry by name, and `attach`. Imports no engine until one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, cast

from lmpipe.engines.adapter import Adapter, Attachment, AttachOptions, RequestInfo
from lmpipe.errors import UnsupportedError
from lmpipe.rundir import default_parent

__all__ = ["Adapter", "AttachOptions", "Attachment", "RequestInfo", "adapters", "attach", "register"]

GROUP = "lmpipe.engines"
"""Entry-point group: each entry names a callable without arguments that returns an `Adapter`."""

DEFAULT_TOPOLOGY = "local"

_registered: dict[str, Callable[[], Adapter]] = {}


def register(name: str, factory: Callable[[], Adapter]) -> None:
    """Make an adapter known under `name`: before installed ones, and instead of an earlier one of that name."""
    _registered[name] = factory


def adapters() -> dict[str, Callable[[], Adapter]]:
    """Every known adapter by name. Loading one imports its engine: `ImportError` where that is not installed."""
    known = dict(_registered)
    for point in entry_points(group=GROUP):
        known.setdefault(point.name, lambda point=point: cast(Adapter, point.load()()))
    return known


def attach(
    model: object,
    node: str | Path | None = None,
    *,
    name: str | None = None,
    revision: str = "",
    tenant: str = "default",
    adapter: str = "",
    cache_salt: str = "",
    on_unsupported: Literal["bypass", "raise"] = "bypass",
    save_answers: bool = True,
    load_deadline_ms: int | None = None,
    min_tokens: int = 0,
    copy_threads: int = 1,
    exact: bool = False,
) -> Attachment:
    """Switch lmpipe on for an engine: `lmpipe.attach(model)`.

    `node` is a run directory, the name of a topology, or None for the topology `local`. The node need not be up:
    until it is, every request is a miss. The options are those of `AttachOptions`.

    Raises:
        UnsupportedError: no adapter knows this object, or (with `on_unsupported="raise"`) it cannot be cached rightly.
    """
    options = AttachOptions(
        name=name,
        revision=revision,
        tenant=tenant,
        adapter=adapter,
        cache_salt=cache_salt,
        on_unsupported=on_unsupported,
        save_answers=save_answers,
        load_deadline_ms=load_deadline_ms,
        min_tokens=min_tokens,
        copy_threads=copy_threads,
        exact=exact,
    )
    absent: list[str] = []
    for known, factory in adapters().items():
        try:
            candidate = factory()
        except ImportError as error:
            absent.append(f"{known} ({error})")
            continue
        if candidate.claims(model):
            return candidate.attach(model, run_dir_of(node), options)
    asked = f"; not importable: {', '.join(absent)}" if absent else ""
    raise UnsupportedError(f"no engine adapter knows {type(model).__module__}.{type(model).__qualname__}{asked}")


def run_dir_of(node: str | Path | None) -> Path:
    """The run directory that `node` names: a path, a topology's name in the default place, or None."""
    if node is None:
        return default_parent() / DEFAULT_TOPOLOGY
    if isinstance(node, str) and "/" not in node:
        return default_parent() / node
    return Path(node)
