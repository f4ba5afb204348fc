"""Sessions: one life of a producer or worker, and its HOLDS segment. Knows nothing of what a session does.

Whether a session still lives is told by the lock of its file (life.py). A forked child is not the session, and every
use in the child raises.
"""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from lmpipe.errors import ProtocolViolation, SegmentError
from lmpipe.handles import SessionId
from lmpipe.rundir import RunDir
from lmpipe.shm.descriptor import WORD_BYTES, SegmentKind, grants_offset
from lmpipe.shm.life import Life, Lives
from lmpipe.shm.segment import Segment

ENTRIES = 16_384
"""Hold entries of a session unless it says otherwise: a 128K-token prompt of 256-token chunks takes 512."""

GRANTS = 1024
"""Grant words of a session unless it says otherwise: one for each save of mapped pages under way."""

_HOLDS = ".holds"


class Session:
    """A session of this process. Lives until `close`, or as long as the process."""

    def __init__(self, life: Life, segment: Segment) -> None:
        """Use `create`."""
        self._life: Life | None = life
        self._id, self._pid = SessionId(life.number), life.pid
        self._segment = segment

    @classmethod
    def create(cls, run_dir: str | PathLike[str], *, entries: int = ENTRIES, grants: int = GRANTS) -> Session:
        """Begin a session in the node of `run_dir`, whose `sessions` directory is there already.

        Raises:
            SegmentError: there is no node, or no room for the hold segment.
        """
        directory = RunDir(Path(run_dir)).sessions
        try:
            life = Life.begin(directory)
        except OSError as error:
            raise SegmentError(f"{directory}: {os.strerror(error.errno or 0)}; is the node up?") from error
        try:
            # After the lock: a hold file without a locked session file is a dead session's.
            nbytes = grants_offset(entries) + grants * WORD_BYTES
            segment = Segment.create(life.file(_HOLDS), SegmentKind.HOLDS, nbytes, count=entries, grants=grants)
        except BaseException:
            life.end()
            raise
        return cls(life, segment)

    @property
    def id(self) -> SessionId:
        """The session's number.

        Raises:
            ProtocolViolation: this process was forked from the one whose session it is.
        """
        self.check()
        return self._id

    @property
    def segment(self) -> Segment:
        """The session's HOLDS segment; raises as `id` does."""
        self.check()
        return self._segment

    def check(self) -> None:
        """Raise `ProtocolViolation` in a forked child, whose use of the session nothing would guard."""
        if os.getpid() != self._pid:
            raise ProtocolViolation(
                f"session {self._id:016x} belongs to process {self._pid}; make one after fork, not before"
            )

    def close(self) -> None:
        """End the session and remove its files. In a forked child: let go of its copies, the session goes on."""
        life, self._life = self._life, None
        if life is None:
            return
        self._segment.close()
        if life.owned:
            self._segment.unlink()
        life.end()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SessionDir:
    """All sessions of a node, seen from any process."""

    def __init__(self, run_dir: str | PathLike[str]) -> None:
        self.path = RunDir(Path(run_dir)).sessions
        self._lives = Lives(self.path, _HOLDS)

    def identity(self) -> str:
        """The same for all who see this very directory, whatever namespace they are in. Raises OSError."""
        status = self.path.stat()
        return f"{status.st_dev:x}:{status.st_ino:x}"

    def ids(self) -> list[SessionId]:
        """Every session that has a file, alive or not, in no order."""
        return [SessionId(number) for number in self._lives.ids()]

    def holds_path(self, session: SessionId) -> Path:
        """The session's HOLDS segment."""
        return self._lives.file(session)

    def with_holds(self) -> set[SessionId]:
        """Every session that has a HOLDS segment, alive or not."""
        return {SessionId(number) for number in self._lives.with_file()}

    def alive(self, session: SessionId) -> bool:
        """Whether the session's process lives and has not ended it."""
        return self._lives.alive(session)

    def sweep(self) -> list[SessionId]:
        """Remove what dead sessions left behind and return their ids."""
        return [SessionId(number) for number in self._lives.sweep()]
