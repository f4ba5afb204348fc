"""transformers with its KV moved by kernels, on a real node: the tokens are those of a run without a cache.

Without `--gpu` the model is on the CPU, and Triton interprets.
"""

from __future__ import annotations

import ast
import logging
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_runtime import FakeRuntime
from rig import counters, until

import lmpipe
from lmpipe.cli import main
from lmpipe.cuda.engine import EnginePages
from lmpipe.engines import AttachOptions, transformers_device
from lmpipe.engines.transformers import TransformersAttachment, TransformersEngine
from lmpipe.engines.transformers_cache import CacheShape
from lmpipe.engines.transformers_device import DeviceMemory
from lmpipe.engines.transformers_memory import LoadTensors, page_ids
from lmpipe.engines.transformers_producers import KERNEL_DEVICES, _device_of
from lmpipe.errors import DeviceError
from lmpipe.handles import Fidelity, Tier
from lmpipe.testing import Node
from tests.engines.tiny import CHUNK, PAD, build, greedy, prompt_of

PACKAGE = Path(lmpipe.__file__).parent
KERNELS = frozenset({"cpu", "cuda"})
TOKENS = 70
WHOLE = TOKENS // CHUNK * CHUNK


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node({"chunk_tokens": CHUNK}) as node:
        yield node


@pytest.fixture(scope="module")
def model(device: torch.device) -> Any:
    if device.type == "cuda":
        pytest.importorskip("cupy")
    return build("llama", num_hidden_layers=2, head_dim=64).to(device)  # a chunk that split makes a page smaller


@pytest.fixture
def attached(node: Node, model: Any, request: pytest.FixtureRequest) -> Iterator[TransformersAttachment]:
    """Apart from every other test."""
    options = AttachOptions(cache_salt=request.node.nodeid, on_unsupported="raise", save_answers=False)
    with TransformersEngine(KERNELS).attach(model, node.run_dir, options) as attachment:
        assert attachment.producer is not None and attachment.producer.wait_ready(20)
        yield attachment


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernels' pools were asked to do."""
    calls: list[str] = []
    for name in ("save", "load", "decode"):
        method = getattr(EnginePages, name)

        def watched(*args: Any, name: str = name, method: Any = method) -> Any:
            calls.append(name)
            return method(*args)

        monkeypatch.setattr(EnginePages, name, watched)
    return calls


def prompt(model: Any, tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    return prompt_of(tokens, seed).to(model.device)


def kv_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the prompt, `[layers, 2, heads, tokens, dims]`."""
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    layers = model.generate(ids, **options).past_key_values.layers
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers])


def test_from_dram(model: Any, attached: TransformersAttachment, by_kernels: list[str]) -> None:
    ids = prompt(model)
    right = greedy(model, ids)
    assert attached.flush(20) and by_kernels == ["save"] * len(by_kernels)
    cold = kv_of(model, prompt(model, seed=2))
    assert attached.flush(20)
    by_kernels.clear()
    warm = kv_of(model, prompt(model, seed=2))
    assert torch.equal(cold[..., :WHOLE, :], warm[..., :WHOLE, :]), "bit by bit"
    assert greedy(model, ids) == right and by_kernels == ["load", "load"]
    assert attached.last is not None and attached.last.hit_by_tier == {Tier.DRAM: WHOLE}


@pytest.mark.parametrize(("codec", "fidelity"), [("split", Fidelity.EXACT), ("int4h", Fidelity.INT4H)])
def test_from_encoded_dram(
    codec: str, fidelity: int, model: Any, node: Node, attached: TransformersAttachment, by_kernels: list[str]
) -> None:
    ids = prompt(model, WHOLE)  # the last token is computed: one page of the last chunk is left out
    right = greedy(model, ids)
    assert attached.flush(20) and attached.producer is not None
    before = counters(node)["gather_dram_encoded_chunks"]
    arguments = ["compress", str(node.run_dir), f"--codec={codec}", f"--namespace={attached.producer.namespace.hex()}"]
    assert main(arguments) == 0
    until(lambda: counters(node)["gather_dram_encoded_chunks"] - before == WHOLE // CHUNK, "they are encoded")
    by_kernels.clear()
    warm = greedy(model, ids)
    assert attached.last is not None and attached.last.hit_tokens == WHOLE - 1 and by_kernels == ["decode"]
    assert attached.last.fidelity == fidelity
    assert fidelity != Fidelity.EXACT or warm == right


def test_from_ssd(model: Any, node: Node, attached: TransformersAttachment, by_kernels: list[str]) -> None:
    ids = prompt(model)
    right, producer = greedy(model, ids), attached.producer
    assert attached.flush(20) and producer is not None
    assert producer.flush(producer.prompt(ids[0, :WHOLE].cpu().numpy()), tiers=[Tier.SSD])
    assert main(["clear", str(node.run_dir), "--tier=dram"]) == 0
    by_kernels.clear()
    assert greedy(model, ids) == right
    assert attached.last is not None and attached.last.hit_by_tier == {Tier.SSD: WHOLE}
    assert by_kernels and "save" not in by_kernels


def test_a_batch_with_left_padding_and_beams(
    model: Any, attached: TransformersAttachment, by_kernels: list[str]
) -> None:
    ids = prompt_of(TOKENS, seed=3, rows=2)
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = PAD, 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    right = greedy(model, ids, attention_mask=mask)
    assert attached.flush(20)
    assert greedy(model, ids, attention_mask=mask) == right
    assert attached.last is not None and attached.last.hit_tokens == 7 + 48 + 48  # columns that both rows have
    by_kernels.clear()
    beams = greedy(model, ids, attention_mask=mask, num_beams=2, lmpipe_exact=True)
    assert attached.last.hit_tokens == 7 + 48 + 48 and by_kernels[:2] == ["load", "load"]
    attached.detach()
    assert greedy(model, ids, attention_mask=mask, num_beams=2) == beams


def test_answers_are_saved_from_slices(model: Any, node: Node, request: pytest.FixtureRequest) -> None:
    """What is saved begins in the middle of tensors, whose rows are longer than what is saved of them."""
    options = AttachOptions(cache_salt=request.node.nodeid)
    with TransformersEngine(KERNELS).attach(model, node.run_dir, options) as attachment:
        assert attachment.producer is not None and attachment.producer.wait_ready(20)
        ids = prompt(model, tokens=40)
        answer = greedy(model, ids, 24)
        assert attachment.flush(20)
        again = torch.cat([ids, torch.tensor(answer, device=model.device), prompt(model, 9, seed=5)], 1)
        warm = greedy(model, again)
        assert attachment.last is not None and attachment.last.hit_tokens == 48
    assert greedy(model, again) == warm


def test_wrong_pages_are_noticed(model: Any, attached: TransformersAttachment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a page beside the right one gives other tokens."""
    ids = prompt(model)
    right = greedy(model, ids)
    assert attached.flush(20)
    pool = DeviceMemory.pool
    monkeypatch.setattr(
        DeviceMemory,
        "pool",
        lambda self, layers, row, first, last, writable: pool(self, layers[::-1], row, first, last, writable=writable),
    )
    assert greedy(model, ids) != right
    assert attached.last is not None and attached.last.hit_tokens == WHOLE


def test_tensors_whose_tokens_lie_apart(model: Any, attached: TransformersAttachment) -> None:
    """Saved by way of a copy: heads and tokens in another order, and in some tensors only."""
    opened = attached._producers.current()
    shape = opened.shape
    straight = [torch.randn(1, shape.kv_heads, CHUNK, shape.head_dim, device=model.device) for _ in range(2)]
    turned = straight[1].transpose(1, 2).contiguous().transpose(1, 2)
    layers = [(straight[0], turned)] * shape.layers
    pool = opened.memory.pool(layers, 0, 3, 7, writable=False)
    assert pool.pages == 4
    slot = bytearray(4 * pool.bytes_per_page)
    assert isinstance(pool, EnginePages)
    pool.save(page_ids(1, 4, 0, 4), [memoryview(slot)], pool.mark())
    wanted = torch.stack([torch.stack([tensor[0, :, 3:7] for tensor in pair]) for pair in layers])
    assert bytes(slot) == wanted.cpu().numpy().tobytes()


def test_generate_waits_for_saves_that_hold_memory_the_next_one_needs(
    model: Any, attached: TransformersAttachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceMemory, "has_room", lambda self, nbytes: False)
    greedy(model, prompt(model))
    assert all(ticket.copied.is_set() for ticket in attached._tickets) and attached._tickets
    assert attached.flush(20)
    greedy(model, prompt(model))
    assert attached.last is not None and attached.last.hit_tokens == WHOLE, "waited for, not cancelled"


def test_memory_is_let_go_when_it_is_copied(
    model: Any, attached: TransformersAttachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[weakref.ref[Any]] = []
    pool = DeviceMemory.pool

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        made = pool(self, *args, **options)
        pools.append(weakref.ref(made))
        return made

    monkeypatch.setattr(DeviceMemory, "pool", watched)
    for _ in range(2):
        greedy(model, prompt(model))
        assert attached.flush(20)
    assert len(pools) == 2
    until(lambda: not any(made() for made in pools), "nobody has a save's or a load's tensors")


def test_load_tensors_lie_on_the_device(model: Any, attached: TransformersAttachment) -> None:
    opened = attached._producers.current()
    tensors = LoadTensors(opened.shape, opened.memory, 1, CHUNK)
    assert isinstance(tensors.pool(0), EnginePages) and tensors._layers[0][0].device == opened.shape.devices[0]


def test_what_kernels_cannot_do_goes_through_the_host(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*devices: str) -> str:
        caplog.clear()
        shape = CacheShape(1, 8, torch.float32, tuple(map(torch.device, devices)))
        with caplog.at_level(logging.WARNING):
            assert _device_of(shape, KERNEL_DEVICES, tmp_path) is None
        return caplog.text

    assert not said("cpu", "cpu")
    assert "the KV on cuda:0, cuda:1 goes through memory of the host: the layers" in said("cuda:0", "cuda:1")
    assert "the KV on mps goes through memory of the host: there are no kernels" in said("mps")
    monkeypatch.setitem(sys.modules, "lmpipe.cuda.cupy_runtime", None)
    assert "pip install 'lmpipe[gpu]'" in said("cuda:0", "cuda:0")
    lost = ModuleType("cupy_runtime")
    vars(lost)["open_device"] = refused
    monkeypatch.setitem(sys.modules, "lmpipe.cuda.cupy_runtime", lost)
    assert "goes through memory of the host: no driver" in said("cuda:0")


def refused(name: str) -> None:
    """A driver that does not answer."""
    raise DeviceError("no driver")


def test_only_a_model_on_a_gpu_loads_anything_of_cuda() -> None:
    """What the adapter imports, and what that imports, as far as it is done without being asked for."""
    seen, left = set[Path](), [PACKAGE / "engines" / "transformers.py"]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("lmpipe"):
                base = PACKAGE.joinpath(*statement.module.split(".")[1:])
                there = [base, *(base / name.name for name in statement.names)]
                left += [
                    file for each in there for file in (each.with_suffix(".py"), each / "__init__.py") if file.exists()
                ]
    assert PACKAGE / "engines" / "transformers_producers.py" in seen
    assert not [path for path in seen if path.parent == PACKAGE / "cuda"]


def test_the_arena_is_pinned_while_the_model_is_attached(
    model: Any, node: Node, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime(tmp_path)
    monkeypatch.setattr(transformers_device, "_runtime", lambda device: runtime)
    options = AttachOptions(cache_salt=request.node.nodeid, save_answers=False)
    with TransformersEngine(KERNELS).attach(model, node.run_dir, options) as attachment:
        assert attachment.producer is not None and attachment.producer.wait_ready(20)
        assert not runtime.pinned_now
        greedy(model, prompt(model), 1)
        assert attachment.flush(20) and runtime.pinned_now
        greedy(model, prompt(model), 1)
        assert attachment.last is not None and attachment.last.hit_tokens == WHOLE
    assert not runtime.pinned_now
