"""`lmpipe.cuda.cupy_runtime` with fake devices, whose memory is in the directory that a variable names."""

from __future__ import annotations

import os
from pathlib import Path

from fake_runtime import FakeRuntime


class GatherRuntime(FakeRuntime):
    """Has a sticky error at the step that a file `fault-STEP` names, and removes it: the next process is well again."""

    def _check(self, doing: str, status: int = 0) -> None:
        if (file := self.directory / f"fault-{doing}").exists():
            file.unlink()
            self.fault()
        super()._check(doing, status)


def open_device(name: str) -> FakeRuntime:
    """The device of that number."""
    return GatherRuntime(Path(os.environ["LMPIPE_FAKE_DEVICES"]), int(name))
