"""The parts of the demo: text, workload, model, engine process, report. The whole of it is `make demo`."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lmpipe.cli import demo as verb
from lmpipe.cli import parser
from lmpipe.demo import gpu
from lmpipe.demo import node as demo_node
from lmpipe.demo import workload as wl
from lmpipe.demo.client import Answer, EngineFailed, EngineProcess
from lmpipe.demo.node import DemoNode
from lmpipe.demo.report import Report, Row, Sample
from lmpipe.demo.scale import ON_GPU, SCALES, Room, Scale, choose
from lmpipe.demo.tokens import BEGIN, FIRST_BYTE, VOCABULARY, tokens_of
from lmpipe.errors import LmpipeError

TEXT = Path(wl.__file__).parent / "text"


def answer(tokens: list[int], ttft_ms: float, tier: str = "") -> Answer:
    hit = {tier: 256} if tier else {}
    return Answer(tokens, 0.5, ttft_ms, ttft_ms + 10, sum(hit.values()), hit, 1 << 20 if tier else 0, "loaded")


def sample(warm: list[int] | None = None, tier: str = "dram") -> Sample:
    return Sample("a question", 300, answer([1, 2], 1000.0), answer(warm or [1, 2], 100.0, tier))


def whole_report() -> Report:
    rows = [Row("cold, without lmpipe", [sample(tier="")]), Row("DRAM", [sample(), sample()], "dram")]
    return Report(rows, negative_control_differs=True, straight_control_equal=True)


def test_text_is_small_and_each_file_is_accounted_for() -> None:
    files = {path.name for path in TEXT.iterdir()} - {"README.md"}
    assert sum(path.stat().st_size for path in TEXT.iterdir()) < 400_000
    readme = (TEXT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in files)
    assert {f"{name}.txt" for name in (*wl.DOCUMENTS, "apache-license")} <= files


def test_tokens_are_bytes() -> None:
    assert tokens_of("aß") == [BEGIN, FIRST_BYTE + 97, FIRST_BYTE + 0xC3, FIRST_BYTE + 0x9F]
    assert max(tokens_of(wl.text_of("special-method-names"))) < VOCABULARY


@pytest.mark.parametrize("size", [wl.FULL, wl.QUICK, wl.LONG, wl.MIDDLE])
def test_questions_share_their_document(size: wl.WorkloadSize) -> None:
    requests = wl.document_requests(size)
    assert len(requests) == size.documents * size.questions
    assert sum(request.first for request in requests) == sum(request.last for request in requests) == size.documents
    for one, other in itertools.pairwise(requests):
        shared = one.tokens[: size.document_tokens] == other.tokens[: size.document_tokens]
        assert shared == (not other.first)
    assert all(len(request.tokens) > size.document_tokens for request in requests)
    longest, answers = max(len(request.tokens) for request in requests), size.answer_tokens
    assert longest + answers <= size.longest
    talk = wl.turn_request(size, 0, [])
    for turn in range(1, size.turns):
        talk = wl.turn_request(size, turn, [*talk.tokens, *[9] * size.turn_answer_tokens])
    assert len(talk.tokens) + size.turn_answer_tokens <= size.longest


def test_turns_grow_on_answers() -> None:
    first = wl.turn_request(wl.FULL, 0, [])
    history = [*first.tokens, 50, 51]
    second = wl.turn_request(wl.FULL, 1, history)
    assert first.first and not second.first
    assert second.tokens[: len(history)] == history
    assert BEGIN not in second.tokens[1:]
    assert wl.turn_request(wl.FULL, wl.FULL.turns - 1, history).last


def test_rows_add_up() -> None:
    figures = whole_report().to_json()
    row = figures["rows"][1]
    assert (row["tier"], row["prompt_tokens"], row["hit_tokens"], row["bytes"]) == ("dram", 600, 512, 2 << 20)
    assert (row["ttft_cold_ms"], row["ttft_warm_ms"], row["speed_up"], row["tokens_equal"]) == (1000, 100, 10, True)
    assert figures["rows"][0]["tier"] == "none"
    assert figures["negative_control_differs"] is True
    assert figures["problems"] == []


def test_every_problem_is_named() -> None:
    report = whole_report()
    report.rows += [Row("wrong", [sample([1, 3])]), Row("elsewhere", [sample(tier="ssd")], "dram")]
    report.negative_control_differs = report.straight_control_equal = False
    assert [problem.split(":")[0] for problem in report.problems] == [
        "wrong",
        "elsewhere",
        "control",
        "negative control",
    ]


def test_a_tie_is_no_difference_where_rounding_decides() -> None:
    cold, warm = answer([1, 2], 1000.0), replace(answer([1, 3], 100.0, "dram"), lag=0.2)
    assert not Sample("a question", 300, cold, warm).tied, "in fp32 there are none"
    tied, wrong = (Sample("a question", 300, cold, warm, tie) for tie in (0.5, 0.1))
    assert tied.tied and not tied.equal and not wrong.tied
    report = whole_report()
    report.rows.append(Row("tied", [tied], "dram"))
    assert not report.problems and (report.ties, report.rows[-1].figures()["ties"]) == (1, 1)
    report.rows.append(Row("wrong", [wrong], "dram"))
    assert len(report.problems) == 1


def test_what_a_gpu_has_room_for_is_what_it_gets() -> None:
    plenty, none = Room(1 << 40, 1 << 40, 1 << 40), Room(0, 0, 0)

    def on(room: Room | None, device: str = "auto", *, quick: bool = False) -> str:
        return choose(device, lambda: room, quick=quick).name

    assert on(plenty, "cpu") == on(None) == on(none) == "full" and on(None, quick=True) == "quick"
    assert on(plenty) == on(plenty, "cuda") == "8b" and on(plenty, quick=True) == "gpu-quick"
    names = [scale.name for scale in ON_GPU[:-1]]
    for scale in ON_GPU[:-1]:
        assert on(scale.needs) == scale.name
        for what in ("device", "shared", "disk"):
            less = replace(scale.needs, **{what: getattr(scale.needs, what) - 1})
            assert on(less) == ([*names, "full"])[names.index(scale.name) + 1]
    assert [round(scale.model.weights / 1e9, 1) for scale in ON_GPU] == [7.0, 2.8, 1.0, 1.0]
    assert [scale.needs.device >> 30 for scale in ON_GPU] == [23, 14, 6, 3]
    with pytest.raises(LmpipeError, match="torch sees no GPU"):
        on(None, "cuda")
    with pytest.raises(LmpipeError, match=r"it needs 6\..* GiB on the GPU.*; there are 0.0 GiB on the GPU"):
        on(none, "cuda")


def test_the_verb_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ask", lambda: None)
    arguments = parser().parse_args(["demo", "--device", "cuda"])
    with pytest.raises(LmpipeError, match="--device cpu runs it on the CPU"):
        arguments.run(arguments)


def test_the_gpu_is_asked_for_in_a_process_of_its_own() -> None:
    torch = pytest.importorskip("torch")
    found = gpu.ask()
    assert (found is not None) == torch.cuda.is_available()


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_models_are_as_large_as_their_scale_says(scale: Scale) -> None:
    torch = pytest.importorskip("torch")
    from lmpipe.demo import model as demo_model  # noqa: PLC0415  needs torch

    model = demo_model.architecture(scale.model, "meta")
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    assert sum(weight.numel() for weight in matrices) == scale.model.weights
    assert {str(weight.dtype) for weight in matrices} == {f"torch.{scale.model.dtype}"}
    with torch.device("meta"):
        keys = model(torch.zeros(1, 3, dtype=torch.int64)).past_key_values.layers[0].keys
    assert 3 * scale.model.token_bytes == 2 * scale.model.layers * keys.nbytes
    assert scale.workload.longest <= model.config.max_position_embeddings


@pytest.mark.parametrize("scale", ON_GPU, ids=lambda scale: scale.name)
@pytest.mark.parametrize("cupy", [None, "there"])
def test_a_gpu_s_node(scale: Scale, cupy: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_node, "find_spec", lambda name: cupy)
    node = DemoNode(tmp_path, scale)
    topology = node.topology
    node.close()
    assert list(topology.engines.devices) == ["0"] * (cupy is not None)
    assert [process.stages for process in topology.processes] == [[stage] for stage in topology.stages]
    assert [str(tier) for tier in topology.tier_names] == ["dram", "ssd", "remote"]
    assert topology.tiers.dram.capacity > scale.workload.tokens * scale.model.token_bytes


def test_the_report_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    as_json, as_plot = whole_report().write(tmp_path)
    assert json.loads(as_json.read_bytes())["rows"][1]["label"] == "DRAM"
    assert as_plot is not None and as_plot.read_bytes().startswith(b"\x89PNG")
    assert whole_report().table().row_count == 2


def test_the_node_has_every_stage_and_tier(tmp_path: Path) -> None:
    node = DemoNode(tmp_path)
    topology = node.topology
    node.close()
    assert [process.stages for process in topology.processes] == [[stage] for stage in topology.stages]
    assert [str(tier) for tier in topology.tier_names] == ["dram", "ssd", "remote"]
    assert len(topology.stages) == 4
    assert topology.tiers.ssd is not None and Path(topology.tiers.ssd.directory) == tmp_path / "ssd"


def test_the_verb_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "NEEDED", ("torch", "no_such_package"))
    arguments = parser().parse_args(["demo", "--quick"])
    with pytest.raises(LmpipeError, match="needs no_such_package"):
        arguments.run(arguments)


def test_an_engine_process(tmp_path: Path) -> None:
    """It gives what the same model gives here, and dies loudly, with its log, of what it does not know."""
    torch = pytest.importorskip("torch")
    from lmpipe.demo import model as demo_model  # noqa: PLC0415  needs torch

    prompt = tokens_of("What is the type of the value None?")
    model = demo_model.build(SCALES["quick"].model)
    ids = torch.tensor([prompt])
    right = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    with EngineProcess("quick", tmp_path / "engine.log") as engine:
        started = engine.wait_started()
        assert started["threads"] > 0 and started["device"] == "cpu"
        got = engine.generate(prompt, 6, right)
        assert got.tokens == right and got.lag is None
        wrong = [*right[:5], right[5] + 1]
        assert (engine.generate(prompt, 6, wrong).lag or 0) >= got.margin
        assert 0 < got.ttft_ms < got.total_ms
        assert got.margin > 0
        with pytest.raises(EngineFailed, match="unknown op 'dance'"):
            engine.ask({"op": "dance"}, 30.0)
