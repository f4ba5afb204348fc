"""`lmpipe profile` on a tiny topology: real workers, a real engine, one time line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lmpipe import profiler
from lmpipe.cli import main
from lmpipe.cli import profile as cli_profile
from lmpipe.spans import Spans, read_trace
from lmpipe.testing import small_topology

SHIPPED = Path(__file__).parents[2] / "topologies"


def test_a_topology_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    plain = small_topology(tmp_path / "run", tmp_path)
    file.write_text(yaml.safe_dump(plain))
    assert main(["profile", str(file), "--seconds", "1", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trace"] == str(out / "trace.json")
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"engine", "gather", "persist"} <= names
    spans = [event for event in events if event["ph"] == "X"]
    assert {"engine.request", "gather.Save"} <= {span["name"] for span in spans}
    assert min(span["ts"] for span in spans) == 0
    assert {span["pid"] for span in spans} <= {e["pid"] for e in events if e["name"] == "thread_name"}
    assert {span["name"] for span in found["spans"]} == {span["name"] for span in spans}
    assert not (out / "work").exists(), "the tiers' directories are removed"
    assert found["flames"] or found["problems"], "a missing flame graph is explained"
    for path in found["flames"]:
        assert "<svg" in Path(path).read_text()


def test_nsight_systems_is_run_where_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of that name tells what it was started with."""
    nsys, out = tmp_path / "nsys", tmp_path / "out"
    nsys.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\nexit 3\n')
    nsys.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    file = SHIPPED / "single-gpu.yaml"
    assert main(["profile", str(file), "--seconds", "2", "--out", str(out)]) == 3
    words = capfd.readouterr().out.split("\n")[:-1]
    assert words[:2] == ["profile", "--trace=cuda,nvtx,osrt"] and f"--output={out}/nsys" in words
    assert words[-8:] == ["lmpipe", "profile", str(file), "--seconds", "2.0", "--out", str(out), "--no-nsys"]


def test_how_to_run_under_nsight_systems_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cli_profile, "profile", lambda *_: profiler.Profile(tmp_path, [], [], [], 1.0, []))
    assert main(["profile", str(SHIPPED / "local.yaml"), "--nsys", "--seconds", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out.replace("\n", " ")
    assert "Nsight Systems is not installed; with it: nsys profile --trace=cuda,nvtx,osrt" in said
    assert main(["profile", str(SHIPPED / "local.yaml"), "--out", str(tmp_path)]) == 1
    assert "Nsight" not in capsys.readouterr().out, "no GPU is named"


def test_a_missing_py_spy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(profiler.shutil, "which", lambda _: None)
    graphs = profiler.FlameGraphs({"gather": 1}, 1.0, tmp_path)
    graphs.finish()
    assert graphs.problems == [profiler.NO_PY_SPY]
    assert graphs.drawn == []


def test_a_process_that_may_not_be_watched_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "py-spy"
    refusing.write_text("#!/bin/sh\necho 'Permission Denied: Try again with elevated permissions' >&2\nexit 1\n")
    refusing.chmod(0o700)
    monkeypatch.setattr(profiler.sys, "executable", str(tmp_path / "python"))
    graphs = profiler.FlameGraphs({"gather": 1}, 1.0, tmp_path)
    graphs.finish()
    assert graphs.drawn == []
    assert "gather.svg" in graphs.problems[0]
    assert "SYS_PTRACE" in graphs.problems[0]


def test_span_times_add_up() -> None:
    def span(name: str, ts: float, dur: float) -> dict[str, object]:
        return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": 7, "tid": 7, "args": {"bytes": 10, "chunks": 1}}

    named = {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "gather"}}
    events = [named, span("gather.Save", 5000.0, 1000.0), span("gather.Save", 9000.0, 3000.0)]
    (found,) = profiler.span_times(events)
    assert (found.process, found.name, found.count, found.nbytes) == ("gather", "gather.Save", 2, 20)
    assert (found.total_ms, found.longest_ms) == (4.0, 3.0)
    line = profiler.one_time_line(events)
    assert [event["ts"] for event in line if event["ph"] == "X"] == [0.0, 4000.0]
    assert {"name": "loop"} in [event["args"] for event in line if event["name"] == "thread_name"]


def test_what_devices_did_is_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracks have the names that they were given, and stand below the threads."""
    spans = Spans("engine", tmp_path / "trace.json")
    tracks = [spans.track(f"GPU 0: saves, lane {lane}") for lane in (1, 2)]
    with spans.span("gpu.save", 4096):
        pass
    for track in (*tracks, tracks[1]):
        spans.add("copy to host", 5_000_000, 8_000_000, 3_000_000, 1, track)
    spans.close()
    events = read_trace(tmp_path / "trace.json")
    times = {(time.track, time.name): time for time in profiler.span_times(events)}
    assert {time.process for time in times.values()} == {"engine"}
    assert set(times) == {("", "gpu.save"), *((f"GPU 0: saves, lane {lane}", "copy to host") for lane in (1, 2))}
    twice = times["GPU 0: saves, lane 2", "copy to host"]
    assert (twice.count, twice.total_ms, twice.nbytes) == (2, 6.0, 6_000_000)
    line = profiler.one_time_line(events)
    named = [(event["tid"], event["args"]["name"]) for event in line if event["name"] == "thread_name"]
    assert [name for tid, name in named if tid in tracks] == ["GPU 0: saves, lane 1", "GPU 0: saves, lane 2"]
    assert [event["tid"] for event in line if event["name"] == "thread_sort_index"] == tracks
    found = profiler.Profile(tmp_path, [], [times["", "gpu.save"]], [twice], 1.0, [])
    monkeypatch.setattr(cli_profile, "profile", lambda *_: found)
    assert main(["profile", str(SHIPPED / "local.yaml"), "--out", str(tmp_path)]) == 0
    host, device = capsys.readouterr().out.split("what devices did meanwhile")
    assert "gpu.save" in host and "GPU 0" not in host
    assert "GPU 0: saves, lane 2: copy to host" in device and "1.00" in device


def test_a_wrong_topology_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("name: x\n")
    assert main(["profile", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "tiers" in capsys.readouterr().err
