"""Makes page segments in the directory at argv[1], says the first one's path, and does as told, one word a line."""

import os
import sys
from pathlib import Path

from lmpipe.shm.pages import PageSegment, sweep

directory = Path(sys.argv[1])
segment = PageSegment.create(directory, 1 << 16)
print(segment.path, flush=True)
for line in sys.stdin:
    answer = "done"
    match line.strip():
        case "another":  # which sweeps first, and must not open the first one's lock file
            answer = str(PageSegment.create(directory, 1 << 16).path)
        case "close":
            segment.close()
        case "fork":
            if (child := os.fork()) == 0:
                removed = sweep(directory)
                segment.close()
                with PageSegment.create(directory, 4096) as own:
                    own.segment.buf[-1] = 1
                os._exit(len(removed))
            answer = str(os.waitpid(child, 0)[1])
    print(answer, flush=True)
