"""`lmpipe status`: processes, tiers, engines and counters of a node."""

from __future__ import annotations

import argparse
import time

import msgspec
import rich.box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lmpipe.cli.console import wide_console
from lmpipe.cli.nodes import Subparsers, add_node_arguments, add_verb, node_of
from lmpipe.cli.picture import size
from lmpipe.handles import Tier
from lmpipe.launch.overview import EngineView, Overview, overview

EXAMPLES = """
lmpipe status                 the only node there is
lmpipe status local --watch   once a second, until Ctrl-C
lmpipe status --counters      every counter of every process
lmpipe status --json
"""

COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "waiting": "yellow",
    "down": "red",
    "degraded": "red",
    "orphaned": "red",
    "dead": "red",
}
ALONE = {
    "orphaned": "The supervisor is gone; what runs goes on. `lmpipe up` with the same topology takes it over,"
    " `lmpipe down` ends it.",
    "dead": "Nothing runs. `lmpipe up` with the same topology goes on with what DRAM holds, `lmpipe down` removes it.",
}


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "status", "show processes, tiers and engines", EXAMPLES)
    add_node_arguments(parser)
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--watch", action="store_true", help="again every second")
    parser.add_argument("--counters", action="store_true", help="with all counters that are not zero")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when every process is up, else 1."""
    seen = overview(node_of(args))
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(seen)).decode())
    elif args.watch:
        with Live(picture(seen, counters=args.counters), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(1.0)
                seen = overview(node_of(args))
                live.update(picture(seen, counters=args.counters), refresh=True)
    else:
        wide_console().print(picture(seen, counters=args.counters))
    return 0 if seen.state == "ready" else 1


def picture(seen: Overview, *, counters: bool) -> RenderableType:
    """Tables, most wanted first."""
    head = Text.assemble(
        (seen.name, "bold"),
        "  ",
        (seen.state, COLOURS.get(seen.state, "yellow")),
        f"  {seen.run_dir}  supervisor pid {seen.supervisor_pid or 'none'}, up {_duration(seen.uptime_s)}",
    )
    parts: list[RenderableType] = [head, _processes(seen), _tiers(seen)]
    if seen.state in ALONE:
        parts.insert(1, Text(ALONE[seen.state], "yellow"))
    parts.append(_engines(seen.engines) if seen.engines else Text("no engine is attached", "dim"))
    if counters:
        parts.append(_counters(seen))
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        left = column in ("process", "stages", "state", "tier", "engine", "last exit", "counter", "trouble")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "last exit")
    return table


def _processes(seen: Overview) -> Table:
    table = _table("process", "stages", "state", "pid", "up", "restarts", "last exit")
    for p in seen.processes:
        state = Text(p.state, COLOURS.get(p.state, ""))
        up = _duration(p.uptime_s) if p.pid else ""
        table.add_row(p.name, " ".join(p.stages), state, str(p.pid or ""), up, str(p.restarts), p.last_exit)
    return table


def _tiers(seen: Overview) -> Table:
    table = _table("tier", "rows", "used", "capacity", "full", "encoded", "saved", "trouble")
    for t in seen.tiers:
        full = f"{100 * t.used_bytes / t.capacity_bytes:.0f} %" if t.capacity_bytes else ""
        encoded, saved = (f"{t.encoded_chunks:,}", size(t.saved_bytes)) if t.encoded_chunks else ("", "")
        used, capacity = size(t.used_bytes), size(t.capacity_bytes)
        table.add_row(t.tier, f"{t.rows:,}", used, capacity, full, encoded, saved, Text(t.trouble, "red"))
    return table


def _engines(engines: list[EngineView]) -> Table:
    """Tokens looked up and found; chunks loaded from each tier, saved and dropped."""
    table = _table("engine", "pid", "tokens", "hit", "dram", "ssd", "remote", "loaded", "saved", "dropped")
    for e in engines:
        hit = f"{100 * e.hit_tokens / e.lookup_tokens:.0f} %" if e.lookup_tokens else ""
        tiers = [f"{e.hit_chunks[tier.value]:,}" for tier in Tier]
        saved, dropped = f"{e.saved_chunks:,}", f"{e.dropped_chunks:,}"
        table.add_row(e.name, str(e.pid), f"{e.lookup_tokens:,}", hit, *tiers, size(e.loaded_bytes), saved, dropped)
    return table


def _counters(seen: Overview) -> Table:
    table = _table("process", "counter", "value")
    for process, values in seen.counters.items():
        for name, value in values.items():
            if value:
                table.add_row(process, name, f"{value:,}")
    return table


def _duration(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
