"""For the processes of a node under test: the fake device takes the place of CuPy's, and of the look for a driver."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

HERE = Path(__file__).parent
STANDS_FOR = {"lmpipe.cuda.cupy_runtime": "fake_cupy_runtime.py", "lmpipe.launch.devices": "fake_devices.py"}


class Finder(importlib.abc.MetaPathFinder):
    """Knows the two."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        name = STANDS_FOR.get(fullname)
        return importlib.util.spec_from_file_location(fullname, HERE / name) if name else None


sys.meta_path.insert(0, Finder())
