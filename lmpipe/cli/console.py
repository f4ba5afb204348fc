"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

WIDTH = 132
"""Of a pipe or a file, where nobody has said how wide it is: every table fits."""


def wide_console(*, stderr: bool = False) -> Console:
    """As wide as the terminal, or as any table where there is none."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=WIDTH)
