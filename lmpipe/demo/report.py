"""What the demo found: rows, as a table, as JSON and as a plot. Knows no process."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
from rich.table import Table

from lmpipe.demo.client import Answer

COLUMNS = ("", "tier", "prompt", "hit", "MiB", "cold ms", "warm ms", "speed-up", "tokens")


@dataclass(frozen=True, slots=True)
class Sample:
    """One request beside the same request without lmpipe."""

    name: str
    prompt_tokens: int
    cold: Answer
    warm: Answer
    tie: float = 0.0
    """Of the scale: below it rounding decides."""

    @property
    def equal(self) -> bool:
        """Whether every token is the same."""
        return self.cold.tokens == self.warm.tokens

    @property
    def tied(self) -> bool:
        """Whether the first token that is not the same was as good as even with the other."""
        return not self.equal and self.warm.lag is not None and self.warm.lag < self.tie


@dataclass(slots=True)
class Row:
    """Requests that were served alike. `tier`: where most of the hit tokens came from, "none" without hits."""

    label: str
    samples: list[Sample] = field(default_factory=list[Sample])
    expected_tier: str = ""

    @property
    def by_tier(self) -> dict[str, int]:
        """Hit tokens by tier."""
        total: dict[str, int] = {}
        for sample in self.samples:
            for tier, tokens in sample.warm.hit_by_tier.items():
                total[tier] = total.get(tier, 0) + tokens
        return total

    @property
    def tier(self) -> str:
        """Where most of the hit tokens came from."""
        return max(self.by_tier, key=lambda tier: self.by_tier[tier], default="none")

    @property
    def tokens_equal(self) -> bool:
        """Whether no token differs from the run without a cache, but for ties."""
        return all(sample.equal or sample.tied for sample in self.samples)

    @property
    def ties(self) -> int:
        """Requests in which rounding decided otherwise."""
        return sum(sample.tied for sample in self.samples)

    @property
    def served_as_expected(self) -> bool:
        """Whether it was the tier that this row is about."""
        return not self.expected_tier or self.tier == self.expected_tier

    def figures(self) -> dict[str, Any]:
        """The row as JSON."""
        cold = statistics.median(sample.cold.ttft_ms for sample in self.samples)
        warm = statistics.median(sample.warm.ttft_ms for sample in self.samples)
        return {
            "label": self.label,
            "tier": self.tier,
            "requests": len(self.samples),
            "prompt_tokens": sum(sample.prompt_tokens for sample in self.samples),
            "hit_tokens": sum(sample.warm.hit_tokens for sample in self.samples),
            "hit_tokens_by_tier": self.by_tier,
            "bytes": sum(sample.warm.loaded_bytes for sample in self.samples),
            "ttft_cold_ms": round(cold, 3),
            "ttft_warm_ms": round(warm, 3),
            "speed_up": round(cold / warm, 3),
            "tokens_equal": self.tokens_equal,
            "ties": self.ties,
            "smallest_margin": min(sample.cold.margin for sample in self.samples),
            "requests_detail": [_detail(sample) for sample in self.samples],
        }


def _detail(sample: Sample) -> dict[str, Any]:
    warm = asdict(sample.warm)
    return {
        "name": sample.name,
        "prompt_tokens": sample.prompt_tokens,
        "ttft_cold_ms": sample.cold.ttft_ms,
        "tokens_equal": sample.equal,
        "lag": sample.warm.lag,
        **{name: warm[name] for name in ("hit_tokens", "hit_by_tier", "loaded_bytes", "reason")},
        "ttft_warm_ms": sample.warm.ttft_ms,
    }


@dataclass(slots=True)
class Report:
    """All of it. `machine`: cores, threads, versions."""

    rows: list[Row] = field(default_factory=list[Row])
    negative_control_differs: bool = False
    straight_control_equal: bool = False
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    seconds: float = 0.0

    @property
    def ties(self) -> int:
        """Requests in which rounding decided otherwise."""
        return sum(row.ties for row in self.rows)

    @property
    def problems(self) -> list[str]:
        """Why the demo failed; empty when it did not."""
        found: list[str] = []
        for row in self.rows:
            if not row.tokens_equal:
                found.append(f"{row.label}: tokens differ from the run without a cache")
            if not row.served_as_expected:
                found.append(f"{row.label}: served from {row.tier}, not from {row.expected_tier}")
        if not self.straight_control_equal:
            found.append("control: KV loaded by hand gave other tokens")
        if not self.negative_control_differs:
            found.append("negative control: scrambled KV gave the same tokens, so this run proves nothing")
        return found

    def to_json(self) -> dict[str, Any]:
        """The shape that `lmpipe demo --json` prints."""
        return {
            "rows": [row.figures() for row in self.rows],
            "negative_control_differs": self.negative_control_differs,
            "straight_control_equal": self.straight_control_equal,
            "problems": self.problems,
            "machine": self.machine,
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> Table:
        """The table for a terminal."""
        title = "time to first token, median of each row's requests"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
        for row in self.rows:
            figures = row.figures()
            table.add_row(
                row.label,
                figures["tier"],
                f"{figures['prompt_tokens']:,}",
                f"{figures['hit_tokens']:,}",
                f"{figures['bytes'] / (1 << 20):,.1f}",
                f"{figures['ttft_cold_ms']:,.0f}",
                f"{figures['ttft_warm_ms']:,.0f}",
                f"{figures['speed_up']:.1f}x",
                "[red]DIFFER[/]" if not row.tokens_equal else f"{row.ties} ties" if row.ties else "equal",
            )
        return table

    def write(self, directory: Path) -> tuple[Path, Path | None]:
        """Write `demo.json` and, where matplotlib is installed, `demo.png`."""
        as_json = directory / "demo.json"
        as_json.write_bytes(orjson.dumps(self.to_json(), option=orjson.OPT_INDENT_2))
        if find_spec("matplotlib") is None:
            return as_json, None
        from lmpipe.demo import plot  # noqa: PLC0415  matplotlib is optional, and slow to import

        as_plot = directory / "demo.png"
        plot.draw([row.figures() for row in self.rows], as_plot)
        return as_json, as_plot
