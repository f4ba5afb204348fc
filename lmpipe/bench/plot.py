"""A report as a picture: `python -m lmpipe.bench.plot REPORT.json PICTURE.png`. Knows no benchmark.

One panel for each unit; a bar is a figure, the line across it what it was measured against. A process of its own,
because matplotlib is optional and slow to import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import orjson
from matplotlib.figure import Figure as Canvas
from matplotlib.gridspec import GridSpec

from lmpipe.bench.report import Figure, Report, number

COLOURS = {True: "#2a9d8f", False: "#d1495b", None: "#7a9cc6"}
"""By whether the goal was met."""


def plot(report: Report, path: Path) -> None:
    """Write the report as a PNG."""
    units = list(dict.fromkeys(figure.unit for figure in report.figures))
    rows = [sum(figure.unit == unit for figure in report.figures) for unit in units]
    canvas = cast(Any, Canvas(figsize=(10, 0.5 * sum(rows) + 0.9 * len(units) + 0.8), layout="constrained"))
    canvas.suptitle(f"lmpipe bench {report.name}   {report.commit}\n{report.machine}", fontsize=9)
    grid = GridSpec(len(units), 1, figure=canvas, height_ratios=[count + 1 for count in rows])
    for at, unit in enumerate(units):
        axes = canvas.add_subplot(grid[at, 0])
        _draw(axes, [figure for figure in report.figures if figure.unit == unit], unit)
    canvas.savefig(path, dpi=120)


def _draw(axes: Any, figures: Sequence[Figure], unit: str) -> None:
    places = list(range(len(figures)))
    colours = [COLOURS[figure.met] for figure in figures]
    axes.barh(places, [figure.value for figure in figures], color=colours, height=0.6)
    for place, figure in zip(places, figures, strict=True):
        if figure.limit is not None:
            axes.plot([figure.limit, figure.limit], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        goal = f"   {figure.goal}" if figure.goal else ""
        ratio = f" ({number(figure.ratio)}x)" if figure.ratio is not None else ""
        axes.annotate(f" {number(figure.value)}{ratio}{goal}", (figure.value, place), va="center", fontsize=7)
    axes.set_yticks(places, [figure.name for figure in figures], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.25)


def main() -> int:
    """The exit status."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    shape = orjson.loads(source.read_bytes())
    figures = [Figure(**figure) for figure in shape["figures"]]
    plot(Report(shape["name"], shape["commit"], shape["machine"], figures), target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
