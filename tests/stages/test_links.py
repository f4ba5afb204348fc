"""What stages say to their neighbours, in queues that do not stand in each other's way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lmpipe import messages as m
from lmpipe.bus import Channel, Peer
from lmpipe.handles import SessionId
from lmpipe.stages.base import Context
from lmpipe.stages.links import LIMIT, Links

ME = SessionId(1)


class Wire:
    """The part of a context that `Links` uses; peers and channels of `shut` take nothing."""

    chain: Mapping[str, SessionId] = {"below": SessionId(2)}

    def __init__(self) -> None:
        self.shut: set[object] = set()
        self.sent: list[tuple[object, m.Message]] = []

    def reply(self, peer: Peer, message: m.Message) -> bool:
        return self._take(peer, message)

    def down(self, channel: Channel, message: m.Message) -> bool:
        return self._take(channel, message)

    def _take(self, to: object, message: m.Message) -> bool:
        if to not in self.shut:
            self.sent.append((to, message))
        return to not in self.shut


def links() -> tuple[Links, Wire]:
    wire = Wire()
    return Links(cast("Context", cast(Any, wire))), wire


def word(number: int) -> m.Message:
    return m.Invalidated(ME, number, 0)


def test_an_answer_for_who_is_gone_holds_up_nothing_that_another_waits_for() -> None:
    """Of a gather that died with a load open: its successor has saves, and no loads for a while."""
    line, wire = links()
    former, load, save = Peer("load", b"1"), Peer("load", b"3"), Peer("save", b"2")
    line.heard(former)
    line.heard(save)
    wire.shut.add(former)
    line.up("load", word(1))
    line.up("save", word(2))
    assert wire.sent == [(save, word(2))]
    line.heard(load)
    line.pump()
    line.up("load", word(3))
    assert wire.sent == [(save, word(2)), (load, word(3))], "what was the former one's is dropped"
    assert line.clear


def test_a_stage_that_reads_no_saves_now_is_told_of_loads() -> None:
    line, wire = links()
    wire.shut.add("save")
    line.down("save", word(1))
    line.down("load", word(2))
    line.down("save", word(3))
    assert wire.sent == [("load", word(2))]
    wire.shut.clear()
    line.pump()
    assert wire.sent[1:] == [("save", word(1)), ("save", word(3))]


def test_more_than_anybody_reads_is_given_up_oldest_first() -> None:
    line, wire = links()
    wire.shut.add("save")
    for number in range(LIMIT + 2):
        line.down("save", word(number))
    assert line.crowded
    wire.shut.clear()
    line.pump()
    assert [message for _, message in wire.sent] == [word(number) for number in range(2, LIMIT + 2)]
    assert not line.crowded
