"""Run in a mount namespace with a tmpfs of 2 MiB at argv[1]: pages for which there is no room leave nothing."""

import sys
from pathlib import Path

from lmpipe.errors import SegmentError
from lmpipe.shm import segment as module
from lmpipe.shm.pages import PageSegment

root = Path(sys.argv[1])
directory = root / "node.pages"
module.STEP_BYTES = 256 << 10
with PageSegment.create(root / "other.pages", 3 << 19):
    for hopeless in (module._refuse_if_hopeless, lambda *_: None):  # refused at once; found out on the way
        module._refuse_if_hopeless = hopeless
        try:
            PageSegment.create(directory, 1 << 20)
        except SegmentError as error:
            assert "1048576 bytes are wanted" in str(error) and "bytes are free" in str(error), error
        else:
            raise AssertionError("there was room")
        assert [path.name for path in root.iterdir()] == ["other.pages"]
PageSegment.create(directory, 1 << 20).close()
assert not list(root.iterdir())
print("ok")
