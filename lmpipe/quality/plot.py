"""Pictures of what was found; the one file here that needs matplotlib. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from lmpipe.quality.report import NONE, Row

SMALLEST = 1e-8
"""Errors below this, zero too, are drawn here."""


def error_against_bytes(rows: Sequence[Row], title: str, path: Path) -> None:
    """KL and change of the perplexity over bits for a number, a line for each context length, as a PNG."""
    figure = cast(Any, Figure(figsize=(11, 4.6), layout="constrained"))
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, 2)
    errors_of: dict[str, Callable[[Row], float]] = {
        "KL of the next token, nats": lambda row: row.kl,
        "change of the perplexity, % (absolute)": lambda row: abs(row.change_percent),
    }
    for axes, (words, value) in zip(panels, errors_of.items(), strict=True):
        for context in sorted({row.context for row in rows}):
            some = sorted(
                (row for row in rows if row.context == context and row.codec != NONE), key=lambda row: row.bits
            )
            errors = [max(value(row), SMALLEST) for row in some]
            axes.plot([row.bits for row in some], errors, "o-", markersize=4, linewidth=1, label=f"{context} tokens")
            if context == max(row.context for row in rows):
                for row, error in zip(some, errors, strict=True):
                    axes.annotate(row.codec, (row.bits, error), xytext=(4, 5), textcoords="offset points", fontsize=8)
        axes.set_yscale("log")
        axes.set_xlabel("bits for each number of KV")
        axes.set_ylabel(words)
        axes.grid(alpha=0.25)
        axes.margins(x=0.12, y=0.12)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def bits_by_head(bits: npt.NDArray[np.uint8], title: str, path: Path) -> None:
    """Bits `[layer][K|V][head]` as coloured cells, a panel for K and one for V, as a PNG."""
    layers, sides, heads = bits.shape
    figure = cast(Any, Figure(figsize=(2.2 + 0.7 * heads * sides, 1.6 + 0.34 * layers), layout="constrained"))
    figure.suptitle(title, fontsize=9)
    panels = np.atleast_1d(figure.subplots(1, sides))
    for side, axes in enumerate(panels):
        axes.imshow(bits[:, side], cmap="viridis", vmin=2, vmax=8, aspect="auto")
        for layer, head in np.ndindex(layers, heads):
            axes.text(head, layer, str(bits[layer, side, head]), ha="center", va="center", color="white", fontsize=8)
        axes.set_title("KV"[side] if sides == 2 else "K and V", fontsize=9)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
    figure.savefig(path, dpi=130)
