"""`lmpipe.launch.devices` of a machine that has all it needs."""

from __future__ import annotations

Lack = tuple[str, str]


def lacking(_: object) -> None:
    """Nothing."""
