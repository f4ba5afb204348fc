"""What a model loses at fewer bits, on a tiny one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_model import tiny

from lmpipe.codecs.adaptive import AdaptiveCodec
from lmpipe.codecs.calibration import BITS, VERSION, Calibration, allocate
from lmpipe.errors import UnsupportedError
from lmpipe.quality import measure
from lmpipe.quality.calibrate import distortions, uniform, watching
from lmpipe.quality.passage import through
from lmpipe.quality.subject import Subject

PREFIX, REST = 256, 64


@pytest.fixture(scope="module")
def found(subject: Subject, ids: torch.Tensor) -> np.ndarray:
    return distortions(subject, ids, context=512, windows=3, say=lambda _: None)


def test_distortions_are_of_every_head_and_fall_with_bits(subject: Subject, found: np.ndarray) -> None:
    assert found.shape == (3, 2, 2, len(BITS))
    assert (found[..., 0] > found[..., 1]).all()
    assert (found[..., 1] > found[..., 2]).all()
    assert (found > 0).all()


def test_all_heads_of_a_layer_lose_what_the_layer_loses(subject: Subject, ids: torch.Tensor) -> None:
    found = distortions(subject, ids, context=512, windows=1, say=lambda _: None)
    kv, rest = subject.prefix_kv(ids[None, :PREFIX]), ids[None, PREFIX:512]
    changed = kv.clone()
    changed[1, 0] = through(uniform(subject.layout, 3), kv, subject.layout).kv[1, 0]
    exact, other = (torch.log_softmax(subject.read(rest, past)[0], -1) for past in (kv, changed))
    moved = (exact.exp() * (exact - other)).sum() / rest.shape[1]
    assert found[1, 0, :, 0].sum() == pytest.approx(float(moved), rel=1e-3)


def test_what_is_watched_is_what_the_model_does(ids: torch.Tensor) -> None:
    subject, text = Subject.of("tiny", tiny(), None), ids[None, : PREFIX + REST]
    kv = subject.prefix_kv(text[:, :PREFIX])
    plain, _ = subject.read(text[:, PREFIX:], kv)
    with watching(subject) as watch:
        watched, _ = subject.read(text[:, PREFIX:], kv)
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-4)

    subject.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = subject.model(input_ids=text, output_attentions=True).attentions
    for layer in range(3):
        of_heads = weights[layer][0].reshape(2, 2 * (PREFIX + REST), -1)  # the queries of a KV head are neighbours
        rows = [head * (PREFIX + REST) + PREFIX + at for head in range(2) for at in range(REST)]
        mean_square = of_heads[:, rows, :PREFIX].square().mean(dim=1)
        torch.testing.assert_close(watch.attention[layer][0], mean_square, rtol=1e-3, atol=1e-7)


def test_errors_are_weighted_as_stated(subject: Subject, ids: torch.Tensor) -> None:
    kv = subject.prefix_kv(ids[None, :PREFIX])
    with watching(subject) as watch:
        subject.read(ids[None, PREFIX : PREFIX + REST], kv)
    errors = torch.randn(2, 1, 2, PREFIX, 32, generator=torch.Generator().manual_seed(1))
    weighted = watch.weighted(1, errors)
    for head in range(2):
        key, value = errors[0, 0, head], errors[1, 0, head]
        moment, attention = watch.moments[1][head], watch.attention[1][0, head]
        logits = sum(error @ moment @ error for error in key)
        torch.testing.assert_close(weighted[0, head], logits, rtol=1e-4, atol=0)
        read = (attention * value.square().sum(-1)).sum()
        torch.testing.assert_close(weighted[1, head], read, rtol=1e-4, atol=0)


def test_attention_is_put_back_whatever_happens(subject: Subject) -> None:
    before = subject.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), watching(subject):
        raise ZeroDivisionError
    assert subject.model.config._attn_implementation == before


def test_a_model_that_was_not_seen_is_refused(subject: Subject) -> None:
    with pytest.raises(UnsupportedError, match="layers"), watching(subject):
        pass


def test_what_calibration_chose_beats_the_same_bytes_chosen_badly(
    subject: Subject, ids: torch.Tensor, found: np.ndarray
) -> None:
    def kl(chosen: np.ndarray) -> float:
        shape = subject.layout.layers, 2, subject.layout.kv_heads, subject.layout.head_dim
        codec = AdaptiveCodec(Calibration(VERSION, "", *shape, 3.5, chosen.tolist(), found.tolist()))
        asked = {"contexts": [512], "windows": 4, "new_tokens": 1, "say": lambda _: None}
        return list(measure.rows(subject, ids, {"adaptive": codec}, **asked))[1].kl

    best = allocate(found, 3.5)
    worst = allocate(1 / found[..., ::-1], 3.5)
    assert best.sum() <= 3.5 * best.size
    assert kl(best) < kl(worst)
