"""Ending a node from outside: asking its supervisor, or tidying up after one that was killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable

from lmpipe.errors import NodeError
from lmpipe.launch.claim import Claim, lock_holder
from lmpipe.launch.former import Former
from lmpipe.rundir import RunDir


def stop_node(paths: RunDir, *, keep_dram: bool, timeout_s: float) -> bool:
    """Asks the supervisor to drain and stop, and waits until it has ended. False: none lives.

    Raises:
        NodeError: it runs where it cannot be signalled, or takes longer than `timeout_s`.
    """
    pid = lock_holder(paths.supervisor_lock)
    if pid < 0:
        raise NodeError(f"the supervisor of {paths.path} runs in another container; stop it there")
    if not pid:
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if lock_holder(paths.supervisor_lock) != pid:
            return True  # it ended in this moment; the number may be a stranger's
        if keep_dram:
            paths.keep_dram.touch(mode=0o600)
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise NodeError(f"the supervisor, pid {pid}, has not stopped in {timeout_s:g} s; it may still be draining")
    finally:
        os.close(pidfd)
    return True


def tidy_up(paths: RunDir, *, keep_dram: bool, report: Callable[[str], None]) -> None:
    """Drains and ends what a dead supervisor left and removes what it did not. Raises NodeError when one lives."""
    claim = Claim(paths, paths.path.name)
    try:
        with contextlib.closing(Former(paths)) as former:
            former.end(report)
        claim.clear(keep_dram=keep_dram)
    finally:
        claim.release()
