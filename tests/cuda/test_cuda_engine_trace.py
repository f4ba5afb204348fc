"""An engine's process beside the workers in the traces of a node that wants them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lmpipe.engines import AttachOptions
from lmpipe.engines.tracing import engine_spans
from lmpipe.engines.transformers import TransformersEngine
from lmpipe.spans import read_trace
from lmpipe.testing import Node
from tests.engines.tiny import CHUNK, build, greedy, prompt_of

KERNELS = frozenset({"cpu", "cuda"})


@pytest.mark.parametrize("traced", [True, False])
def test_what_kernels_move_for_transformers(traced: bool, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.importorskip("cupy")
    model = build("llama", num_hidden_layers=2, head_dim=64).to(device)
    prompt = prompt_of(2 * CHUNK + 1, 1).to(device)
    with Node({"chunk_tokens": CHUNK, "profile": {"trace": traced}}) as node:
        with TransformersEngine(KERNELS).attach(model, node.run_dir, AttachOptions(on_unsupported="raise")) as attached:
            for _ in range(2):
                greedy(model, prompt)
                assert attached.flush(20)
            assert attached.last is not None and attached.last.hit_tokens == 2 * CHUNK
        traces = node.paths.engine_traces()
        assert traces == ([node.paths.engine_trace(os.getpid())] if traced else [])
        events = [event for trace in traces for event in read_trace(trace)]
    if not traced:
        return
    named = {event["name"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named["process_name"] == f"engine {os.getpid()}"
    spans = {event["name"] for event in events if event["ph"] == "X"}
    assert {"gpu.save", "gather", "copy to host", "gpu.load", "copy from host", "scatter"} <= spans


def test_a_node_that_is_not_up_or_cannot_be_written_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spans = engine_spans(tmp_path)
    assert not spans.recording and not caplog.text
    spans.close()
    with Node({"profile": {"trace": True}}) as node:
        trace = node.paths.engine_trace(os.getpid())
        trace.mkdir()
        spans = engine_spans(node.run_dir)
        trace.rmdir()
    assert not spans.recording and "not in the node's traces" in caplog.text
    spans.close()
