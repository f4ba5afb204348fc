"""The books of layouts and namespaces: what is entered is found by another process, what is damaged is not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lmpipe.books import LayoutBook, NamespaceBook
from lmpipe.layout import KVLayout
from lmpipe.rundir import RunDir

LAYOUTS = [
    KVLayout.dense(2, 4, 64, "float16"),
    KVLayout.paged(3, 8, 128, "bfloat16", 16, order="HND"),
    KVLayout(2, 1, 8, "uint8", 16, ("layer",), ("opaque",), opaque_page_bytes=4096, isa="amx"),
]


@pytest.fixture
def paths(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path)
    for directory in (made.layouts, made.namespaces):
        directory.mkdir()
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)
def test_a_layout_is_found_by_its_id(paths: RunDir, layout: KVLayout) -> None:
    reader = LayoutBook(paths)
    assert reader.find(layout.layout_id()) is None, "not yet"
    LayoutBook(paths).enter(layout)
    assert reader.find(layout.layout_id()) == layout
    paths.layout(layout.layout_id()).unlink()
    assert reader.find(layout.layout_id()) == layout, "remembered"


@pytest.mark.parametrize("damage", [b"", b"[]", b"7", b"{}", b'{"layers": 1}', b"\xff"])
def test_a_damaged_layout_is_none(paths: RunDir, damage: bytes) -> None:
    layout, other = LAYOUTS[:2]
    path = paths.layout(layout.layout_id())
    path.write_bytes(damage)
    assert LayoutBook(paths).find(layout.layout_id()) is None
    LayoutBook(paths).enter(other)
    path.write_bytes(paths.layout(other.layout_id()).read_bytes())
    assert LayoutBook(paths).find(layout.layout_id()) is None, "of another layout"


def test_tenants_of_namespaces(paths: RunDir) -> None:
    reader = NamespaceBook(paths)
    assert reader.tenant_of(2**64 - 1) == ""
    NamespaceBook(paths).enter(2**64 - 1, "ümlaut & co")
    assert reader.tenant_of(2**64 - 1) == "ümlaut & co" and reader.tenant_of(1) == ""


def test_many_threads_enter_the_same(paths: RunDir) -> None:
    start = threading.Barrier(8)

    def enter() -> None:
        book = NamespaceBook(paths)
        start.wait()
        for number in range(50):
            book.enter(number, "a tenant")

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {NamespaceBook(paths).tenant_of(number) for number in range(50)} == {"a tenant"}
    assert len(list(paths.namespaces.iterdir())) == 50, "nothing partial is left"


def test_no_room_is_no_trouble(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = RunDir(tmp_path / "gone")
    LayoutBook(paths).enter(LAYOUTS[0])
    NamespaceBook(paths).enter(1, "a")
    assert "cannot be written" in caplog.text
    assert LayoutBook(paths).find(LAYOUTS[0].layout_id()) is None and NamespaceBook(paths).tenant_of(1) == ""
