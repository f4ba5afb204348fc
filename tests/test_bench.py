"""Every benchmark once, tiny: that it works, and that its figures have the shape. What they say is for profiling/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from lmpipe.bench import SUMMARIES, pages, report
from lmpipe.bench.harness import Setting
from lmpipe.bench.report import Figure, Goal, Report
from lmpipe.cli import main
from lmpipe.cli.bench import missing

KEYS = {"name", "value", "unit", "limit", "ratio", "goal", "met", "runs"}
EXPECTED = {
    "save": {"copy, private pages, 2 threads", "end to end, mapped pages, 2 threads"},
    "load": {"copy, mapped pages, 2 threads", "end to end, private pages, 2 threads"},
    "lookup": {"lookup, 16K tokens, p50"},
    "hop": {"stage to stage, one hop", "control, Ping and Pong"},
    "ssd": {"write, flushed", "cold read"},
    "codecs": {"split, encode", "int4h, decode", "adaptive, ratio", "hits, fp8 in DRAM"},
    "idle": {"private memory, alone", "wake-ups, alone"},
    "recovery": {"gather killed", "supervisor killed, workers adopted", "everything killed, ready", "chunks lost"},
    "rebuild": {"SSD, 200 records of 8 MiB, with footers", "DRAM, 0.015625 GiB, 64 slots: 64 rows"},
    "ttft": {"cold, lmpipe attached", "warm from DRAM", "warm from SSD", "warm from the remote tier"},
    "gpu": {"gather, full grid", "save, 512 tokens", "first token after 512 tokens, warm from DRAM, raw"},
    "vllm": {"1K, cold, lmpipe attached", "1K, lmpipe, DRAM", "1K, lmpipe, SSD", "mixed, lmpipe"},
    "vllm-kill": {"gather killed in a load", "supervisor back, until hits are", "wrong first tokens"},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(SUMMARIES))
def test_a_quick_run_has_the_shape(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing(name):
        pytest.skip(f"{name} needs {missing(name)}")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of tests/cuda; a GPU's memory cannot be interpreted
    assert main(["bench", name, "--quick", "--json", "--out", str(tmp_path), "--disk", str(tmp_path)]) == 0
    shape = json.loads(capsys.readouterr().out)
    assert set(shape) == {"name", "commit", "machine", "figures"}
    assert shape["name"] == name
    assert shape["commit"]
    assert shape["machine"]
    for figure in shape["figures"]:
        assert set(figure) == KEYS
        assert figure["value"] >= 0
        assert figure["runs"] >= 1
        assert figure["met"] is None, "a quick run judges nothing"
        assert (figure["ratio"] is None) == (figure["limit"] is None)
    assert EXPECTED[name] <= {figure["name"] for figure in shape["figures"]}
    assert json.loads((tmp_path / f"{name}.json").read_text()) == shape
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not missing("vllm"), reason="vLLM is here")
def test_what_is_not_installed_is_said_with_the_way_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "vllm", "--quick"]) == 1
    assert "make setup-vllm" in capsys.readouterr().err


@pytest.mark.skipif(not missing("gpu"), reason="a GPU is here")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--quick"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "bench gpu needs" in line


def test_a_benchmark_that_fails_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    assert main(["bench", "ssd", "--quick", "--json", "--disk", str(taken)]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert "bench ssd" in said.err
    assert str(taken) in said.err


def test_an_unknown_benchmark_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "speed"]) == 2
    assert "lookup" in capsys.readouterr().err


def test_what_slows_down_both_of_a_pair_does_not_count() -> None:
    values, limits = [10.0, 44.0, 12.0], [10.0, 40.0, 10.0]
    assert Figure.of("first token", values, "ms", limits=limits).ratio == 1.2
    assert Figure.of("first token", values, "ms", limits=limits, paired=True).ratio == 1.1


def test_a_goal_is_about_the_value_or_about_the_ratio() -> None:
    faster = Figure.of("copy", [9.0, 1.0, 10.0], "GB/s", limits=[10.0, 10.0, 10.0], goal=Goal("ratio", ">=", 0.9))
    assert (faster.value, faster.limit, faster.ratio, faster.goal) == (9.0, 10.0, 0.9, "ratio >= 0.9")
    assert faster.met is True
    assert faster.runs == 3
    slower = Figure.of("lookup", [0.6], "ms", goal=Goal("value", "<=", 0.5))
    assert (slower.met, slower.limit, slower.ratio) == (False, None, None)
    assert Figure.of("idle", [5.0], "MiB").met is None


def test_the_99th_percentile_is_nearly_the_largest() -> None:
    assert report.quantile_of([float(value) for value in range(100)], 0.99) == 99.0
    assert report.quantile_of([1.0, 2.0, 4.0, 9.0], 0.5) == 3.0


def test_figure_and_limit_take_turns_and_change_places() -> None:
    order: list[str] = []

    def note(name: str) -> float:
        order.append(name)
        return float(len(order))

    values, limits = Setting(quick=False).alternate("x", lambda: note("figure"), lambda: note("limit"), 4)
    assert (len(values), len(limits)) == (4, 4)
    assert order[-4:] == ["limit", "figure", "figure", "limit"]


def test_a_table_names_what_was_missed() -> None:
    figures = [Figure.of("copy", [1.0], "GB/s", limits=[10.0], goal=Goal("ratio", ">=", 0.9))]
    judged = Report.of("save", figures)
    assert [figure.name for figure in judged.missed] == ["copy"]
    assert Report.of("save", figures, judged=False).missed == []
    console = Console(width=120, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    with console.file:
        console.print(report.table(judged))
    assert "missed" in console.export_text()


def test_prompts_are_never_the_same() -> None:
    prompts = pages.Prompts(64)
    assert prompts.fresh().tolist() != prompts.fresh().tolist()
