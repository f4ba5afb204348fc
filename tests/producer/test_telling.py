"""What a producer tells: events, counters, refusals with their reasons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from rig import BIG, CALM, LAYOUT, WAIT_S, Engine, until, until_whole

from lmpipe import producer as producer_module
from lmpipe.engines.paged import PagedEngine
from lmpipe.errors import LayoutError
from lmpipe.handles import Tier
from lmpipe.keys import Extra, UnsupportedError
from lmpipe.producer import Producer
from lmpipe.shm.counters import Counters
from lmpipe.testing import Node

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """DRAM, for 64 chunks, and SSD."""
    changes = {**CALM, "tiers": {"dram": {"capacity": "1MiB", "slots": 64}}}
    with Node(changes) as node:
        until_whole(node)
        yield node


def test_events_tell_of_every_chunk(make_engine: Make, mapped: bool) -> None:
    engine = make_engine(mapped=mapped)
    told: dict[str, list[bytes]] = defaultdict(list)
    for event in ("saved", "persisted", "loaded", "evicted", "failed"):
        engine.producer.on(event, lambda name, records: told[name].extend(records["key"].tolist()))
    engine.producer.on("saved", lambda *_: 1 / 0)  # a user's mistake is the user's
    prompt = engine.prompt(1, 10)
    keys = [key.tobytes() for key in prompt.keys]
    assert engine.save(prompt).wait(0)
    until(lambda: sorted(told["persisted"]) == sorted(keys))
    assert sorted(told["saved"]) == sorted(keys)
    assert engine.load(prompt).chunks == 10
    assert told["loaded"] == keys
    dropped = 0
    for seed in range(2, 10):
        dropped += sum(engine.save(engine.prompt(seed, 10)).dropped.values())
    until(lambda: set(keys) <= set(told["evicted"]))
    ticket = engine.send(engine.prompt(11, 2), engine.prefill(engine.prompt(11, 2)))
    engine.producer.cancel(ticket)
    # Under pressure some find no room, some are evicted before a tier below took them; none of that was persisted.
    assert len(told["failed"]) >= dropped and not set(told["failed"]) & set(keys)
    with pytest.raises(ValueError, match="unknown event"):
        engine.producer.on("stored", print)


def test_a_failed_load_is_told(make_engine: Make) -> None:
    engine = make_engine()
    failed: list[bytes] = []
    engine.producer.on("failed", lambda _, records: failed.extend(records["key"].tolist()))
    prompt = engine.save_below(1, 4)
    result = engine.load(prompt, deadline_ms=0)
    assert failed == [key.tobytes() for key in prompt.keys[result.chunks :]]
    assert engine.producer.stats()["load_failed_chunks"] == 4 - result.chunks


def test_counters_are_published_where_status_reads_them(make_engine: Make, node: Node) -> None:
    engine = make_engine(name="counted")
    prompt = engine.prompt(1, 3)
    engine.save(prompt)
    engine.load(prompt)

    def published() -> bool:
        (path,) = node.paths.counters.glob("counted.*")
        counted = Counters.read(path)
        return counted["saved_chunks"] == 3 == counted["hit_chunks_dram"] and counted["lookups"] == 1

    until(published)


def test_counters_that_cannot_be_published_cost_nothing_else(make_engine: Make) -> None:
    engine = make_engine(name="a/b")  # no file can have this name
    prompt = engine.prompt(1, 3)
    assert engine.save(prompt).wait(0)
    assert engine.load(prompt).chunks == 3
    assert engine.producer.state == "ready"


def test_another_version_of_the_protocol_is_refused_with_the_reason(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer_module, "VERSION", 99)
    with Engine(node.run_dir) as engine:
        assert engine.producer.state == "refused"
        assert "99" in engine.producer.reason and "same lmpipe on both sides" in engine.producer.reason
        prompt = engine.prompt(1, 2)
        assert engine.found(prompt) == 0
        assert engine.save(prompt).dropped == {"lmpipe absent": 2}


def test_pages_of_another_layout_are_refused_with_the_reason(node: Node) -> None:
    with PagedEngine(BIG, 4, segment=node.directory / "big.shm") as memory:
        with Producer(node.run_dir, LAYOUT, model="test", pages=memory.source, wait_s=WAIT_S) as producer:
            assert producer.state == "refused"
            assert "pages: 64 planes, the layout has 4" in producer.reason
        source = memory.source
        assert source is not None
        short = replace(source, pages=source.pages + 1)
        with Producer(node.run_dir, BIG, model="test", pages=short, wait_s=WAIT_S) as producer:
            assert producer.state == "refused"
        gone = replace(source, segment="/dev/shm/no-such-pages")
        with Producer(node.run_dir, LAYOUT, model="test", pages=gone, wait_s=WAIT_S) as producer:
            assert producer.state == "refused"


def test_arguments_that_cannot_be_are_refused_at_once(node: Node) -> None:
    with pytest.raises(LayoutError, match="shard 2 is not one of 2"):
        Producer(node.run_dir, LAYOUT, model="test", shard=2, shards=2)
    with pytest.raises(LayoutError, match="does not divide"):
        Producer(node.run_dir, LAYOUT, model="test", chunk_tokens=17)


def test_what_cannot_be_keyed_is_not_cached(make_engine: Make) -> None:
    engine = make_engine()
    for wrong in ([-1, 2], [[1, 2]], [0.5], [2**32]):
        with pytest.raises(ValueError, match="token"):
            engine.producer.prompt(np.array(wrong))
    with pytest.raises(UnsupportedError, match="do not cache"):
        engine.producer.prompt([1] * 32, [Extra("prompt_embeds", 0, 4, b"x")])
    with_image = engine.producer.prompt(np.arange(32), [Extra("image", 3, 9, b"a")])
    ids = engine.prefill(with_image)
    assert engine.send(with_image, ids).wait(WAIT_S)
    assert engine.found(engine.producer.prompt(np.arange(32))) == 0
    assert engine.found(engine.producer.prompt(np.arange(32), [Extra("image", 3, 9, b"b")])) == 0
    assert engine.found(engine.producer.prompt(np.arange(32), [Extra("image", 3, 9, b"a")])) == 2


def test_invalidate_forgets_a_prompt_or_a_namespace_and_nothing_else(make_engine: Make) -> None:
    engine, other = make_engine(), make_engine(adapter="another")
    prompts = [engine.prompt(seed, 4) for seed in (1, 2)]
    foreign = other.prompt(1, 4)
    for by, prompt in ((engine, prompts[0]), (engine, prompts[1]), (other, foreign)):
        assert by.save(prompt).wait(0)
        assert by.producer.flush(prompt, tiers=("ssd",))
    assert engine.producer.invalidate(prompts[0]) == 8, "four rows in each of two tiers"
    assert [engine.found(prompt) for prompt in prompts] == [0, 4]
    assert engine.producer.invalidate() == 8
    assert [engine.found(prompt) for prompt in prompts] == [0, 0]
    assert other.load(foreign).chunks == 4
    assert engine.producer.invalidate() == 0
    assert engine.save(prompts[0]).saved == 4


def test_flush_waits_for_answers_and_for_tiers(make_engine: Make, mapped: bool) -> None:
    engine = make_engine(mapped=mapped)
    prompts = [engine.prompt(seed, 4) for seed in range(8)]
    tickets = [engine.send(prompt, engine.prefill(prompt)) for prompt in prompts]
    assert engine.producer.flush()
    assert all(ticket.wait(0) for ticket in tickets)
    assert engine.producer.flush(prompts[-1], tiers=(Tier.DRAM, "ssd"))
    engine.drop_from(prompts[-1], Tier.DRAM)
    assert not engine.producer.flush(prompts[-1], tiers=("dram",), timeout_s=0.05)
    assert not engine.producer.flush(engine.prompt(99, 1), tiers=("ssd",), timeout_s=0.05)
