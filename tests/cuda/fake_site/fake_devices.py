"""`lmpipe.launch.devices` of a machine that has all it needs."""

from __future__ import annotations


def lacking(_: object) -> str:
    """Nothing is."""
    return ""
