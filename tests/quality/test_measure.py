"""What codecs do to a model's answers, on a tiny one."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from small_model import tiny
from torch.nn.functional import cross_entropy

from lmpipe.codecs import CODECS
from lmpipe.errors import LmpipeError
from lmpipe.handles import Fidelity
from lmpipe.quality import measure
from lmpipe.quality.report import NONE, QualityReport, Row
from lmpipe.quality.subject import Subject, prefix_tokens, windows_of

CONTEXTS = [512, 1024]
FREE = {codec.name for codec in CODECS.values() if codec.fidelity is Fidelity.EXACT}
LOSSY = ["fp8", "int4h"]


@pytest.fixture(scope="module")
def rows(subject: Subject, ids: torch.Tensor) -> list[Row]:
    codecs = {codec.name: codec for codec in CODECS.values() if codec.name in FREE | set(LOSSY)}
    said: list[str] = []
    found = list(measure.rows(subject, ids, codecs, contexts=CONTEXTS, windows=3, new_tokens=5, say=said.append))
    assert len(said) == 2
    return found


def test_there_is_a_row_for_each_codec_at_each_context(rows: list[Row]) -> None:
    names = [codec.name for codec in CODECS.values() if codec.name in FREE | set(LOSSY)]
    assert [(row.context, row.codec) for row in rows] == [(c, n) for c in CONTEXTS for n in [NONE, *names]]
    for row in rows:
        assert row.windows == 3
        assert row.scored_tokens == 3 * (row.context - prefix_tokens(row.context) - 1)
        assert row.bits == pytest.approx(16 / row.ratio)


def test_exact_codecs_change_nothing(rows: list[Row]) -> None:
    for row in rows:
        if row.codec in FREE | {NONE}:
            figures = row.change_percent, row.change_error_percent, row.kl, row.top1, row.generated, row.refused
            assert figures == (0, 0, 0, 1, 1, 0), row.codec


def test_fewer_bits_lose_more(rows: list[Row]) -> None:
    for context in CONTEXTS:
        at = {row.codec: row for row in rows if row.context == context}
        assert 0 < at["fp8"].kl < at["int4h"].kl
        assert at["int4h"].top1 < 1
        assert at["int4h"].bits < at["fp8"].bits < 9
        assert 0 <= at["int4h"].generated <= 1


def test_perplexity_is_that_of_the_rest_of_each_window(subject: Subject, ids: torch.Tensor, rows: list[Row]) -> None:
    texts, prefix = windows_of(ids, 512, 3), prefix_tokens(512)
    with torch.no_grad():
        logits = subject.model(input_ids=texts).logits
    loss = cross_entropy(logits[:, prefix:-1].flatten(0, 1), texts[:, prefix + 1 :].flatten())
    # KV is rounded to bfloat16 there and not here.
    assert rows[0].perplexity == pytest.approx(math.exp(loss), rel=5e-3)


def test_reading_behind_a_prefix_is_reading_all(ids: torch.Tensor) -> None:
    subject = Subject.of("exact", tiny(), None)
    assert subject.layout.dtype == "float32"
    text = ids[None, :400]
    whole, _ = subject.read(text)
    behind, cache = subject.read(text[:, 300:], subject.prefix_kv(text[:, :300]))
    torch.testing.assert_close(behind, whole[:, 300:], rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 400


def test_generated_tokens_count_up_to_the_first_difference() -> None:
    exact = measure.Answers(torch.zeros(2), torch.zeros(2, 3, 4), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]))
    other = measure.Answers(torch.zeros(2), torch.zeros(2, 3, 4), torch.tensor([[1, 9, 3, 4], [1, 2, 3, 9]]))
    tally = measure.Tally()
    tally.add(measure.Passage(torch.empty(0), 200, 100, 1, 0), other, exact)
    assert tally.row("x", 512, 16).generated == (1 + 3) / 8


def test_the_report_says_where_it_was_measured(rows: list[Row]) -> None:
    report = QualityReport("tiny", "text", "bfloat16", rows)
    shape = report.json()
    assert {"commit", "machine", "model", "data", "kv_dtype"} <= shape.keys()
    assert shape["rows"] == [asdict(row) | {"ratio": row.ratio} for row in rows]
    assert report.table().row_count == len(rows)


def test_prefixes_are_whole_chunks_and_leave_a_quarter() -> None:
    assert [prefix_tokens(context) for context in (256, 341, 342, 512, 1024, 2048)] == [0, 0, 256, 256, 768, 1536]


def test_contexts_are_those_of_the_model(subject: Subject) -> None:
    assert subject.contexts([]) == [512, 1024]
    assert subject.contexts([600]) == [600]
    with pytest.raises(LmpipeError, match="goes up to 1024"):
        subject.contexts([2048])
    with pytest.raises(LmpipeError, match="no chunk of 256"):
        subject.contexts([256])


def test_windows_are_spread_over_the_text() -> None:
    ids = torch.arange(1000)
    assert windows_of(ids, 100, 3)[:, 0].tolist() == [0, 450, 900]
    assert len(windows_of(ids, 100, 50)) == 10
    assert windows_of(ids, 999, 50)[:, 0].tolist() == [0]
    with pytest.raises(LmpipeError, match="1000 tokens"):
        windows_of(ids, 1001, 1)
