"""First tokens of a prompt whose KV is there already, as README shows them: from the JSON of a run of run.py.

python profiling/peers/picture.py profiling/peers/793a91f.json docs/figures/first-token.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import orjson
from matplotlib.figure import Figure as Canvas

SIZES = ("4K", "8K")
SHOWN = {
    "own prefix cache": ("vLLM's own prefix cache (same process)", "#7a9cc6"),
    "lmpipe, DRAM": ("lmpipe, from DRAM", "#2a9d8f"),
    "LMCache, engine-driven": ("LMCache, engine-driven", "#b0b7bf"),
    "LMCache, worker-driven, 1 OpenMP thread": ("LMCache, worker-driven, 1 OpenMP thread", "#b0b7bf"),
    "LMCache, worker-driven": ("LMCache, worker-driven", "#b0b7bf"),
}
"""Name of the figure, after the size: what the picture calls it, and its colour."""


def main() -> int:
    """The exit status."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    run = orjson.loads(source.read_bytes())
    found = {figure["name"]: figure["value"] for figure in run["figures"]}
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lmpipe", "font.family": "sans-serif"})
    canvas = cast(Any, Canvas(figsize=(9, 2.6), layout="constrained"))
    panels = canvas.subplots(1, len(SIZES), sharey=True)
    for axes, size in zip(panels, SIZES, strict=True):
        values = [found[f"{size}, {name}"] for name in SHOWN]
        axes.barh([label for label, _ in SHOWN.values()], values, color=[colour for _, colour in SHOWN.values()])
        for at, value in enumerate(values):
            axes.annotate(f" {value:,.0f} ms", (value, at), va="center", fontsize=8)
        axes.set_title(f"{size} tokens (computed: {found[f'{size}, cold'] / 1000:.1f} s)", fontsize=9)
        axes.margins(x=0.25)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    canvas.savefig(target, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
