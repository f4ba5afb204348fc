"""What dead nodes and engines have left in shared memory. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lmpipe.cli.check import bytes_in
from lmpipe.cli.doctor.finding import Finding, ok, warn
from lmpipe.cli.picture import size
from lmpipe.launch.claim import lock_holder
from lmpipe.rundir import PAGES_SUFFIX, RunDir
from lmpipe.shm.pages import left_by_the_dead
from lmpipe.shm.session import SessionDir


def run_dirs(parent: Path, also: Iterable[Path]) -> list[Path]:
    """Every place where a node is or was."""
    found = {path for path in also if path.is_dir()}
    if parent.is_dir():
        found |= {path for path in parent.iterdir() if path.is_dir() and path.suffix != PAGES_SUFFIX}
    return sorted(found)


def examine(places: Iterable[Path]) -> list[Finding]:
    """A finding for each dead node and each engine's memory without an engine."""
    found: list[Finding] = []
    for path in places:
        paths = RunDir(path)
        if not lock_holder(paths.supervisor_lock) and bytes_in(paths):
            found.append(_dead_node(paths))
        if dead := left_by_the_dead(paths.pages):
            nbytes = sum(segment.stat().st_blocks * 512 for segment in dead if segment.exists())
            todo = "the next engine or `lmpipe up` there removes it; or: rm -r"
            found.append(warn("leftovers", f"{paths.pages}: {size(nbytes)} of dead engines", f"{todo} {paths.pages}"))
    return found or [ok("leftovers", "none")]


def _dead_node(paths: RunDir) -> Finding:
    sessions = SessionDir(paths.path)
    living = sum(sessions.alive(session) for session in sessions.ids())
    what = f"{paths.path}: {size(bytes_in(paths))}"
    if living:
        todo = f"lmpipe up FILE takes them over, lmpipe down {paths.path} ends its workers"
        return warn("leftovers", f"{what}, {living} processes, and no supervisor", todo)
    if not paths.node_json.exists() and paths.arena.exists():
        todo = f"the next `lmpipe up` goes on with it; lmpipe down {paths.path} removes it"
        return warn("leftovers", f"{what}, a DRAM tier that was kept", todo)
    return warn("leftovers", f"{what}, left by a node that died", f"lmpipe down {paths.path}, or lmpipe up FILE")
