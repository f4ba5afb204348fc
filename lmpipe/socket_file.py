"""The file of an ipc endpoint: who may connect, and whose it is. Knows no message and no zmq.

libzmq left to itself unlinks whatever stands at the path, a living server's socket too, leaves the mode to the umask,
and at close removes a successor's file. So the listening socket is made here and handed over.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

PATH_BYTES = 107
"""`sun_path` without its closing zero byte."""

BACKLOG = 128


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A socket file that this process has bound."""

    path: Path
    inode: int

    @classmethod
    def listen(cls, path: Path) -> tuple[SocketFile, int]:
        """Listens at `path`, mode 0600 from the first instant, in place of a dead server's file.

        Returns the file and the descriptor of the listening socket, which is the caller's.

        Raises:
            OSError: the path is too long, a living server listens there, or a file that is no socket is in the way.
        """
        if len(os.fsencode(path)) > PATH_BYTES:
            raise OSError(f"a socket's path may have {PATH_BYTES} bytes; use a shorter run_dir")
        _remove_dead(path)
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            listener.setblocking(False)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(BACKLOG)  # only now can anybody connect
            file = cls(path, path.stat().st_ino)
            undo.pop_all()
        return file, listener.detach()

    def remove(self) -> None:
        """Removes the file, unless it is no longer ours."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self.inode:
                self.path.unlink()


def _remove_dead(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError("a file that is no socket is in the way")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody holds it
    raise FileExistsError("another process is listening there")
