"""Pinning in the background: in pieces, in order, undone at the end, and its limit explained."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from fake_runtime import FakeRuntime

from lmpipe import native
from lmpipe.cuda.pinned import Pinned

NBYTES = 10 * 4096


@pytest.fixture
def region() -> native.Region:
    memory = np.zeros(NBYTES, np.uint8)
    return native.Region(memory)


def test_in_pieces_and_undone(tmp_path: Path, region: native.Region, caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(tmp_path)
    with caplog.at_level(logging.INFO):
        pinned = Pinned(runtime, region, "arena", 3 * 4096)
        assert pinned.wait(10)
    assert (pinned.done_bytes, runtime.pinned_now) == (NBYTES, NBYTES)
    told = [record.getMessage() for record in caplog.records]
    assert 1 <= len(told) <= 4 and told[-1].startswith("arena: 0.00 of 0.00 GiB are pinned, after ")
    pinned.close()
    assert (pinned.done_bytes, runtime.pinned_now) == (0, 0)


def test_a_limit_leaves_the_rest(tmp_path: Path, region: native.Region, caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(tmp_path, pin_limit=7 * 4096)
    pinned = Pinned(runtime, region, "arena", 3 * 4096)
    assert not pinned.wait(10)
    assert pinned.done_bytes == 6 * 4096
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "ulimit -l unlimited" in said and "tiers.dram.capacity" in said
    pinned.close()
    assert not runtime.pinned_now


def test_a_lost_device_is_left_to_who_copies(tmp_path: Path, region: native.Region) -> None:
    runtime = FakeRuntime(tmp_path)
    runtime.fault()
    pinned = Pinned(runtime, region, "arena", 4096)
    assert not pinned.wait(10)
    pinned.close()
