"""Runs a test once per instruction-set level that this CPU has."""

from collections.abc import Iterator

import pytest

from lmpipe import native
from lmpipe.native import _native

LEVELS = str(native.features()["levels"]).split()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _native._set_level(request.param)
    yield request.param
    _native._set_level(LEVELS[-1])
