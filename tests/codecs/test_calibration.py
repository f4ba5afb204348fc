"""The calibration file, and the greedy allocation."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_samples import calibration, layout_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe.codecs.calibration import BITS, allocate, read, write
from lmpipe.errors import FormatError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    given = calibration(layout_of())
    write(tmp_path / "c.json", given)
    assert read(tmp_path / "c.json") == given
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    assert given.table == bytes(np.array(given.bits, np.uint8).ravel())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "version: 2"),
        ({"layers": 0}, r"\.layers"),
        ({"kv": 3}, r"\.kv"),
        ({"budget_bits": 2.0}, r"budget_bits"),
        ({"surprise": 1}, "surprise"),
        ({"model": 5}, r"\.model"),
        ({"layers": 4}, "bits: 3 layers where 4"),
        ({"heads": 1}, r"bits\[0\]\[0\]: 2 heads where 1"),
        ({"bits": [[[3, 5], [3, 3]]] * 3}, r"bits\[0\]\[0\]\[1\]: 5"),
        ({"bits": [[[3, 3]]] * 3}, r"bits\[0\]: 1 entries"),
        ({"distortions": [[[[0, 0], [0, 0, 0]]] * 2] * 3}, r"distortions\[0\]\[0\]\[0\]"),
        ({"distortions": [[[[0, 0, -1]] * 2] * 2] * 3}, "distortions"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = tmp_path / "c.json"
    write(path, calibration(layout_of()))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=rf"c\.json: .*{problem}"):
        read(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damage_is_a_format_error_or_a_calibration(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    write(path, calibration(layout_of()))
    text = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    else:
        text = bytearray(data.draw(st.binary(max_size=80)))
    path.write_bytes(text)
    try:
        found = read(path)
    except FormatError as error:
        assert "c.json" in str(error)
        return
    assert len(found.table) == found.layers * found.kv * found.heads and set(found.table) <= set(BITS)


def test_a_contradiction_is_not_written(tmp_path: Path) -> None:
    wrong = json.loads('{"layers": 1}')
    good = calibration(layout_of())
    with pytest.raises(FormatError, match="layers"):
        write(tmp_path / "c.json", type(good)(**{f: getattr(good, f) for f in good.__struct_fields__} | wrong))
    assert not list(tmp_path.iterdir())


@settings(max_examples=80, deadline=None)
@given(
    cells=st.integers(1, 5),
    seed=st.integers(0, 1 << 32),
    budget=st.floats(3, 8),
)
def test_allocation_keeps_the_budget_and_is_near_the_best(cells: int, seed: int, budget: float) -> None:
    """Greedy on convex distortions is the best for what it spends; against all choices it may lose one step."""
    rng = np.random.default_rng(seed)
    scale = np.exp(2 * rng.normal(size=(1, 1, cells, 1)))
    distortions = scale * 4.0 ** -np.array(BITS)
    bits = allocate(distortions, budget)
    assert bits.shape == (1, 1, cells) and set(bits.ravel().tolist()) <= set(BITS)
    spent = int(bits.sum())
    assert spent <= budget * cells + 1e-6

    def lost(chosen: tuple[int, ...]) -> float:
        return sum(distortions[0, 0, i, BITS.index(b)] for i, b in enumerate(chosen))

    own = lost(tuple(bits.ravel().tolist()))
    assert own <= lost((3,) * cells)
    best = min(lost(chosen) for chosen in product(BITS, repeat=cells) if sum(chosen) <= spent)
    assert own <= best * (1 + 1e-9) + max(distortions[0, 0, :, 0].max() - 0, 0)


def test_the_most_is_saved_first() -> None:
    distortions = np.array([[[[9.0, 1.0, 0.5]], [[2.0, 1.0, 0.0]]]])
    assert allocate(distortions, 3.0).tolist() == [[[3], [3]]]
    assert allocate(distortions, 3.5).tolist() == [[[4], [3]]]
    assert allocate(distortions, 4.0).tolist() == [[[4], [4]]]
    assert allocate(distortions, 8.0).tolist() == [[[8], [8]]]
    assert allocate(np.zeros((1, 1, 2, 3)), 8.0).tolist() == [[[3, 3]]], "nothing is gained by more"
    with pytest.raises(ValueError, match=r"2\.9 bits"):
        allocate(distortions, 2.9)
