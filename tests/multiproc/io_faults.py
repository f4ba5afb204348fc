"""Files that fail as they are told to, in every process that inherits the environment (io_faults.cpp)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("io_faults.cpp")
OPERATIONS = ("read", "write", "open", "sync", "make", "any")


class NoCompiler(Exception):
    """There is no C++ compiler here: a test skips."""


class IoFaults:
    """The library, built in a directory, and its file of rules."""

    def __init__(self, directory: Path) -> None:
        """Raises NoCompiler."""
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise NoCompiler("no C++ compiler is installed")
        self.library, self.rules = directory / "io_faults.so", directory / "io_faults.rules"
        options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, "-o", str(self.library), str(SOURCE)], check=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a process must have from its start."""
        return {"LD_PRELOAD": str(self.library), "LMPIPE_IO_FAULTS": str(self.rules)}

    def set(self, *rules: str) -> None:
        """These rules, and no others: `PREFIX OP FAULT[%PROBABILITY]`, where FAULT is an errno by its name, "short",
        "flip" or "rate=BYTES"; or `clock any step=SECONDS`. Raises ValueError for one that is none.
        """
        lines: list[str] = []
        for rule in rules:
            prefix, operation, fault = rule.split()
            name, percent, chance = fault.partition("%")
            if operation not in OPERATIONS or not (prefix.startswith("/") or prefix == "clock"):
                raise ValueError(f'"{rule}": PREFIX is absolute, OP one of {", ".join(OPERATIONS)}')
            if name not in ("short", "flip") and not name.startswith(("rate=", "step=")):
                name = str(getattr(errno, name))
            lines.append(f"{prefix} {operation} {name}{percent}{chance}\n")
        fresh = self.rules.with_suffix(".new")
        fresh.write_text("".join(lines))
        fresh.replace(self.rules)

    def clear(self) -> None:
        """All is well again."""
        self.set()
