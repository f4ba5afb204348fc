"""What the doctor has to say: one line for each thing looked at."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How bad it is. `warn`: it works, and not as well as it could; `fail`: something does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    """`check`: what was looked at; `seen`: what was there; `todo`: what to do about it, empty when all is well."""

    check: str
    level: Level
    seen: str
    todo: str = ""


def ok(check: str, seen: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, seen)


def warn(check: str, seen: str, todo: str) -> Finding:
    """It works, but."""
    return Finding(check, Level.WARN, seen, todo)


def fail(check: str, seen: str, todo: str) -> Finding:
    """It does not work."""
    return Finding(check, Level.FAIL, seen, todo)
