"""`lmpipe down`: stop a node in order, or tidy up after one whose supervisor was killed."""

from __future__ import annotations

import argparse
import os
import select
import signal

from lmpipe.cli.nodes import NodeAbsent, Subparsers, add_node_arguments, add_verb, run_dir_of, supervisor_pid
from lmpipe.errors import NodeError
from lmpipe.launch.claim import Claim
from lmpipe.rundir import RunDir

EXAMPLES = """
lmpipe down                        the only node there is
lmpipe down local --keep-dram      the next `up` finds the DRAM tier as it is now
lmpipe down --run-dir /dev/shm/x   a node in another place
"""


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "down", "drain a node and stop it", EXAMPLES)
    add_node_arguments(parser)
    parser.add_argument("--keep-dram", action="store_true", help="leave the DRAM tier for the next `up`")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="give up waiting after (default: 60 s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when nothing of the node runs any more."""
    paths = run_dir_of(args)
    pid = supervisor_pid(paths)
    if pid < 0:
        raise NodeError(f"the supervisor of {paths.path} runs in another container; stop it there")
    if not pid:
        return _tidy(paths, keep_dram=args.keep_dram)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    try:
        if supervisor_pid(paths) != pid:
            return 0  # it ended in this moment; the number may be a stranger's
        if args.keep_dram:
            paths.keep_dram.touch(mode=0o600)
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(args.timeout * 1000):
            raise NodeError(
                f"the supervisor, pid {pid}, has not stopped in {args.timeout:g} s; it may still be draining"
            )
    finally:
        os.close(pidfd)
    print(f"stopped: {paths.path}")
    return 0


def _tidy(paths: RunDir, *, keep_dram: bool) -> int:
    """No supervisor lives: ends what it left and removes what it did not."""
    if not paths.path.is_dir() or not (paths.node_json.exists() or paths.arena.exists()):
        raise NodeAbsent(f"no node at {paths.path}")
    claim = Claim(paths, paths.path.name)
    try:
        claim.end_former_life(print)
        claim.clear(keep_dram=keep_dram)
    finally:
        claim.release()
    print(f"tidied up: {paths.path}")
    return 0
