"""The directory of a tier's files: one node's at a time. Knows no file in it but the lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from lmpipe.errors import NodeError

TAKES_NOTHING = (errno.EROFS, errno.EACCES, errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""What a disk says that cannot be written."""


def lock_directory(directory: Path) -> int:
    """A descriptor that holds the directory for this node. A disk that takes nothing can be read all the same.

    Raises:
        NodeError: another node uses it, or it is another user's.
        OSError: it cannot be made or opened.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if directory.stat().st_uid != os.geteuid():
        raise NodeError(f"{directory} belongs to another user: give tiers.ssd a directory of its own")
    path, flags = directory / "lmpipe.lock", os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        directory.chmod(0o700)
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno not in TAKES_NOTHING or not path.exists():
            raise
        descriptor = os.open(path, flags | os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise NodeError(f"{directory} is in use by another node (process {owner}): one node, one directory") from error
    with contextlib.suppress(OSError):  # who has it is for people to read
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor
