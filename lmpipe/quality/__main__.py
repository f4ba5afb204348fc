"""`python -m lmpipe.quality JOB`: the process that loads the model for `lmpipe quality` and `lmpipe calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import orjson
from rich.console import Console
from rich.status import Status
from transformers.utils import logging

from lmpipe.codecs import CODECS, ChunkCodec, calibration
from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.calibration import BITS, Calibration
from lmpipe.errors import LmpipeError
from lmpipe.handles import Codec
from lmpipe.quality import measure
from lmpipe.quality.calibrate import distortions
from lmpipe.quality.job import CalibrationJob, QualityJob, unpacked
from lmpipe.quality.report import QualityReport, draw_bits
from lmpipe.quality.subject import Subject, tokens_of

WIDTH = 128


def main() -> int:
    """The exit status."""
    job = unpacked(sys.argv[1])
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        if isinstance(job, QualityJob):
            quality(job)
        else:
            calibrate(job)
    except LmpipeError as error:
        print(f"lmpipe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def quality(job: QualityJob) -> None:
    """Measure, print, write."""
    console = _console(stderr=job.as_json)
    with Status("loading the model", console=console) as status:
        subject = Subject.load(Path(job.model))
        codecs = _codecs(job, subject)
        ids = tokens_of(Path(job.model), Path(job.data), subject.vocabulary)
        rows = measure.rows(
            subject,
            ids,
            codecs,
            contexts=subject.contexts(job.contexts),
            windows=job.windows,
            new_tokens=job.new_tokens,
            say=status.update,
        )
        report = QualityReport(subject.name, Path(job.data).name, subject.layout.dtype, list(rows))
    if job.as_json:
        sys.stdout.buffer.write(orjson.dumps(report.json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        console.print(report.table())
    for line in report.write(Path(job.out)) if job.out else []:
        console.print(line, highlight=False, soft_wrap=True)


def calibrate(job: CalibrationJob) -> None:
    """Measure, share the budget, write the file and its picture."""
    console = _console(stderr=False)
    out = Path(job.out)
    with Status("loading the model", console=console) as status:
        subject = Subject.load(Path(job.model))
        ids = tokens_of(Path(job.model), Path(job.data), subject.vocabulary)
        context = subject.contexts([job.context] if job.context else [])[-1]
        found = distortions(subject, ids, context=context, windows=job.windows, say=status.update)
    bits = calibration.allocate(found, job.budget_bits)
    layout = subject.layout
    shape = layout.layers, layout.kv, layout.kv_heads, layout.head_dim
    made = Calibration(
        calibration.VERSION, subject.name, *shape, job.budget_bits, bits.tolist(), np.round(found, 12).tolist()
    )
    try:
        calibration.write(out, made)
    except OSError as error:
        raise LmpipeError(f"{out}: {error.strerror}") from error
    chosen = np.searchsorted(BITS, bits)[..., None]
    console.print(
        f"{bits.mean():.4g} bits on the mean; KL expected, in nats: {np.take_along_axis(found, chosen, -1).sum():.2e}"
        f" (with 3 bits everywhere {found[..., 0].sum():.2e}, with 4 {found[..., 1].sum():.2e})",
        highlight=False,
        soft_wrap=True,
    )
    title = f"{subject.name}: bits by layer and head, {bits.mean():.4g} on the mean"
    for line in (f"calibration: {out}", draw_bits(bits, title, out.with_suffix(".png"))):
        console.print(line, highlight=False, soft_wrap=True)


def _codecs(job: QualityJob, subject: Subject) -> dict[str, ChunkCodec]:
    """By name: those asked for, else all but `raw`, and `adaptive` only with a calibration.

    Raises:
        LmpipeError: the calibration cannot be read, or is of another model.
    """
    found = {codec.name: codec for codec in CODECS.values()}
    adaptive = CODECS[Codec.ADAPTIVE].name
    left_out = {CODECS[Codec.RAW].name, adaptive}
    if job.calibration:
        try:
            read = calibration.read(Path(job.calibration))
        except OSError as error:
            raise LmpipeError(f"{job.calibration}: {error.strerror}") from error
        layout = subject.layout
        shape = layout.layers, layout.kv, layout.kv_heads, layout.head_dim
        if read.shape != shape:
            raise LmpipeError(
                f"{job.calibration} is of (layers, kv, heads, head_dim) {read.shape}, {subject.name} has {shape}"
            )
        found[adaptive] = AdaptiveCodec(read)
        left_out.remove(adaptive)
    return {name: found[name] for name in job.codecs or found if job.codecs or name not in left_out}


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH)


if __name__ == "__main__":
    sys.exit(main())
