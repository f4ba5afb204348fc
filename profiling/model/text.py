"""The text that the model is trained on: what is at hand on a Debian machine with Python. Knows no model.

Files are taken whole, in the order of a hash of their names. One whose lines were mostly seen before is a
near-duplicate and left out. The first ones of the kinds that may be redistributed here are held out.
"""

from __future__ import annotations

import gzip
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_BYTES = 256 << 10
LONGEST_HELD_OUT = 40 << 10
DUPLICATE = 0.35
"""Share of a file's bytes that lie on lines seen in files before it, from which on it is a near-duplicate."""

_SHORT_LINE = 16
_GAP = b"\n\n"
_STDLIB = Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True, slots=True)
class Kind:
    """Files of one origin. `shared`: their licence (BSD-3-Clause, PSF-2.0) lets a part of them be held out and kept."""

    name: str
    root: Path
    pattern: str
    shared: bool = False
    without: tuple[str, ...] = ()

    def files(self) -> Iterator[tuple[str, Path]]:
        """Name in this kind, and path."""
        for path in self.root.rglob(self.pattern):
            name = str(path.relative_to(self.root))
            if path.is_file() and not path.is_symlink() and not any(part in f"/{name}" for part in self.without):
                yield f"{self.name}/{name}", path


KINDS = (
    Kind("python", _STDLIB, "*.py", True, ("/site-packages/", "/test", "/encodings/", "/lib2to3/", "/config-")),
    Kind("cmake", Path("/usr/share/cmake-3.25/Help"), "*.rst", True),
    Kind("perl", Path("/usr/share/perl"), "*.pod"),
    Kind("licences", Path("/usr/share/common-licenses"), "*"),
    *(Kind(f"man{n}", Path(f"/usr/share/man/man{n}"), "*.gz", without=("/gcloud",)) for n in (2, 5)),
)


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes to train on and bytes held out, and how many each kind gave."""

    train: bytes
    held_out: bytes
    train_bytes: dict[str, int]
    held_out_files: list[str]


def gather() -> Text:
    """Read everything; the same on the same machine."""
    files = sorted((hashlib.blake2b(name.encode()).digest(), name, path) for k in KINDS for name, path in k.files())
    shared = {kind.name for kind in KINDS if kind.shared}
    seen: set[bytes] = set()
    train: list[bytes] = []
    held_out: list[bytes] = []
    train_bytes = {kind.name: 0 for kind in KINDS}
    names: list[str] = []
    for _, name, path in files:
        kind = name.partition("/")[0]
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = {line for line in map(bytes.strip, data.splitlines()) if len(line) >= _SHORT_LINE}
        known = sum(map(len, lines & seen))
        seen |= lines
        if not lines or known > DUPLICATE * sum(map(len, lines)):
            continue
        room = HELD_OUT_BYTES - sum(map(len, held_out))
        if kind in shared and len(data) <= min(room, LONGEST_HELD_OUT):
            held_out.append(data)
            names.append(name)
        else:
            train.append(data)
            train_bytes[kind] += len(data)
    return Text(_GAP.join(train), _GAP.join(held_out), train_bytes, names)
