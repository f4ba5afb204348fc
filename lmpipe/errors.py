"""The errors lmpipe raises, each naming whose fault it is. Knows nothing of the rest of the package.

Expected trouble (a full ring, a store that is down) is no exception: it becomes a miss or a dropped save, counted with
its reason.
"""

import errno

OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Of an OSError: what this process lacks; it says nothing of what was to be opened."""


class LmpipeError(Exception):
    """Base of every error that lmpipe raises on purpose."""


class TopologyError(LmpipeError):
    """The topology file is wrong: the text names file, line, path and the nearest valid name."""


class LayoutError(LmpipeError):
    """A KV layout that cannot exist, or that does not fit the tensors it was given with."""


class MessageError(LmpipeError):
    """A frame that is not a valid message. `field` names the part at fault."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class SegmentError(LmpipeError):
    """A shared-memory segment that is absent, of another version or owner, damaged, or that found no room."""


class FormatError(LmpipeError):
    """A stored file or object whose bytes are not what its header promises."""


class ForeignVersion(FormatError):
    """A stored file or object that another version of lmpipe has written: not damaged, and not this one's to remove."""


class CannotEncode(LmpipeError):
    """A chunk that a codec cannot write within its stated error: it is kept raw."""


class NodeError(LmpipeError):
    """The node (all lmpipe processes of one topology) is absent, already running, or of another version."""


class UnsupportedError(LmpipeError):
    """The engine asks for something lmpipe cannot do rightly; nothing was cached."""


class DeviceError(LmpipeError):
    """A GPU or its driver refuses what was asked of it: the text names the cause and what to change. Others go on."""


class ProtocolViolation(LmpipeError):
    """A broken invariant. The process that sees one dies loudly and is restarted."""


class DeviceLost(ProtocolViolation):
    """An error after which the driver answers every call of this process with the same: only a new process helps."""
