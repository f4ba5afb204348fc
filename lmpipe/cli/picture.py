"""A topology as a drawing: engines, processes with their stages, and the tiers they own. Knows no machine."""

from __future__ import annotations

from lmpipe.handles import Tier
from lmpipe.topology import Process, Topology

GAP = "    "
ARROW_DOWN, ARROW_BACK = "───▶", "◀───"


def draw(topology: Topology) -> str:
    """The picture, in plain box characters, without a line end after the last line."""
    stages = [_stage_box(topology, stage) for stage in topology.stages]
    processes = _runs(topology)
    height = max(len(box) for box in stages)
    stages = [_pad(box, height) for box in stages]
    engine = _pad(
        _box(["engines", f"up to {topology.engines.max_producers}", f"{topology.engines.leases} leases each"]), height
    )
    boxes = [engine]
    for _, members in processes:
        inner = _beside([stages[topology.stages.index(stage)] for stage in members])
        boxes.append(inner)
    titles = [""] + [_title(process, members) for process, members in processes]
    framed = [_frame(box, title) if title else ["", *box, ""] for box, title in zip(boxes, titles, strict=True)]
    framed = [_pad(box, max(map(len, framed))) for box in framed]
    rows = "\n".join(line.rstrip() for line in _beside(framed)).rstrip()
    return "\n".join([rows, "", *_tiers(topology)])


def size(nbytes: int) -> str:
    """Bytes with a binary unit: 1.5 GiB."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.4g} {units[0]}"


def _runs(topology: Topology) -> list[tuple[Process, list[str]]]:
    """Neighbouring stages of one process share a frame; a process whose stages lie apart gets several."""
    found: list[tuple[Process, list[str]]] = []
    for stage in topology.stages:
        process = topology.process_of(stage)
        if found and found[-1][0] is process:
            found[-1][1].append(stage)
        else:
            found.append((process, [stage]))
    return found


def _title(process: Process, members: list[str]) -> str:
    cpus = "" if process.cpus is None else f" on CPU {','.join(map(str, process.cpus))}"
    return f"process {process.name}{cpus}" if [process.name] != members or cpus else process.name


def _stage_box(topology: Topology, stage: str) -> list[str]:
    tiers = topology.tiers
    if stage == "gather":
        lines = [f"DRAM {size(tiers.dram.capacity)}"]
    elif stage == "compress":
        lines = [f"codec {topology.codec}", f"ring {size(topology.rings.compress)}"]
    elif stage == "persist" and tiers.ssd:
        lines = [f"SSD {size(tiers.ssd.capacity)}", f"flush {tiers.ssd.flush}"]
    else:
        lines = [f"remote {size(tiers.remote.capacity)}" if tiers.remote else ""]
    return _box([stage, *lines])


def _tiers(topology: Topology) -> list[str]:
    tiers = topology.tiers
    where = {Tier.DRAM: f"{topology.run_dir}/arena.shm"}
    if tiers.ssd:
        where[Tier.SSD] = tiers.ssd.directory
    if tiers.remote:
        where[Tier.REMOTE] = tiers.remote.url
    index = [f"index {size(topology.index.map_bytes(tier))}" for tier in topology.tier_names]
    wide = max(map(len, index))
    return [
        f"{tier.value:<7} {text:<{wide}}  {where[tier]}" for tier, text in zip(topology.tier_names, index, strict=True)
    ]


def _box(lines: list[str]) -> list[str]:
    wide = max(map(len, lines))
    return [f"┌{'─' * (wide + 2)}┐", *(f"│ {line:<{wide}} │" for line in lines), f"└{'─' * (wide + 2)}┘"]


def _frame(box: list[str], title: str) -> list[str]:
    wide = max(len(box[0]), len(title) + 2)
    top = f"╭ {title} {'─' * (wide - len(title))}╮"
    return [top, *(f"│ {line:<{wide}} │" for line in box), f"╰{'─' * (wide + 2)}╯"]


def _pad(box: list[str], height: int) -> list[str]:
    """Grows a box downwards, inside its border, or with blanks when it has none at the end."""
    if not box[-1].startswith("└"):
        return box + [" " * len(box[0])] * (height - len(box))
    return [*box[:-1], *(["│" + " " * (len(box[0]) - 2) + "│"] * (height - len(box))), box[-1]]


def _beside(boxes: list[list[str]]) -> list[str]:
    """Boxes of one height in a row, with arrows there and back between them."""
    middle = len(boxes[0]) // 2
    wide = [max(map(len, box)) for box in boxes]
    rows: list[str] = []
    for at in range(len(boxes[0])):
        between = ARROW_DOWN if at == middle - 1 else ARROW_BACK if at == middle else GAP
        rows.append(between.join(f"{box[at]:<{w}}" for box, w in zip(boxes, wide, strict=True)))
    return rows
