"""What was found: rows as a table, as JSON, as a picture. Knows no model and no codec."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import rich.box
from rich.table import Table

from lmpipe.bench.report import commit, machine

NONE = "none"
"""The codec of the run without one."""
NO_PLOT = "plot:    needs matplotlib (pip install 'lmpipe[plot]')"


@dataclass(frozen=True, slots=True)
class Row:
    """A codec at a context length; `lmpipe.quality.measure` says what the figures are.

    `prefix` of the `context` tokens went through the codec; `bits` are those of a number of KV, all overhead included;
    `change_error_percent` is the standard error of `change_percent`; `refused` chunks were kept raw.
    """

    codec: str
    context: int
    prefix: int
    windows: int
    scored_tokens: int
    raw_bytes: int
    encoded_bytes: int
    bits: float
    perplexity: float
    change_percent: float
    change_error_percent: float
    kl: float
    top1: float
    generated: float
    chunks: int
    refused: int

    @property
    def ratio(self) -> float:
        """Bytes of the KV for each byte stored."""
        return self.raw_bytes / self.encoded_bytes


@dataclass(frozen=True, slots=True)
class QualityReport:
    """All rows of a model and a text."""

    model: str
    data: str
    kv_dtype: str
    rows: list[Row]

    def json(self) -> dict[str, Any]:
        """As `--json` prints it, with where it was measured."""
        rows = [asdict(row) | {"ratio": row.ratio} for row in self.rows]
        return {
            "name": "quality",
            "commit": commit(),
            "machine": machine(),
            "model": self.model,
            "data": self.data,
            "kv_dtype": self.kv_dtype,
            "rows": rows,
        }

    def table(self) -> Table:
        """For the terminal."""
        shown = Table(title=f"{self.model} on {self.data}", caption=f"KV in {self.kv_dtype}", box=rich.box.SIMPLE_HEAD)
        for column in ("context", "prefix", "codec"):
            shown.add_column(column, justify="left" if column == "codec" else "right", no_wrap=True)
        refused = any(row.refused for row in self.rows)
        for column in ("ratio", "bits", "perplexity", "change %", "KL, nats", "top-1", "generated"):
            shown.add_column(column, justify="right", no_wrap=True)
        if refused:
            shown.add_column("kept raw", justify="right", no_wrap=True)
        before = self.rows[0].context if self.rows else 0
        for row in self.rows:
            if row.context != before:
                shown.add_section()
                before = row.context
            exact = row.codec == NONE
            shown.add_row(
                str(row.context),
                str(row.prefix),
                row.codec,
                f"{row.ratio:.3f}",
                f"{row.bits:.2f}",
                f"{row.perplexity:.4f}",
                "" if exact else f"{row.change_percent:+.3f} ± {row.change_error_percent:.3f}",
                "" if exact else f"{row.kl:.1e}",
                "" if exact else f"{row.top1:.1%}",
                "" if exact else f"{row.generated:.1%}",
                *([f"{row.refused} of {row.chunks}" if row.chunks else ""] if refused else []),
            )
        return shown

    def write(self, directory: Path) -> list[str]:
        """Write `quality.json` and, where matplotlib is installed, `quality.png`; what to tell the user."""
        directory.mkdir(parents=True, exist_ok=True)
        figures, picture = directory / "quality.json", directory / "quality.png"
        figures.write_bytes(orjson.dumps(self.json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        if find_spec("matplotlib") is None:
            return [f"figures: {figures}", NO_PLOT]
        from lmpipe.quality import plot  # noqa: PLC0415  matplotlib is optional

        plot.error_against_bytes(self.rows, f"{self.model} on {self.data}", picture)
        return [f"figures: {figures}", f"plot:    {picture}"]


def draw_bits(bits: npt.NDArray[np.uint8], title: str, path: Path) -> str:
    """Draw a calibration's bits `[layer][K|V][head]` where matplotlib is installed; what to tell the user."""
    if find_spec("matplotlib") is None:
        return NO_PLOT
    from lmpipe.quality import plot  # noqa: PLC0415  matplotlib is optional

    plot.bits_by_head(bits, title, path)
    return f"plot:        {path}"
