"""What a benchmark found: figures with their limits and goals, as JSON, as a table, as a plot. Knows no benchmark.

One shape for all of them:

    {"name": "save", "commit": "1b80d88", "machine": "2 x AMD EPYC, …",
     "figures": [{"name", "value", "unit", "limit", "ratio", "goal", "met", "runs"}, …]}

`limit` is what was measured against, in the same run and unit; `ratio` is value / limit, or the median of such ratios
where measurements go in pairs; `goal` is in words, about one of the two ("ratio >= 0.9", "value <= 0.5"), null where
there is none; `met` is null where nothing is to be judged; `runs` is how many measurements the figure is the median of.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import rich.box
from rich.table import Table

from lmpipe.launch.host import memory_bytes


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a figure's value or on its ratio to the limit."""

    about: Literal["value", "ratio"]
    sense: Literal[">=", "<="]
    bound: float

    def __str__(self) -> str:
        return f"{self.about} {self.sense} {self.bound:g}"

    def met(self, value: float, ratio: float | None) -> bool | None:
        """Whether the bound is kept; None when the figure has no such number."""
        number = value if self.about == "value" else ratio
        if number is None:
            return None
        return number >= self.bound if self.sense == ">=" else number <= self.bound


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    limit: float | None
    ratio: float | None
    goal: str | None
    met: bool | None
    runs: int

    @classmethod
    def of(
        cls,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        limits: Sequence[float] = (),
        goal: Goal | None = None,
        quantile: float = 0.5,
        paired: bool = False,
    ) -> Figure:
        """The median (or another quantile) of `values`, against that of `limits`.

        `paired`: the ratio is the median of those of the pairs, each taken one just after the other: what slows down
        the machine for seconds slows down both of a pair.
        """
        value = quantile_of(values, quantile)
        limit = quantile_of(limits, 0.5) if limits else None
        ratio = value / limit if limit else None
        if paired and limits:
            ratio = quantile_of([value / limit for value, limit in zip(values, limits, strict=True)], 0.5)
        met = goal.met(value, ratio) if goal is not None else None
        return cls(name, value, unit, limit, ratio, str(goal) if goal is not None else None, met, len(values))


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of one benchmark, and where they were seen."""

    name: str
    commit: str
    machine: str
    figures: list[Figure]

    @classmethod
    def of(cls, name: str, figures: Sequence[Figure], *, judged: bool = True) -> Report:
        """A report of this machine and checkout; not `judged`: whether goals are met is not said."""
        kept = list(figures) if judged else [replace(figure, met=None) for figure in figures]
        return cls(name, commit(), machine(), kept)

    @property
    def missed(self) -> list[Figure]:
        """Figures that did not reach their goal."""
        return [figure for figure in self.figures if figure.met is False]

    def json(self) -> dict[str, Any]:
        """The shape above, with numbers rounded to five digits."""
        shape = asdict(self)
        for figure in shape["figures"]:
            for name in ("value", "limit", "ratio"):
                figure[name] = None if figure[name] is None else float(f"{figure[name]:.5g}")
        return shape


def quantile_of(values: Sequence[float], quantile: float) -> float:
    """The value below which this part of the values lies: the middle of the two neighbours for a median."""
    if quantile == 0.5:
        return statistics.median(values)
    ordered = sorted(values)
    return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]


def commit() -> str:
    """The checkout's commit, with `+` when files of the package differ from it; "unknown" outside of a checkout."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> str:
    """Processors, memory, kernel, Python and graphics of this machine in a line."""
    cpu, memory = "unknown CPU", round(memory_bytes("MemTotal") / (1 << 30))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    drivers = {"NVIDIA GPU": Path("/proc/driver/nvidia/version"), "AMD GPU": Path("/dev/kfd")}
    gpu = next((name for name, path in drivers.items() if path.exists()), "no GPU")
    cores, system, python = os.cpu_count(), platform.release(), platform.python_version()
    return f"{cores} x {cpu}, {memory} GiB, {gpu}, Linux {system}, Python {python}"


def table(report: Report) -> Table:
    """The figures as a table, met and missed marked."""
    shown = Table(title=report.name, caption=f"{report.commit} on {report.machine}", box=rich.box.SIMPLE_HEAD)
    shown.add_column("figure", overflow="fold")
    for column in ("value", "unit", "limit", "ratio", "goal", "runs"):
        shown.add_column(column, justify="left" if column in ("unit", "goal") else "right", no_wrap=True)
    shown.add_column("")
    marks: Mapping[bool | None, str] = {True: "[green]met[/]", False: "[bold red]missed[/]", None: ""}
    for figure in report.figures:
        shown.add_row(
            figure.name,
            number(figure.value),
            figure.unit,
            number(figure.limit),
            number(figure.ratio),
            figure.goal or "",
            str(figure.runs),
            marks[figure.met],
        )
    return shown


def number(value: float | None) -> str:
    """Three digits that mean something; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
