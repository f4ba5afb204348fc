"""How many bits the vectors of a model need, layer by layer, K and V, head by head: the file, and the allocation.

The file is JSON:

    {"version": 1, "model": "name", "layers": 2, "kv": 2, "heads": 1, "head_dim": 64, "budget_bits": 3.25,
     "bits": [[[8], [3]], [[4], [3]]],                                        [layer][kv][head], each 3, 4 or 8
     "distortions": [[[[0.9, 0.2, 0.0]], [[0.1, 0.0, 0.0]]], ...]}            the same, measured with 3, 4, 8 bits

`budget_bits` is the mean over all codes; a vector's scales come on top, 32 / head_dim bits a number. Knows no model:
whoever measures hands distortions in.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from lmpipe.errors import FormatError

BITS = (3, 4, 8)
"""That a code can have."""
VERSION = 1
MAX_FILE_BYTES = 64 << 20

_Extent = Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
_Distortion = Annotated[float, msgspec.Meta(ge=0)]


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's content. `bits` and `distortions` are `[layers][kv][heads]`, of one and of three numbers."""

    version: int
    model: str
    layers: _Extent
    kv: Annotated[int, msgspec.Meta(ge=1, le=2)]
    heads: _Extent
    head_dim: _Extent
    budget_bits: Annotated[float, msgspec.Meta(ge=BITS[0], le=BITS[-1])]
    bits: list[list[list[int]]]
    distortions: list[list[list[list[_Distortion]]]]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(layers, kv, heads, head_dim) of the chunks it is for."""
        return self.layers, self.kv, self.heads, self.head_dim

    @property
    def table(self) -> bytes:
        """`bits`, a byte each, as encoded chunks carry them."""
        return bytes(bits for layer in self.bits for kind in layer for bits in kind)

    def problem(self) -> str:
        """The field that is wrong, and how; empty if none is."""
        if self.version != VERSION:
            return f"version: {self.version} where {VERSION} was expected"
        for layer, kv in product(range(self.layers), range(self.kv)):
            for field, rows in (("bits", self.bits), ("distortions", self.distortions)):
                if len(rows) != self.layers:
                    return f"{field}: {len(rows)} layers where {self.layers} were expected"
                if len(rows[layer]) != self.kv:
                    return f"{field}[{layer}]: {len(rows[layer])} entries for K and V where {self.kv} were expected"
                if len(rows[layer][kv]) != self.heads:
                    return f"{field}[{layer}][{kv}]: {len(rows[layer][kv])} heads where {self.heads} were expected"
            for head in range(self.heads):
                bits, distortions = self.bits[layer][kv][head], self.distortions[layer][kv][head]
                if bits not in BITS:
                    return f"bits[{layer}][{kv}][{head}]: {bits} (possible: {', '.join(map(str, BITS))})"
                if len(distortions) != len(BITS) or not all(map(math.isfinite, distortions)):
                    return f"distortions[{layer}][{kv}][{head}]: {len(BITS)} finite numbers are needed: {distortions}"
        return ""


def read(path: Path) -> Calibration:
    """The calibration in a file.

    Raises:
        FormatError: it is none; the text names file and field.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        text = file.read(MAX_FILE_BYTES + 1)
    if len(text) > MAX_FILE_BYTES:
        raise FormatError(f"{path}: longer than {MAX_FILE_BYTES} bytes")
    try:
        calibration = msgspec.json.decode(text, type=Calibration)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: {error}") from None
    if problem := calibration.problem():
        raise FormatError(f"{path}: {problem}")
    return calibration


def write(path: Path, calibration: Calibration) -> None:
    """Replace a file, whole or not at all.

    Raises:
        FormatError: the calibration contradicts itself; the text names the field.
        OSError: it cannot be written.
    """
    if problem := calibration.problem():
        raise FormatError(f"{path}: {problem}")
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(msgspec.json.encode(calibration) + b"\n")
    unfinished.replace(path)


def allocate(distortions: npt.NDArray[np.float64], budget_bits: float) -> npt.NDArray[np.uint8]:
    """Bits by `[layer][kv][head]` that lose least, as far as greedy steps find it.

    All begin with 3 bits. Then whichever step, from 3 to 4 or 8 or from 4 to 8, saves most distortion for each bit it
    costs is taken, as long as it fits.

    Args:
        distortions: shape [layers, kv, heads, 3]: with 3, 4 and 8 bits.
        budget_bits: mean over all of them.

    Raises:
        ValueError: the budget is below 3.
    """
    if budget_bits < BITS[0]:
        raise ValueError(f"a budget of {budget_bits} bits is below the {BITS[0]} that the smallest codes take")
    cells = distortions.reshape(-1, len(BITS))
    chosen = np.zeros(len(cells), np.int64)
    left = int(budget_bits * len(cells) + 1e-6) - BITS[0] * len(cells)
    bits = np.array(BITS)
    while True:
        costs = bits - bits[chosen][:, None]
        saved = np.take_along_axis(cells, chosen[:, None], 1) - cells
        possible = (costs > 0) & (costs <= left) & (saved > 0)
        if not possible.any():
            return bits[chosen].astype(np.uint8).reshape(distortions.shape[:-1])
        gains = np.where(possible, saved / np.maximum(costs, 1), -1.0)
        cell, step = np.unravel_index(np.argmax(gains), gains.shape)
        left -= int(costs[cell, step])
        chosen[cell] = step
