"""Segments in which engines put their KV cache, for gather to copy from. They need no node: an engine may start before
it, outlive it, and be killed without it.

Each is a file of a directory beside the node's run directory, and lasts as long as the life (life.py) of the process
that made it. What the killed leave is removed by whoever makes the next one, and by the node.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lmpipe.errors import SegmentError
from lmpipe.shm.descriptor import SegmentKind
from lmpipe.shm.life import Life, Lives
from lmpipe.shm.segment import Progress, Segment

_PAGES = ".pages"
_ATTEMPTS = 16


class PageSegment:
    """A PAGES segment of this process. Lasts until `close`, or as long as the process."""

    def __init__(self, life: Life, segment: Segment) -> None:
        """Use `create`."""
        self._life: Life | None = life
        self.segment = segment
        self.path = segment.path
        self.id = segment.id
        """16 bytes: which segment it is, as `messages.PageSource` names it in hexadecimal digits."""

    @classmethod
    def create(cls, directory: Path, nbytes: int, *, progress: Progress | None = None) -> PageSegment:
        """Make a segment of `nbytes`, header included, in `directory` (`RunDir.pages`), which is made where missing.

        Raises:
            SegmentError: the directory is not private or cannot be made, or there is no room; nothing is left behind.
        """
        sweep(directory)  # what the dead have is room
        life = _begin(directory)
        try:
            segment = Segment.create(life.file(_PAGES), SegmentKind.PAGES, nbytes, progress=progress)
        except BaseException:
            life.end()
            _remove_if_empty(directory)
            raise
        return cls(life, segment)

    def close(self) -> None:
        """Unmap, and remove the file: gather's map of it stays until it hears. In a forked child: unmap only."""
        life, self._life = self._life, None
        if life is None:
            return
        self.segment.close()
        if life.owned:
            self.segment.unlink()
            life.end()
            _remove_if_empty(self.path.parent)
        else:
            life.end()

    def __enter__(self) -> PageSegment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sweep(directory: Path) -> list[Path]:
    """Remove segments whose makers have died, and the directory if it is empty then. Returns what was removed.

    Those of the living stay; what cannot be looked at is left as it is.
    """
    lives = Lives(directory, _PAGES)
    removed: list[Path] = []
    with contextlib.suppress(OSError):
        removed = [lives.file(number) for number in lives.sweep()]
        directory.rmdir()
    return removed


def left_by_the_dead(directory: Path) -> list[Path]:
    """Segments whose makers have died; nothing is removed."""
    lives = Lives(directory, _PAGES)
    return [lives.file(number) for number in lives.with_file() if not lives.alive(number)]


def _begin(directory: Path) -> Life:
    for _ in range(_ATTEMPTS):
        try:
            _make_private(directory)
            return Life.begin(directory)
        except FileNotFoundError:
            continue  # somebody has tidied up between the two
        except OSError as error:
            raise SegmentError(f"{directory}: {os.strerror(error.errno or 0)}") from error
    raise SegmentError(f"{directory}: removed each time it was made, {_ATTEMPTS} times")


def _make_private(directory: Path) -> None:
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
