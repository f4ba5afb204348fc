"""Making, checking and closing segments."""

from __future__ import annotations

import gc
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmpipe import native
from lmpipe.errors import SegmentError
from lmpipe.native import Region
from lmpipe.shm.descriptor import H_KIND, H_READY, H_VERSION, HEADER_BYTES, SegmentKind
from lmpipe.shm.segment import STEP_BYTES, Segment

HERE = Path(__file__).parent


@pytest.fixture
def path(run_dir: Path) -> Path:
    return run_dir / "a.shm"


def test_what_is_written_is_read_by_who_attaches(path: Path) -> None:
    with Segment.create(path, SegmentKind.HOLDS, 10_000, count=7, grants=3, json=b'["x"]') as made:
        assert (made.nbytes, made.count, made.grants, made.json) == (12_288, 7, 3, b'["x"]')
        made.buf[9000] = 42
        with Segment.attach(path, SegmentKind.HOLDS, id=made.id) as other:
            assert (other.nbytes, other.count, other.grants, other.json) == (12_288, 7, 3, b'["x"]')
            assert other.buf[9000] == 42 and other.region.nbytes == 12_288 and other.region.writable
        with Segment.attach(path, SegmentKind.HOLDS, readonly=True) as other:
            assert other.buf.readonly and not other.region.writable
    assert path.stat().st_mode & 0o777 == 0o600


def test_space_is_taken_not_promised(path: Path) -> None:
    with Segment.create(path, SegmentKind.PAGES, 1 << 20, prefault=False):
        assert path.stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("readonly", [False, True])
def test_a_segment_is_faulted_in_when_it_is_asked_to_be(path: Path, readonly: bool) -> None:
    def resident() -> int:
        text = Path("/proc/self/smaps").read_text()
        return sum(int(kib) for kib in re.findall(rf"{path}\n(?:.*\n)*?Rss: +(\d+) kB", text))

    Segment.create(path, SegmentKind.PAGES, 8 << 20, prefault=False).close()
    with Segment.attach(path, SegmentKind.PAGES, readonly=readonly) as segment:
        assert resident() < 4 << 10
        segment.prefault()
        assert resident() == 8 << 10


def test_faulting_in_ends_when_the_segment_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmpipe.shm.segment.STEP_BYTES", 4096)
    Segment.create(path, SegmentKind.PAGES, 3 * 4096, prefault=False).close()
    segment = Segment.attach(path, SegmentKind.PAGES)
    steps: list[int] = []

    def populate(region: Region, offset: int, nbytes: int, write: bool) -> None:
        steps.append(offset)
        segment.close()

    monkeypatch.setattr("lmpipe.shm.segment.populate", populate)
    segment.prefault()
    assert steps == [0]


def test_progress_comes_in_steps(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    total = STEP_BYTES + 4096
    Segment.create(path, SegmentKind.PAGES, total, progress=lambda done, of: seen.append((done, of))).close()
    assert seen == [(STEP_BYTES, total), (total, total)]


def test_ids_differ(run_dir: Path) -> None:
    with (
        Segment.create(run_dir / "a", SegmentKind.PAGES, 4096) as a,
        Segment.create(run_dir / "b", SegmentKind.PAGES, 4096) as b,
    ):
        assert len(a.id) == 16 and a.id != b.id
        with pytest.raises(SegmentError, match=r"is segment .* started anew"):
            Segment.attach(run_dir / "b", SegmentKind.PAGES, id=a.id)


def test_a_segment_is_made_once(path: Path) -> None:
    path.write_bytes(b"somebody's")
    with pytest.raises(SegmentError, match="exists already"):
        Segment.create(path, SegmentKind.PAGES, 4096)
    assert path.read_bytes() == b"somebody's"


def test_a_link_is_not_followed(path: Path, run_dir: Path) -> None:
    Segment.create(run_dir / "real", SegmentKind.PAGES, 4096).close()
    path.symlink_to(run_dir / "real")
    with pytest.raises(SegmentError, match="symbolic link"):
        Segment.attach(path, SegmentKind.PAGES)
    with pytest.raises(SegmentError, match="exists already"):
        Segment.create(path, SegmentKind.PAGES, 4096)
    (run_dir / "link").symlink_to(run_dir / "sessions")
    with pytest.raises(SegmentError, match="real directory"):
        Segment.create(run_dir / "link" / "a", SegmentKind.PAGES, 4096)


def test_the_directory_is_private(run_dir: Path) -> None:
    (run_dir / "sessions").chmod(0o750)
    with pytest.raises(SegmentError, match="open to others"):
        Segment.create(run_dir / "sessions" / "a", SegmentKind.PAGES, 4096)
    with pytest.raises(SegmentError, match="real directory"):
        Segment.create(run_dir / "absent" / "a", SegmentKind.PAGES, 4096)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owners_are_checked(path: Path, run_dir: Path) -> None:
    Segment.create(path, SegmentKind.PAGES, 4096).close()
    os.chown(path, 12_345, -1)
    with pytest.raises(SegmentError, match="belongs to user 12345"):
        Segment.attach(path, SegmentKind.PAGES)
    os.chown(run_dir / "sessions", 12_345, -1)
    with pytest.raises(SegmentError, match="belongs to user 12345"):
        Segment.create(run_dir / "sessions" / "a", SegmentKind.PAGES, 4096)


def _patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (0, b"ELF", "is no lmpipe segment"),
        (0, bytes(8), "is not ready"),
        (H_READY, bytes(8), "is not ready"),
        (H_VERSION, b"\x63", "segment version 99, this lmpipe reads 1"),
        (H_KIND, bytes([SegmentKind.HOLDS]), "kind HOLDS, wanted is PAGES"),
        (H_KIND, b"\x77", "kind 119, wanted is PAGES"),
        (64, b"\xff\xff\xff", "16777215 bytes of JSON"),
    ],
)
def test_a_foreign_header_is_refused(path: Path, offset: int, data: bytes, words: str) -> None:
    Segment.create(path, SegmentKind.PAGES, 8192).close()
    _patch(path, offset, data)
    with pytest.raises(SegmentError, match=words):
        Segment.attach(path, SegmentKind.PAGES)


@pytest.mark.parametrize(
    ("nbytes", "words"), [(0, "0 bytes are no"), (100, "100 bytes are no"), (4096, "was cut"), (12_288, "or extended")]
)
def test_a_file_of_another_size_is_refused(path: Path, nbytes: int, words: str) -> None:
    Segment.create(path, SegmentKind.PAGES, 8192).close()
    os.truncate(path, nbytes)
    with pytest.raises(SegmentError, match=words):
        Segment.attach(path, SegmentKind.PAGES)


def test_what_is_no_file_is_refused(path: Path, run_dir: Path) -> None:
    with pytest.raises(SegmentError, match="no such segment"):
        Segment.attach(path, SegmentKind.PAGES)
    os.mkfifo(path)
    with pytest.raises(SegmentError, match="no regular file"):
        Segment.attach(path, SegmentKind.PAGES)
    with pytest.raises(SegmentError):
        Segment.attach(run_dir / "sessions", SegmentKind.PAGES)


def test_views_outlive_close(path: Path) -> None:
    segment = Segment.create(path, SegmentKind.PAGES, 8192)
    view, array = segment.buf[4096:5000], np.frombuffer(segment.buf, np.uint8)
    words = native.Words(segment.buf, HEADER_BYTES, 4)
    region = segment.region
    segment.close()
    segment.close()
    view[0] = 9
    assert array[4096] == 9 and words.load(0) == 9 and region.nbytes == 8192 and segment.closed
    assert str(path) in Path("/proc/self/maps").read_text()
    del view, array, words, region
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_close_unmaps_when_nothing_is_in_use(path: Path) -> None:
    segment = Segment.create(path, SegmentKind.PAGES, 8192)
    assert segment.region.nbytes == 8192
    segment.close()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_unlink_spares_a_successor(path: Path) -> None:
    old = Segment.create(path, SegmentKind.PAGES, 4096)
    old.unlink()
    old.unlink()
    new = Segment.create(path, SegmentKind.PAGES, 4096)
    old.unlink()
    assert path.exists()
    new.unlink()
    assert not path.exists()
    old.close()
    new.close()


def test_a_full_tmpfs_is_an_error(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace to be had: `unshare -m` is not permitted")
    mount = (
        f"mount -t tmpfs -o size=2m,mode=700 none {tmp_path} && exec {sys.executable} {HERE}/full_tmpfs.py {tmp_path}"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_more_than_the_mount_has_is_refused_at_once(path: Path) -> None:
    with pytest.raises(SegmentError, match=f"{1 << 50} bytes are wanted and \\d+ bytes are free"):
        Segment.create(path, SegmentKind.PAGES, 1 << 50)
    assert not path.exists()


def test_a_file_size_limit_is_an_error(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(SegmentError, match="ulimit -f"):
            Segment.create(path, SegmentKind.PAGES, 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
