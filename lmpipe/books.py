"""What chunk records name by number: layouts, and the tenants of namespaces. Files of the run directory:

    layouts/<layout id>.json       the fields of the KVLayout whose hash the id is
    namespaces/<namespace id>      the name of the tenant; of those only that the topology has an entry for

Ids are 16 hexadecimal digits. A file is written once and whole, before the first chunk that needs it, and stays as long
as the arena does: so a stage knows them after a restart too, before any engine has come back. Knows no codec.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from lmpipe.errors import MessageError
from lmpipe.layout import KVLayout
from lmpipe.messages import kv_layout
from lmpipe.rundir import RunDir, write_atomically

log = logging.getLogger("lmpipe.books")

REMEMBERED = 4096
"""Ids that one process keeps in memory; beyond that it starts over."""


class LayoutBook:
    """KVLayouts by their ids."""

    def __init__(self, paths: RunDir) -> None:
        self._paths = paths
        self._known: dict[int, KVLayout] = {}

    def enter(self, layout: KVLayout) -> None:
        """Write a layout down, if it is not there. Without room for it only codecs that need none can encode."""
        path = self._paths.layout(layout.layout_id())
        if not path.exists():
            _write(path, orjson.dumps(asdict(layout)))

    def find(self, layout_id: int) -> KVLayout | None:
        """The layout of an id; None: nobody has entered it, or the file is not what its name says."""
        known = self._known.get(layout_id)
        if known is not None:
            return known
        try:
            fields: dict[str, Any] = orjson.loads(self._paths.layout(layout_id).read_bytes())
            found = kv_layout(fields)
        except (OSError, orjson.JSONDecodeError, MessageError, AttributeError):
            return None
        if found.layout_id() != layout_id:
            return None
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[layout_id] = found
        return found


class NamespaceBook:
    """Tenants by the ids of their namespaces."""

    def __init__(self, paths: RunDir) -> None:
        self._paths = paths
        self._known: dict[int, str] = {}

    def enter(self, namespace_id: int, tenant: str) -> None:
        """Write down whose a namespace is, if it is not there."""
        path = self._paths.namespace(namespace_id)
        if not path.exists():
            _write(path, tenant.encode())

    def tenant_of(self, namespace_id: int) -> str:
        """The tenant; empty: one that the topology says nothing of."""
        known = self._known.get(namespace_id)
        if known is not None:
            return known
        try:
            found = self._paths.namespace(namespace_id).read_bytes().decode(errors="replace")
        except OSError:
            return ""
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[namespace_id] = found
        return found


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
