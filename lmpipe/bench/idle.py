"""What a node costs when there is nothing to do: private memory and wake-ups of all its processes, supervisor included.

    memory    the Private_* lines of /proc/PID/smaps, of every mapping that is not MAP_SHARED. Not counted: the arena,
              the rings, the index and whatever else lies in shared memory, and pages of programs and libraries that
              several processes have. (In smaps_rollup a shared page is private while one process only has it.)
    wake-ups  voluntary context switches of all threads, /proc/PID/task/TID/status, over ten seconds

Of `topologies/local.yaml` as it ships, its directories aside: alone, then with an engine attached that asks for
nothing. The engine's own process is not counted.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lmpipe.bench.harness import Setting, main
from lmpipe.bench.report import Figure, Goal
from lmpipe.demo.node import TOPOLOGY
from lmpipe.layout import KVLayout
from lmpipe.testing import Node, merged

LAYOUT = KVLayout.paged(32, 8, 128, "bfloat16", 16)
MEMORY = Goal("value", "<=", 300.0)
WAKE_UPS = Goal("value", "<=", 40.0)
SETTLE_S = 3.0
WATCH_S = 10.0

_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ...([ps]) ")


def run(setting: Setting) -> list[Figure]:
    """The node alone, then with an engine attached."""
    setting.say(f"starting {TOPOLOGY}")
    setting.disk.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-idle-", dir=setting.disk) as place,
        Node(_changes(setting, Path(place).absolute()), base=TOPOLOGY) as node,
    ):
        figures = _watch(setting, node, "alone", judged=True)
        producer = node.producer(LAYOUT)
        if producer.state != "ready":
            raise RuntimeError(f"the producer is {producer.state}: {producer.reason}")
        return figures + _watch(setting, node, "with an engine attached", judged=False)


def _changes(setting: Setting, place: Path) -> dict[str, Any]:
    """Directories of our own; a quick run needs little memory."""
    tiers = {"ssd": {"directory": str(place / "ssd")}, "remote": {"url": f"file://{place / 'remote'}"}}
    small = {"tiers": {"dram": {"capacity": "64MiB"}}, "index": dict.fromkeys(("dram", "ssd", "remote"), "8MiB")}
    return merged({"tiers": tiers}, small if setting.quick else {})


def _watch(setting: Setting, node: Node, name: str, *, judged: bool) -> list[Figure]:
    watch_s = WATCH_S / setting.size(1, 50)
    time.sleep(SETTLE_S / setting.size(1, 50))
    pids = [node.pid("supervisor"), *(process.pid for process in node.status().processes)]
    setting.say(f"{name}: watching {len(pids)} processes for {watch_s:g} s")
    began, before = time.monotonic(), sum(map(wake_ups, pids))
    time.sleep(watch_s)
    per_second = (sum(map(wake_ups, pids)) - before) / (time.monotonic() - began)
    memory = sum(map(private_bytes, pids)) / (1 << 20)
    return [
        Figure.of(f"private memory, {name}", [memory], "MiB", goal=MEMORY if judged else None),
        Figure.of(f"wake-ups, {name}", [per_second], "1/s", goal=WAKE_UPS if judged else None),
    ]


def private_bytes(pid: int) -> int:
    """Bytes of memory that a process has for itself, shared memory left out."""
    total, counted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        mapping = _MAPPING.match(line)
        if mapping:
            counted = mapping[1] == "p"
        elif counted and line.startswith("Private_"):
            total += int(line.split()[1]) << 10
    return total


def wake_ups(pid: int) -> int:
    """How often threads of a process have waited for something so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            text = (task / "status").read_text()
        except OSError:
            continue  # the thread has ended
        total += int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


if __name__ == "__main__":
    sys.exit(main(run))
