"""Damaged input of every kind is read or refused by name; `make fuzz` feeds a million of them."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
import pytest
import targets

from lmpipe.errors import FormatError

COUNT = 8000


@pytest.mark.parametrize("name", targets.TARGETS)
def test_damaged_input_is_read_or_refused_by_name(name: str) -> None:
    outcome = fuzz.feed(name, seed=2, first=0, count=fuzz.shares(COUNT)[name])
    assert not outcome.problem
    silent = (targets.Notes.name, targets.IndexRows.name, targets.SlotHeaders.name)
    assert (outcome.refused > 0) is (name not in silent), "these make of nonsense that there is nothing"
    assert outcome.taken > 0, "some damage is none"


class Broken(targets.Target):
    """A reader with a defect, as each of these once had."""

    name, refusals = "broken", FormatError

    def damaged(self, draw: random.Random) -> int:
        return draw.randrange(10)

    def read(self, data: int) -> None:
        if data == 7:
            raise KeyError(data)
        if data == 8:
            raise FormatError("")


def test_a_reader_with_a_defect_is_found_and_the_input_can_be_had_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets.TARGETS, "broken", Broken)
    outcome = fuzz.feed("broken", seed=1, first=0, count=1000)
    number = outcome.taken + outcome.refused
    assert fuzz.command("broken", 1, number) in outcome.problem
    again = fuzz.feed("broken", seed=1, first=number, count=1)
    assert again.problem.splitlines()[-1] == outcome.problem.splitlines()[-1]


def test_the_same_seed_and_number_give_the_same_input(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    target = targets.Frames(tmp_path)
    numbered = dict(targets.inputs(target, 5, 0, 20))
    assert dict(targets.inputs(target, 5, 13, 1)) == {13: numbered[13]}
    assert dict(targets.inputs(target, 6, 0, 20)) != numbered
