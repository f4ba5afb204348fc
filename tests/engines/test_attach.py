"""Switching on and off, the registry, and a node that is absent, dies and comes back."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest

from lmpipe import engines
from lmpipe.engines import AttachOptions, RequestInfo
from lmpipe.engines.transformers import TransformersEngine
from lmpipe.errors import UnsupportedError
from lmpipe.rundir import default_parent
from lmpipe.testing import Node
from tests.engines.conftest import Attach
from tests.engines.tiny import CHUNK, build, greedy, prompt_of


class FakeAttachment:
    """An engine that is nothing but its options."""

    last: RequestInfo | None = None
    producer = None

    def __init__(self, run_dir: Path, options: AttachOptions) -> None:
        self.run_dir, self.options = run_dir, options


class FakeEngine:
    def claims(self, model: object) -> bool:
        return model == "a fake"

    def attach(self, model: object, run_dir: Path, options: AttachOptions) -> Any:
        return FakeAttachment(run_dir, options)


def test_the_entry_point_is_found() -> None:
    assert isinstance(engines.adapters()["transformers"](), TransformersEngine)


def test_registered_adapters_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_registered", {})
    engines.register("fake", FakeEngine)
    made: Any = engines.attach("a fake", "some-node", tenant="t", min_tokens=3)
    assert made.run_dir == default_parent() / "some-node"
    assert made.options == AttachOptions(tenant="t", min_tokens=3)


@pytest.mark.parametrize(
    ("node", "expected"),
    [(None, default_parent() / "local"), ("x", default_parent() / "x"), ("/a/b", Path("/a/b")), (Path("c"), Path("c"))],
)
def test_nodes_by_name_and_path(node: Any, expected: Path) -> None:
    assert engines.run_dir_of(node) == expected


def test_an_unknown_object_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"builtins\.int"):
        engines.attach(3)


def test_an_adapter_without_its_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise ImportError("No module named 'engine_x'")

    monkeypatch.setattr(engines, "_registered", {"x": absent})
    with pytest.raises(UnsupportedError, match=r"not importable: x \(No module named 'engine_x'\)"):
        engines.attach(object())


def test_detaching_gives_generate_back(attached: Attach) -> None:
    model = build("llama")
    before = model.generate
    attachment = attached(model)
    assert model.generate != before
    with pytest.raises(UnsupportedError, match="already"):
        attached(model)
    attachment.detach()
    assert model.generate == before
    attachment.detach()


def test_a_copy_of_the_model_is_not_attached(attached: Attach) -> None:
    model, ids = build("llama"), prompt_of(40)
    attachment = attached(model)
    other = copy.deepcopy(model)
    assert other.generate.__self__ is other
    assert greedy(other, ids) == greedy(model, ids)
    assert attachment.stats()["generate_requests"] == 1


def test_the_adapter_sees_through_a_wrapper(attached: Attach) -> None:
    class Wrapper:
        def __init__(self, model: Any) -> None:
            self.model = model

        def get_base_model(self) -> Any:
            return self.model

    model = build("llama")
    assert attached(Wrapper(model)).model is model


def test_arguments_by_position(attached: Attach) -> None:
    model, ids = build("llama"), prompt_of(40)
    right = model.generate(ids, model.generation_config, max_new_tokens=5).tolist()
    attachment = attached(model, on_unsupported="raise")
    for _ in range(2):
        assert model.generate(ids, model.generation_config, max_new_tokens=5).tolist() == right
        assert attachment.flush(20)
    assert attachment.last.hit_tokens == 32
    assert model.generate(input_ids=ids, max_new_tokens=5).tolist() == right
    assert attachment.last.hit_tokens == 32


def test_several_threads(attached: Attach) -> None:
    model = build("llama")
    prompts = [prompt_of(50 + seed, seed) for seed in range(4)]
    right = [greedy(model, ids) for ids in prompts]
    attachment = attached(model)
    got: list[Any] = [None] * len(prompts)

    def run(index: int) -> None:
        got[index] = [greedy(model, prompts[index]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[answer] * 3 for answer in right]
    assert attachment.stats()["generate_requests"] == 12


def test_an_absent_node_is_a_miss(tmp_path: Path) -> None:
    model, ids = build("llama"), prompt_of(40)
    right = greedy(model, ids)
    attachment: Any = engines.attach(model, tmp_path / "nobody")
    assert greedy(model, ids) == right
    assert attachment.last.reason == "lmpipe absent"
    attachment.detach()


def test_trouble_in_the_producer_is_a_miss(attached: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), prompt_of(40)
    right = greedy(model, ids)
    attachment = attached(model)
    greedy(model, ids)
    assert attachment.flush(20)
    for verb in ("load", "lookup", "save", "prompt"):

        def fail(*_: object, **__: object) -> Any:
            raise OSError("the sky fell")

        monkeypatch.setattr(attachment.producer, verb, fail)
        assert greedy(model, ids) == right
    assert attachment.stats()["generate_trouble"] >= 4


def test_a_killed_node_costs_nothing() -> None:
    """The engine goes on while lmpipe is dead, with the DRAM tier in its own maps, and after the restart."""
    model, ids = build("llama"), prompt_of(50)
    right = greedy(model, ids)
    with Node({"tiers": {"ssd": None}, "chunk_tokens": CHUNK}) as node:
        attachment: Any = engines.attach(model, node.run_dir)
        assert attachment.wait_ready(20)
        assert greedy(model, ids) == right
        assert attachment.flush(20)
        node.kill("all")
        for _ in range(3):
            assert greedy(model, ids) == right
        waited = threading.Event()
        while attachment.producer.state == "ready":
            waited.wait(0.02)
        assert greedy(model, ids) == right
        assert attachment.last.hit_tokens == 48
        node.start()
        assert attachment.wait_ready(30)
        assert greedy(model, ids) == right
        assert attachment.last.hit_tokens == 48
        attachment.detach()
