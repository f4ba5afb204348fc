"""`lmpipe.launch.devices` of a machine that has all it needs."""

from __future__ import annotations

from pathlib import Path

Lack = tuple[str, str]
DRIVERS: tuple[Path, ...] = ()
INSTALL = ""


def lacking(_: object) -> None:
    """Nothing."""
