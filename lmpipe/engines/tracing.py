"""The trace of an engine's process, where the node that it is attached to writes traces."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lmpipe.errors import NodeError
from lmpipe.spans import FlushedSpans
from lmpipe.topology import NodeInfo

log = logging.getLogger("lmpipe")


def engine_spans(run_dir: Path) -> FlushedSpans:
    """Spans of this process: in a trace beside those of the node's workers if its topology has `profile: {trace: true}`
    and it is up by now, else nvtx ranges alone.
    """
    try:
        node = NodeInfo.read(run_dir)
        if node.topology.profile.trace:
            return FlushedSpans(f"engine {os.getpid()}", node.paths.engine_trace(os.getpid()))
    except NodeError:
        pass  # it is not up
    except OSError as error:
        log.warning("this process is not in the node's traces: %s", error)
    return FlushedSpans("engine")
