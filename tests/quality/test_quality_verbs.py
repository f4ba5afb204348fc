"""`lmpipe quality` and `lmpipe calibrate` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lmpipe.cli import main
from lmpipe.codecs import calibration
from lmpipe.errors import LmpipeError
from lmpipe.quality import __main__ as quality_process
from lmpipe.quality.job import CalibrationJob, Job, packed, unpacked
from lmpipe.quality.subject import Subject, tokens_of

Lmpipe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lmpipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lmpipe:
    """Runs a command in an empty directory; exit status, stdout, stderr. Its job is done in this process."""

    def become(job: Job) -> NoReturn:
        monkeypatch.setattr(sys, "argv", ["", packed(job)])
        raise SystemExit(quality_process.main())

    def run(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in argv])
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmpipe.cli.quality.become", become)
    monkeypatch.setattr("lmpipe.cli.calibrate.become", become)
    return run


def test_calibrate_then_quality(lmpipe: Lmpipe, directory: Path, text: Path, tmp_path: Path) -> None:
    status, out, err = lmpipe("calibrate", directory, "--budget", 3.5, "--data", text, "--context", 512, "--windows", 1)
    assert status == 0, err
    file = tmp_path / f"{directory.name}.calibration.json"
    found = calibration.read(file)
    assert found.shape == (3, 2, 2, 32)
    assert (found.model, found.budget_bits) == (directory.name, 3.5)
    assert sum(found.table) <= 3.5 * len(found.table)
    assert file.with_suffix(".png").stat().st_size > 1000
    assert f"calibration: {file.name}" in out

    asked = ["quality", directory, "--data", text, "--contexts", 512, "--windows", 2, "--new-tokens", 2]
    status, out, err = lmpipe(*asked, "--calibration", file, "--codecs", "adaptive,fp8", "--json", "--out", "figures")
    assert status == 0, err
    shape = json.loads(out)
    assert [row["codec"] for row in shape["rows"]] == ["none", "adaptive", "fp8"]
    assert shape["rows"][1]["bits"] == pytest.approx(sum(found.table) / len(found.table) + 32 / 32, abs=0.15)
    assert shape["model"] == directory.name
    assert json.loads((tmp_path / "figures/quality.json").read_text()) == shape
    assert (tmp_path / "figures/quality.png").stat().st_size > 1000

    status, out, err = lmpipe(*asked, "--codecs", "zstd")
    assert status == 0, err
    assert "perplexity" in out


def test_a_calibration_of_another_model_is_refused(lmpipe: Lmpipe, directory: Path, text: Path, tmp_path: Path) -> None:
    other = calibration.Calibration(1, "other", 1, 2, 1, 64, 3.0, [[[3], [3]]], [[[[1.0, 1.0, 1.0]]] * 2])
    calibration.write(tmp_path / "other.json", other)
    status, _, err = lmpipe("quality", directory, "--data", text, "--calibration", "other.json")
    assert status == 1
    assert err.strip().splitlines()[-1].startswith("lmpipe: other.json is of (layers, kv, heads, head_dim)")


def test_a_command_becomes_the_process_that_loads_the_model(tmp_path: Path, text: Path) -> None:
    command = [sys.executable, "-P", "-m", "lmpipe", "quality", str(tmp_path), "--data", str(text)]
    got = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert (got.returncode, got.stdout) == (1, "")
    assert got.stderr.strip().endswith(f"{tmp_path} has no config.json: it is no Hugging Face model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quality", "m", "--data", "t", "--codecs", "fp9"], "no codec fp9; there are"),
        (["quality", "m", "--data", "t", "--codecs", "adaptive"], "lmpipe calibrate writes one"),
        (["quality", "m", "--data", "t", "--contexts", "0"], "0 is less than 1"),
        (["calibrate", "m", "--data", "t", "--budget", "2"], "bits of a number are 3 to 8"),
        (["calibrate", "m", "--data", "t"], "--budget"),
    ],
)
def test_wrong_usage_says_why(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["quality", "calibrate"])
def test_help_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"lmpipe {verb} MODEL" in capsys.readouterr().out


def test_texts_are_bytes_without_a_tokenizer_and_tokens_with_one(directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes("grün and blue and grün".encode())
    assert bytes(tokens_of(directory, text, 256).tolist()) == text.read_bytes()
    with pytest.raises(LmpipeError, match="too few for bytes"):
        tokens_of(directory, text, 255)
    words = Tokenizer(WordLevel({"and": 0, "grün": 1, "blue": 2}, unk_token="and"))
    words.pre_tokenizer = Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert tokens_of(tmp_path, text, 3).tolist() == [1, 0, 2, 0, 1]
    with pytest.raises(LmpipeError, match="No such file"):
        tokens_of(directory, tmp_path / "absent", 256)


def test_the_cache_has_the_type_of_the_weights(directory: Path) -> None:
    subject = Subject.load(directory)
    assert (subject.kv_dtype, subject.layout.dtype) == (torch.bfloat16, "bfloat16")
    assert {weight.dtype for weight in subject.model.parameters()} == {torch.float32}


def test_jobs_survive_the_command_line() -> None:
    job = CalibrationJob(model="a b", data='"', budget_bits=3.25, context=0, windows=2, out="é")
    assert unpacked(packed(job)) == job
