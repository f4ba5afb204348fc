"""Feeds damaged input to everything that reads bytes it cannot trust, in one process for each reader.

    python tests/fuzz/fuzz.py --count 1000000 --seed 1 [--target "index rows"] [--first N]

An input that makes its reader raise anything but its own error, refuse without a name, crash, or take `HANG_S`, is
printed with the command that does it again.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from targets import TARGETS, inputs

HANG_S = 60.0
_NUMBER = 8


@dataclass(frozen=True)
class Outcome:
    """What became of the inputs of one target."""

    target: str
    taken: int
    refused: int
    seconds: float
    problem: str = ""

    def line(self) -> str:
        """For people."""
        count = self.taken + self.refused
        rate = count / self.seconds if self.seconds else 0.0
        return f"{self.target:22}{count:>9,} inputs, {self.refused:>9,} refused, {rate:>7,.0f}/s"


def feed(name: str, seed: int, first: int, count: int, note: mmap.mmap | None = None) -> Outcome:
    """Feed one target in this process. `note` takes the number of the input that is being read."""
    refused, begin_s, number = 0, time.monotonic(), first
    # On tmpfs where there is one: files are written for every input.
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lmpipe-fuzz-", dir=base) as directory:
        target = TARGETS[name](Path(directory))
        try:
            for number, data in inputs(target, seed, first, count):
                if note is not None:
                    note[:_NUMBER] = number.to_bytes(_NUMBER, "little")
                try:
                    target.read(data)
                except target.refusals as error:
                    refused += 1
                    assert target.names(error), f"a refusal that does not name what is wrong: {error}"
        except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
            problem = f"{command(name, seed, number)}\n{traceback.format_exc()}"
            return Outcome(name, number - first - refused, refused, time.monotonic() - begin_s, problem)
        finally:
            target.close()
    return Outcome(name, count - refused, refused, time.monotonic() - begin_s)


def command(name: str, seed: int, number: int) -> str:
    """What feeds this one input again."""
    return f"python tests/fuzz/fuzz.py --target {shlex.quote(name)} --seed {seed} --first {number} --count 1"


def feed_apart(name: str, seed: int, first: int, count: int) -> Outcome:
    """Feed one target in a process of its own, which may crash or hang."""
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        note = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        argv = [sys.executable, "-W", "error", "-X", "faulthandler", __file__, "--target", name, "--seed", str(seed)]
        argv += ["--first", str(first), "--count", str(count), "--note", str(file.fileno())]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[file.fileno()])
        last, since_s = -1, time.monotonic()
        while True:
            try:
                said, _ = child.communicate(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                number = int.from_bytes(note[:_NUMBER], "little")
                if number != last:
                    last, since_s = number, time.monotonic()
                elif time.monotonic() - since_s > HANG_S:
                    child.kill()
                    child.communicate()
                    return Outcome(name, 0, 0, 0.0, f"{command(name, seed, number)}\nhangs")
        number = int.from_bytes(note[:_NUMBER], "little")
        note.close()
    text = said.decode(errors="replace")
    if child.returncode == 0:
        taken, refused, seconds = text.split()[-3:]
        return Outcome(name, int(taken), int(refused), float(seconds))
    head = "" if child.returncode == 1 else f"{command(name, seed, number)}\nends with status {child.returncode}\n"
    return Outcome(name, 0, 0, 0.0, head + text)


def shares(count: int) -> dict[str, int]:
    """How many inputs each target gets: at least one, `count` in all."""
    whole = sum(kind.share for kind in TARGETS.values())
    parts = {name: max(int(count * kind.share / whole), 1) for name, kind in TARGETS.items()}
    parts["frames"] += max(count - sum(parts.values()), 0)
    return parts


def main() -> int:
    """1 if any input is not read as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=TARGETS, help="only this one")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--note", type=int, default=-1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.note >= 0:
        found = feed(asked.target, asked.seed, asked.first, asked.count, mmap.mmap(asked.note, mmap.PAGESIZE))
        print(found.problem or f"{found.taken} {found.refused} {found.seconds}")
        return bool(found.problem)
    parts = {asked.target: asked.count} if asked.target else shares(asked.count)
    print(f"seed {asked.seed}, {sum(parts.values()):,} inputs", flush=True)
    outcomes: list[Outcome] = []
    for name, count in parts.items():
        outcomes.append(feed_apart(name, asked.seed, asked.first, count))
        print(outcomes[-1].problem or outcomes[-1].line(), flush=True)
    read = sum(outcome.taken + outcome.refused for outcome in outcomes)
    failed = [outcome.target for outcome in outcomes if outcome.problem]
    print(f"{read:,} inputs read, {', '.join(failed) + ' failed' if failed else 'none amiss'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
