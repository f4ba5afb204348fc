"""KV that has lost something, in vLLM: who asks for exact KV computes on none, not even out of vLLM's own cache.

Pages on CPUs are opaque, so no codec loses anything here. What is saved is declared to have lost, and made worse than
any codec would make it: who computes on it gives other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cached import CHUNK, ask, connector, producers, ready, scramble, settled, tiers, tokens
from harness import Engine, greedy
from processes import EngineProcess

from lmpipe.handles import Fidelity
from lmpipe.producer import Producer, SaveTicket
from lmpipe.testing import Node

EXACT: dict[str, Any] = {"extra_args": {"kv_transfer_params": {"lmpipe.exact": True}}}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tiers(tmp_path_factory.mktemp("tiers"))) as node:
        yield node


@pytest.fixture
def engine(node: Node, llama: Path) -> Iterator[Engine]:
    with Engine(llama, connector(node)) as engine:
        yield ready(engine)


def saved(engine: Engine, prompt: list[int], *, exact: bool) -> int:
    """Chunks of a prompt that can be found."""
    worker = producers(engine)[1]
    with worker.lookup(worker.prompt(prompt), exact=exact) as found:
        return found.chunks


def save_worse(engine: Engine, prompt: list[int], patch: pytest.MonkeyPatch) -> None:
    """Compute a prompt and save something else for it, as the work of a codec."""
    save = Producer.save

    def worse(self: Producer, *what: Any, **how: Any) -> SaveTicket:
        return save(self, *what, **how | {"fidelity": Fidelity.INT4H})

    with patch.context() as context:
        context.setattr(Producer, "save", worse)
        ask(engine, [prompt], 1)
        settled(engine)
    scramble(engine, prompt)
    assert engine.reset_prefix_cache()
    assert saved(engine, prompt, exact=False) == len(prompt) // CHUNK and saved(engine, prompt, exact=True) == 0


def test_exact_requests_beside_others(engine: Engine, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokens(6 * CHUNK + 5)
    wanted = plain.generate([prompt], 8)
    save_worse(engine, prompt[: 2 * CHUNK], monkeypatch)

    got, cached = ask(engine, [prompt], 8)
    assert cached == [2 * CHUNK] and got != wanted
    settled(engine)
    assert saved(engine, prompt, exact=False) == 6 and saved(engine, prompt, exact=True) == 0
    got, cached = ask(engine, [prompt], 8)
    assert cached[0] > 5 * CHUNK and got != wanted, "vLLM's own cache has all of it, none of it exact"

    assert ask(engine, [prompt], 8, **EXACT) == (wanted, [0])
    settled(engine)
    assert saved(engine, prompt, exact=True) == 6, "computed on nothing but its own"
    got, cached = ask(engine, [prompt], 8, **EXACT)
    assert got == wanted and cached[0] > 5 * CHUNK, "out of the part of vLLM's cache that is exact"

    longer = prompt + tokens(2 * CHUNK)
    assert ask(engine, [longer], 1)[1][0] > 5 * CHUNK
    settled(engine)
    assert saved(engine, longer, exact=False) == 8 and saved(engine, longer, exact=True) == 6, "who knows which blocks"

    assert engine.reset_prefix_cache()
    assert ask(engine, [prompt], 8, **EXACT) == (wanted, [6 * CHUNK]), "loaded, exactly"
    fresh = tokens(3 * CHUNK)
    ask(engine, [fresh], 1)
    settled(engine)
    assert saved(engine, fresh, exact=True) == 3, "what was computed from its start on is as exact as ever"


def test_an_exact_request_that_waits_while_others_load(
    engine: Engine, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had arrived before vLLM's cache got what is not exact."""
    prompt = tokens(4 * CHUNK + 5)
    (wanted,) = plain.generate([prompt], 8)
    save_worse(engine, prompt[: 2 * CHUNK], monkeypatch)
    names = [engine.add_request(prompt, 8, **how) for how in ({}, EXACT, {}, EXACT)]
    got = engine.drain()
    assert [got[name] == wanted for name in names] == [False, True, False, True]
    settled(engine)
    assert saved(engine, prompt, exact=True) == 4


def test_an_engine_that_is_exact(
    node: Node, llama: Path, plain: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(4 * CHUNK + 5)
    wanted = plain.generate([prompt], 8)
    with Engine(llama, connector(node)) as engine:
        save_worse(ready(engine), prompt, monkeypatch)
    with Engine(llama, connector(node, exact=True)) as engine:
        ready(engine)
        for cached in (0, 4 * CHUNK):
            assert ask(engine, [prompt], 8) == (wanted, [cached])
            settled(engine)
            assert engine.reset_prefix_cache()


def test_a_salt_stays_what_it_was(engine: Engine) -> None:
    """Apart in vLLM's cache, exact requests have the keys that they would have."""
    prompt = tokens(2 * CHUNK)
    request = {"prompt_token_ids": prompt, "cache_salt": "pepper"}
    engine.llm.generate([request], greedy(1, detokenize=False, **EXACT), use_tqdm=False)
    settled(engine)
    worker = producers(engine)[1]
    with worker.lookup(worker.prompt(prompt, cache_salt="pepper"), exact=True) as found:
        assert found.chunks == 2
