"""The verbs that look at a running node or change it, and the exit status of each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmpipe import KVLayout, native
from lmpipe.cli import VERBS, main
from lmpipe.cli import nodes as cli_nodes
from lmpipe.rundir import RunDir
from lmpipe.testing import Node

Lmpipe = Callable[..., tuple[int, str, str]]
LAYOUT = KVLayout.paged(2, 2, 64, "bfloat16", 16)
CHUNKS = 4
TOKENS = list(range(CHUNKS * 16))


@pytest.fixture(scope="module")
def namespace(node: Node) -> str:
    """Of a prompt that is saved in the node."""
    producer = node.producer(LAYOUT, name="writer")
    pages = np.ones((LAYOUT.plane_count, CHUNKS * LAYOUT.page_bytes), np.uint8)
    planes = LAYOUT.plane_count
    each = np.full(planes, LAYOUT.page_bytes, np.uint64)
    starts = np.arange(planes, dtype=np.uint64) * np.uint64(CHUNKS * LAYOUT.page_bytes)
    region = native.Region(memoryview(pages).cast("B"))
    pool = native.PagePool([region], np.zeros(planes, np.uint32), starts, each, each, CHUNKS)
    prompt = producer.prompt(TOKENS)
    producer.save(prompt, pool, np.arange(CHUNKS, dtype=np.int32).reshape(CHUNKS, 1))
    assert producer.flush(prompt, timeout_s=20, tiers=("dram",))
    return producer.namespace.hex()


@pytest.mark.parametrize("argv", [["--help"], *([verb.__name__.rpartition(".")[2], "--help"] for verb in VERBS)])
def test_help_has_examples(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["upp"], ["up"], ["status", "--no-such"], ["clear", "--tier", "tape"]])
def test_wrong_usage(argv: list[str], lmpipe: Lmpipe) -> None:
    assert lmpipe(*argv)[0] == 2


def test_status_as_json(node: Node, lmpipe: Lmpipe, namespace: str) -> None:
    status, out, _ = lmpipe("status", "--run-dir", node.run_dir, "--json")
    seen = json.loads(out)
    assert status == 0
    assert (seen["name"], seen["state"], seen["supervisor_pid"]) == ("test", "ready", node.pid("supervisor"))
    assert [(p["name"], p["pid"], p["stages"]) for p in seen["processes"]] == [
        ("gather", node.pid("gather"), ["gather"])
    ]
    assert [(t["tier"], t["capacity_bytes"]) for t in seen["tiers"]] == [("dram", 32 << 20)]
    assert any(e["name"].startswith("writer") for e in seen["engines"])
    assert f"gather-{node.pid('gather')}" in seen["counters"]


def test_status_as_tables(node: Node, lmpipe: Lmpipe, namespace: str) -> None:
    status, out, _ = lmpipe("status", node.file, "--counters")
    assert status == 0
    assert f"test  ready  {node.run_dir}" in out
    for word in ("process", "tier", "engine", "gather_committed_chunks"):
        assert word in out


def test_lookup(node: Node, lmpipe: Lmpipe, namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps([*TOKENS, *range(40)]))
    status, out, _ = lmpipe("lookup", file, node.run_dir, "--namespace", namespace, "--json")
    assert status == 0
    answer = json.loads(out)
    assert (answer["tokens"], answer["hit_tokens"], answer["chunk_tokens"]) == (len(TOKENS) + 40, len(TOKENS), 16)
    run = {"tier": "dram", "first_chunk": 0, "chunks": CHUNKS, "bytes": CHUNKS * LAYOUT.chunk_bytes(16)}
    assert answer["runs"] == [run]
    status, out, _ = lmpipe("lookup", file, node.run_dir, "--namespace", namespace)
    assert status == 0
    assert f"{len(TOKENS)} of {len(TOKENS) + 40} tokens" in out


def test_lookup_of_what_is_not_there(node: Node, lmpipe: Lmpipe, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text("[1, 2, 3]")
    assert lmpipe("lookup", file, node.run_dir, "--namespace", "00" * 32)[0] == 1


@pytest.mark.parametrize(
    ("namespace", "tokens"), [("12", "[1]"), ("zz" * 32, "[1]"), ("00" * 32, "{}"), ("00" * 32, None)]
)
def test_lookup_of_nonsense(node: Node, lmpipe: Lmpipe, tmp_path: Path, namespace: str, tokens: str | None) -> None:
    file = tmp_path / "tokens.json"
    if tokens is not None:
        file.write_text(tokens)
    assert lmpipe("lookup", file, node.run_dir, "--namespace", namespace)[0] == 2


def test_compress_and_decompress(node: Node, lmpipe: Lmpipe, namespace: str) -> None:
    status, out, _ = lmpipe("compress", node.run_dir, "--codec", "split", "--namespace", namespace, "--json")
    answer = json.loads(out)
    raw_bytes = CHUNKS * LAYOUT.chunk_bytes(16)
    assert (status, answer["codec"], answer["recoded"], answer["left"]) == (0, "split", CHUNKS, {})
    assert answer["before_bytes"] == raw_bytes > answer["after_bytes"]
    assert lmpipe("compress", node.run_dir, "--namespace", "11" * 32)[1].startswith("0 chunks are split now")
    assert lmpipe("compress", node.run_dir, "--codec", "zip")[0] == 2
    assert lmpipe("compress", node.run_dir, "--codec", "adaptive")[0] == 1, "there is no calibration"
    assert "stay as they are" not in lmpipe("compress", node.run_dir)[1], "they are of that codec"
    status, out, _ = lmpipe("decompress", node.run_dir, "--namespace", namespace)
    assert (status, out.split(":")[0]) == (0, f"{CHUNKS} chunks are raw now")
    status, out, _ = lmpipe("compress", node.run_dir, "--codec", "int4h", "--json")
    assert (status, json.loads(out)["recoded"]) == (0, CHUNKS), "gather knows the layout from the engine"
    status, out, _ = lmpipe("compress", node.run_dir, "--codec", "fp8", "--json")
    assert json.loads(out)["left"] == {"the errors of two codecs would add up": CHUNKS}
    assert lmpipe("decompress", node.run_dir)[0] == 0


def test_clear(node: Node, lmpipe: Lmpipe, namespace: str) -> None:
    assert lmpipe("clear", node.run_dir, "--namespace", "11" * 32)[1] == "0 rows removed from dram\n"
    assert lmpipe("clear", node.run_dir, "--tier", "ssd")[0] == 1
    status, out, _ = lmpipe("clear", node.run_dir, "--namespace", namespace, "--json")
    assert (status, json.loads(out)) == (0, {"removed": CHUNKS, "tiers": ["dram"]})


def test_a_second_up_is_refused(node: Node, lmpipe: Lmpipe) -> None:
    status, _, err = lmpipe("up", node.file)
    assert status == 1
    assert f"test is running already: its supervisor has pid {node.pid('supervisor')}" in err
    assert node.status().state == "ready"


@pytest.mark.parametrize("verb", ["status", "down", "clear", "compress", "decompress"])
def test_no_such_node(lmpipe: Lmpipe, verb: str, tmp_path: Path) -> None:
    status, _, err = lmpipe(verb, "--run-dir", tmp_path)
    assert status == 3
    assert f"no node at {tmp_path}" in err


def test_the_only_node_there_is(monkeypatch: pytest.MonkeyPatch, lmpipe: Lmpipe, tmp_path: Path) -> None:
    monkeypatch.setattr(cli_nodes, "default_parent", lambda: tmp_path)
    assert lmpipe("status")[2] == "lmpipe: no node is up; start one with: lmpipe up FILE\n"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        RunDir(tmp_path / name).node_json.write_text("{}")
    assert lmpipe("status")[2] == "lmpipe: several nodes are here: one, two; say which\n"
    assert lmpipe("status", "one")[0] == 1  # found, and no note


def command(*argv: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, so that what it detaches is nobody's child here."""
    argv = (sys.executable, "-m", "lmpipe", *map(str, argv))
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_detached_up_and_down(lmpipe: Lmpipe) -> None:
    node = Node({"tiers": {"ssd": None}})
    try:
        up = command("up", node.file, "--detach")
        assert (up.returncode, up.stderr) == (0, "")
        assert f"ready: {node.run_dir}, supervisor pid" in up.stdout
        assert lmpipe("status", node.file)[0] == 0
        assert lmpipe("down", node.file, "--keep-dram")[0] == 0
        assert node.paths.arena.exists()
        assert "arena: taken over as it is" in command("up", node.file, "--detach").stdout
        assert lmpipe("down", node.file)[1] == f"stopped: {node.run_dir}\n"
        assert not node.run_dir.exists()
    finally:
        node.close()


def test_detached_up_that_fails() -> None:
    node = Node({"tiers": {"dram": {"capacity": "1000TiB"}, "ssd": None}})
    try:
        up = command("up", node.file, "--detach")
        assert up.returncode == 1
        assert "bytes are wanted" in up.stderr
        assert not node.run_dir.exists()
    finally:
        node.close()


def test_down_after_a_killed_supervisor(lmpipe: Lmpipe) -> None:
    with Node({"tiers": {"ssd": None}}) as node:
        node.kill("supervisor")
        status, out, _ = lmpipe("status", node.file, "--json")
        assert (status, json.loads(out)["state"]) == (1, "orphaned")
        status, out, _ = lmpipe("down", node.file)
        assert status == 0
        assert "was left by a supervisor that died; ending it" in out
        assert not node.run_dir.exists()
