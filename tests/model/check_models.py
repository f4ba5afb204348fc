"""Checks the protocol's models with spin: each as it is, in several sizes, and each with one step left out.

    python tests/model/check_models.py [--long]

A model that is whole must have no run that breaks a property; one that lacks a step must have one, or the check proves
nothing. spin makes a C program of a model (`apt-get install spin`, http://spinroot.com), so a C compiler is needed too.
`--long` takes the larger sizes: minutes, and 4 GiB of memory at most.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
DEEPEST = "200000"
MEMORY_MIB = 4000
LIMIT_S = 1800


@dataclass(frozen=True)
class Whole:
    """A model with every step, at one size."""

    model: str
    size: tuple[str, ...]


QUICK = (Whole("slots", ("WRITERS=1", "LEASES=2", "OWNER_KILLS=2")), Whole("grants", ("PROMPTS=2",)))
LONG = (
    Whole("slots", ("WRITERS=2", "READERS=1")),
    Whole("slots", ("WRITERS=1", "READERS=2")),
    Whole("slots", ("WRITERS=1", "READERS=1", "READS=2", "LIVES=3")),
    Whole("grants", ("PROMPTS=4",)),
)

STEPS = (
    ("slots", "GENERATION", "the state word is swapped whatever life of the slot it is of"),
    ("slots", "LIFE_CHECK", "a lease ends by time, not by the death of its holder"),
    ("slots", "MEMORY_OF_RETURNS", "a writer takes a lease that it gave back when it is told of it again"),
    ("slots", "STORE_FENCE", "the slot is closed while streaming stores are on their way"),
    ("slots", "DOOM_FIRST", "the holds are read before the slot is doomed"),
    ("slots", "OWNERS_FENCE", "the holds are read before the doom is out"),
    ("slots", "NEW_LISTING", "only the sessions known before the doom are looked at"),
    ("slots", "SCAN", "nobody looks at the holds"),
    ("slots", "HOLDS_IN_RECOVERY", "a restart frees doomed slots unseen"),
    ("slots", "READERS_FENCE", "the reader looks again before its hold is out"),
    ("slots", "REREAD", "the reader does not look again"),
    ("grants", "LOOK_AFTER_COPY", "the grant is read before the copy only"),
    ("grants", "LOOK_BEFORE_CLOSE", "the slot is closed before the grant is read"),
    ("grants", "REVOKES_FENCE", "pages are used again before the revocation is out"),
    ("grants", "SAVE_ID", "any save's grant will do"),
    ("grants", "SESSION", "the grants of the engine's present session are taken for those of the last"),
)
"""Model, step, and what a lmpipe without it would do."""
SIZE_OF_STEP = {"MEMORY_OF_RETURNS": ("WRITERS=1", "LEASES=2"), "READERS_FENCE": ("WRITERS=1",)}


@dataclass(frozen=True)
class Result:
    """What spin found."""

    broken: str
    """The property that some run breaks; empty if there is none."""
    states: int
    seconds: float


def missing() -> str:
    """What this machine lacks, and how to get it; empty if nothing."""
    lacks = [name for name in ("spin", "cc") if shutil.which(name) is None]
    return f"{' and '.join(lacks)} not found: apt-get install spin gcc libc6-dev" if lacks else ""


def check(model: str, defines: tuple[str, ...], optimise: str = "-O2") -> Result:
    """Search all runs of a model.

    Raises:
        RuntimeError: the search was not completed; the text is spin's.
    """
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lmpipe-model-") as directory:
        _call(["spin", "-a", *(f"-D{define}" for define in defines), str(HERE / f"{model}.pml")], directory)
        _call(["cc", "-w", optimise, "-DSAFETY", f"-DMEMLIM={MEMORY_MIB}", "-o", "pan", "pan.c"], directory)
        said = _call(["./pan", f"-m{DEEPEST}"], directory)
    states = re.search(r"^\s*(\d+) states, stored", said, re.MULTILINE)
    broken = re.search(r"^pan:\d+: (.*) \(at depth", said, re.MULTILINE)
    if not states or (not broken and ("not completed" in said or "errors: 0" not in said or "error:" in said)):
        raise RuntimeError(f"{model} {' '.join(defines)}: {said}")
    return Result(broken[1] if broken else "", int(states[1]), time.monotonic() - begin_s)


def check_without(model: str, step: str) -> Result:
    """Search for a run in which a missing step shows."""
    return check(model, (f"WITHOUT_{step}", *SIZE_OF_STEP.get(step, ())), "-O0")


def _call(argv: list[str], directory: str) -> str:
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    """Check all and print a line for each; 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="larger sizes too")
    wanted = parser.parse_args()
    if lacks := missing():
        print(lacks, file=sys.stderr)
        return 1
    wrong = 0
    for whole in QUICK + (LONG if wanted.long else ()):
        found = check(whole.model, whole.size)
        wrong += bool(found.broken)
        said = f"BROKEN: {found.broken}" if found.broken else "holds"
        print(
            f"{whole.model:7}{' '.join(whole.size):40}{said}, {found.states:,} states, {found.seconds:.0f} s",
            flush=True,
        )
    for model, step, _ in STEPS:
        found = check_without(model, step)
        wrong += not found.broken
        said = f"breaks {found.broken}" if found.broken else "NOT MISSED: the model does not need it"
        print(f"{model:7}without {step:32}{said}", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
