"""An engine's pages beside a node: there before it, while it is, after it; gone when the engine was killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from rig import DRAM_ONLY, counters, until

from lmpipe.cli import main
from lmpipe.shm.pages import sweep
from lmpipe.testing import Node


class Owner:
    """pages_owner.py; killed at the end."""

    def __init__(self, node: Node) -> None:
        argv = [sys.executable, "-W", "error", str(Path(__file__).with_name("pages_owner.py")), str(node.run_dir)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.path = Path(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "it has ended"
        return line

    def works(self) -> bool:
        """Save two chunks out of the pages, load them into them."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._line() == "2"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """In order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(30)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()


def test_pages_outlive_the_node_and_not_their_engine(capsys: pytest.CaptureFixture[str]) -> None:
    node = Node(DRAM_ONLY)
    try:
        with Owner(node) as killed, Owner(node) as engine:  # before the node is
            killed.kill()
            node.start()
            assert not killed.path.exists() and engine.path.exists(), "swept at the start"
            assert engine.works()
            with Owner(node) as other:
                assert other.works()
                other.kill()
                until(lambda: not other.path.exists(), "gather sweeps when it buries the engine")
            until(lambda: counters(node)["gather_producers"] == 1)
            node.stop()
            assert not node.run_dir.exists() and engine.path.exists(), "the node is gone, the engine's pages are not"
            assert main(["down", "--run-dir", str(node.run_dir)]) != 0 and engine.path.exists()
            node.start()
            assert engine.works(), "found again by itself"
            node.kill("all")
            with Owner(node) as late:
                late.kill()
            assert main(["down", "--run-dir", str(node.run_dir)]) == 0, capsys.readouterr().err
            assert engine.path.exists() and not late.path.exists()
            assert engine.end() == 0 and not node.paths.pages.exists()
            with Owner(node) as late:
                late.kill()
            assert main(["down", "--run-dir", str(node.run_dir)]) == 0, "without a node too"
            assert not node.paths.pages.exists()
    finally:
        node.close()


def test_a_living_engine_s_pages_are_not_swept_by_gather_and_closing_a_node_removes_the_directory() -> None:
    with Node(DRAM_ONLY) as node:
        node.paths.pages.mkdir(mode=0o700)
        until(lambda: not node.paths.pages.exists(), "gather looks once a second")
        with Owner(node) as engine:
            end_s = time.monotonic() + 2.5
            while time.monotonic() < end_s:
                assert engine.path.exists() and sweep(node.paths.pages) == []
                time.sleep(0.05)
            assert engine.works()
            engine.kill()
    assert not node.paths.pages.exists() and not node.run_dir.exists()
