"""Run in a mount namespace with a tmpfs of 2 MiB at argv[1]: room that is not there is an error, never a signal."""

import sys
from pathlib import Path

from lmpipe.errors import SegmentError
from lmpipe.shm import segment as module
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.segment import Segment

directory = Path(sys.argv[1])
first = Segment.create(directory / "first", SegmentKind.PAGES, 3 << 19)
module.STEP_BYTES = 256 << 10
for hopeless in (module._refuse_if_hopeless, lambda *_: None):  # refused at once; found out on the way
    module._refuse_if_hopeless = hopeless
    try:
        Segment.create(directory / "second", SegmentKind.PAGES, 1 << 20)
    except SegmentError as error:
        assert "1048576 bytes are wanted" in str(error) and "bytes are free" in str(error), error
        assert "--shm-size" in str(error)
    else:
        raise AssertionError("there was room")
    assert [path.name for path in directory.iterdir()] == ["first"]
first.buf[4096:] = b"\xff" * (first.nbytes - 4096)
first.close()
print("ok")
