"""What all tests share: a run per instruction-set level for those that ask for it, and the leak check.

A test that leaves a process, a thread, a shared-memory file or a socket behind fails.

It runs first and ends last of a test's own fixtures; what fixtures of a wider scope made is there before it looks.
Other test runs may share the machine: processes are ours by an environment variable that they all inherit, files in
/dev/shm by who has them open.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmpipe import native
from lmpipe.native import _native

LEVELS = str(native.features()["levels"]).split()

GRACE_S = 3.0
"""How long what is on its way out may take."""

_SHM = Path("/dev/shm")
_RUN = uuid.uuid4().hex
os.environ["LMPIPE_TEST_RUN"] = _RUN

# Python's own helpers live as long as the process that started them.
_HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per instruction-set level that this CPU has."""
    _native._set_level(request.param)
    yield request.param
    _native._set_level(LEVELS[-1])


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test if it leaves a child process, a non-daemon thread, an entry in /dev/shm or a socket file."""
    children, threads, files = _children(), set(threading.enumerate()), _files()
    yield
    tmp_path = request.node.funcargs.get("tmp_path")
    deadline = time.monotonic() + GRACE_S
    while leaks := _leaks(children, threads, files, tmp_path):
        if time.monotonic() > deadline:
            pytest.fail("left behind: " + "; ".join(leaks), pytrace=False)
        time.sleep(0.02)


def _leaks(children: set[int], threads: set[threading.Thread], files: set[Path], tmp_path: Path | None) -> list[str]:
    found = [f"child process {pid} ({_command(pid)})" for pid in _children() - children]
    found += [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads if not thread.daemon]
    if tmp_path is not None:
        found += [f"socket {path}" for path in tmp_path.rglob("*") if _is_socket(path)]
    new = _files() - files
    if new:  # only now the dear part: who has them open?
        found += [f"{path} (open in {', '.join(users) or 'no process'})" for path, users in _ours(new)]
    return found


def _children() -> set[int]:
    """Living and unreaped children of this process, of all its threads."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            pids.update(int(pid) for pid in (task / "children").read_text().split())
    return {pid for pid in pids if not any(helper in _read(pid, "cmdline") for helper in _HELPERS)}


def _files() -> set[Path]:
    """Entries of /dev/shm, this user's nodes, and sockets in the temporary directory."""
    nodes = _SHM / f"lmpipe-{os.getuid()}"
    found: set[Path] = set()
    for directory in (_SHM, nodes):
        with contextlib.suppress(OSError):
            found.update(directory.iterdir())
    found.discard(nodes)  # the parent of all nodes stays
    with os.scandir(tempfile.gettempdir()) as entries:
        found.update(Path(entry.path) for entry in entries if not entry.is_dir() and _is_socket(Path(entry.path)))
    return found


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def _ours(paths: set[Path]) -> list[tuple[Path, list[str]]]:
    """Of new entries those that are this run's, each with who has it open.

    One that a stranger has open is the stranger's. One that nobody has open is ours, unless another test run or node is
    about that may have made it.
    """
    users: dict[Path, list[str]] = {path: [] for path in paths}
    theirs: set[Path] = set()
    others = False
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        pid = int(directory.name)
        stranger = pid != os.getpid() and f"LMPIPE_TEST_RUN={_RUN}".encode() not in _read(pid, "environ")
        others = others or (stranger and _is_lmpipe(pid))
        used = [path for path in paths if any(_below(name, path) for name in _open_files(pid))]
        if stranger:
            theirs.update(used)
        for path in used:
            users[path].append(f"{pid} {_command(pid)}")
    return [
        (path, who)
        for path, who in users.items()
        if path not in theirs and (who or not others) and os.path.lexists(path)
    ]


def _is_lmpipe(pid: int) -> bool:
    """Whether this is Python that runs tests or a node; not, say, the shell that started us."""
    program, _, arguments = _read(pid, "cmdline").partition(b"\0")
    return b"python" in program and (b"pytest" in arguments or b"lmpipe" in arguments)


def _below(name: str, path: Path) -> bool:
    return name == str(path) or name.startswith(f"{path}/")


def _open_files(pid: int) -> set[str]:
    names: set[str] = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                names.add(str(descriptor.readlink()))
    for line in _read(pid, "maps").split(b"\n"):
        if b" /dev/shm/" in line:
            names.add(line[line.index(b"/dev/shm/") :].decode())
    return names


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()[:120] or "zombie"
