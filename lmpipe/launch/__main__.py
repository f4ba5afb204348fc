"""`python -m lmpipe.launch RUN_DIR PROCESS`: a worker, started by the supervisor."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lmpipe.errors import LmpipeError
from lmpipe.launch.worker import log_to_stderr, run_worker


def main() -> int:
    """Exit status 0 after an orderly end, 1 when the start failed, 70 after a bug."""
    parser = argparse.ArgumentParser(prog="python -m lmpipe.launch", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the node's run directory")
    parser.add_argument("process", help="name of the process in the topology")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="pipe on which to say READY")
    args = parser.parse_args()
    log_to_stderr(args.process)
    try:
        return run_worker(args.run_dir, args.process, args.ready_fd)
    except LmpipeError as error:
        print(f"lmpipe: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
