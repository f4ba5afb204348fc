"""The demo's rows as a bar chart. Knows the figures only; the one file that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from matplotlib.figure import Figure

COLD, WARM = "#b8c4d0", "#2a6f97"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time to first token of each row, without and with lmpipe, as a PNG."""
    figure = Figure(figsize=(9, 0.55 * len(rows) + 1.6), layout="constrained")
    axes = cast(Any, figure.subplots())
    places = range(len(rows))
    cold, warm = [row["ttft_cold_ms"] for row in rows], [row["ttft_warm_ms"] for row in rows]
    axes.barh([at - 0.2 for at in places], cold, 0.38, color=COLD, label="without lmpipe")
    bars = axes.barh([at + 0.2 for at in places], warm, 0.38, color=WARM, label="with lmpipe")
    labels = [f"{row['ttft_warm_ms']:,.0f} ms, {row['speed_up']:.1f}x" for row in rows]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_yticks(list(places), [row["label"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time to first token, ms (median)")
    axes.margins(x=0.18)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    cast(Any, figure).savefig(path, dpi=130)
