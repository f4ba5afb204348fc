"""The demo's node: real processes, killed and started again on purpose. Knows no engine."""

from __future__ import annotations

import shutil
from pathlib import Path

from lmpipe.testing import Node

TOPOLOGY = Path(__file__).with_name("topology.yaml")


class DemoNode(Node):
    """A node whose tiers lie below `work`. A context manager: nothing of it runs afterwards."""

    def __init__(self, work: Path) -> None:
        self._ssd, remote = work / "ssd", work / "remote"
        tiers = {"ssd": {"directory": str(self._ssd)}, "remote": {"url": f"file://{remote}"}}
        super().__init__({"tiers": tiers}, base=TOPOLOGY)

    def kill_all(self) -> int:
        """SIGKILL to the supervisor and every worker; returns how many that were."""
        processes = 1 + sum(process.pid > 0 for process in self.status().processes)
        self.kill("all")
        return processes

    def remove_arena(self) -> None:
        """The DRAM tier of a killed node is gone."""
        self.paths.arena.unlink()

    def remove_ssd(self) -> None:
        """The SSD tier of a killed node is gone."""
        shutil.rmtree(self._ssd)
