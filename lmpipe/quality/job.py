"""What the commands ask of the process that loads the model. Knows no torch."""

from __future__ import annotations

import msgspec


class QualityJob(msgspec.Struct, frozen=True, kw_only=True, tag="quality"):
    """Measure codecs. `contexts` empty: a quarter, half and all of the model's context."""

    model: str
    data: str
    codecs: list[str]
    contexts: list[int]
    windows: int
    new_tokens: int
    calibration: str | None
    as_json: bool
    out: str | None


class CalibrationJob(msgspec.Struct, frozen=True, kw_only=True, tag="calibrate"):
    """Measure what each layer, head and K|V loses at fewer bits, and share a budget among them."""

    model: str
    data: str
    budget_bits: float
    context: int
    windows: int
    out: str


Job = QualityJob | CalibrationJob


def packed(job: Job) -> str:
    """For a command line."""
    return msgspec.json.encode(job).decode()


def unpacked(text: str) -> Job:
    """Inverse of `packed`."""
    return msgspec.json.decode(text, type=Job)
