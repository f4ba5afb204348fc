"""Pages on a device: what is checked before a kernel may follow an address."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_pages import POOL_PAGES, Engine

from lmpipe.cuda.pages import DevicePages
from lmpipe.layout import KVLayout

LAYOUT = KVLayout.paged(1, 2, 16, "bfloat16", 4)


def planes(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Of bf16."""
    return [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]


def test_planes_are_checked() -> None:
    good = (5, 4, 2, 16)
    assert DevicePages.of(LAYOUT, planes(good, good)).pages == 5
    with pytest.raises(ValueError, match="3 planes given, the layout has 2"):
        DevicePages.of(LAYOUT, planes(good, good, good))
    with pytest.raises(ValueError, match="plane 1 must have pages of 256 bytes"):
        DevicePages.of(LAYOUT, planes(good, (5, 4, 2, 8)))
    with pytest.raises(ValueError, match="plane 1 must have as many pages"):
        DevicePages.of(LAYOUT, planes(good, (6, 4, 2, 16)))
    with pytest.raises(ValueError, match="plane 0 must have pages of 256 bytes without gaps"):
        DevicePages.of(LAYOUT, [plane[..., ::2] for plane in planes((5, 4, 2, 32), (5, 4, 2, 32))])


@pytest.mark.parametrize("page_id", [-2, POOL_PAGES])
def test_page_ids_are_checked(page_id: int, device: torch.device) -> None:
    pages = Engine.of(LAYOUT, 2, device).pages
    with pytest.raises(ValueError, match="page ids must be -1 to"):
        pages.ids(np.array([0, page_id], np.int32))


def test_alignment_is_that_of_every_address() -> None:
    memory = torch.zeros(5 * 1024 + 16, dtype=torch.uint8)
    start = -memory.data_ptr() % 16
    aligned = memory[start : start + 5 * 1024].view(5, 2, 512)[:, :, :256]
    assert DevicePages.of(LAYOUT, [aligned[:, 0], aligned[:, 1]]).alignment == 16
    odd = memory[start + 4 : start + 4 + 5 * 1000].view(5, 2, 500)[:, :, :256]
    assert DevicePages.of(LAYOUT, [odd[:, 0], odd[:, 1]]).alignment == 4
