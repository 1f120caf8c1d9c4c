"""The benchmarks of saved models, on tiny ones: bytes and load time of each format, and speed."""

from pathlib import Path

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from tests.conftest import tiny_model
from tests.scripts import script
from tests.small import TinyFolder
from tests.test_ragged import uneven


def table(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]


def test_packed_files_are_the_smallest(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for loud in ("set_verbosity_error", "disable_progress_bar"):  # for the whole process
        monkeypatch.setattr(transformers.logging, loud, lambda: None)
    with script("bench_formats", monkeypatch) as bench:
        bench("--model", str(tiny_folder()), "--rounds", "1")
    rows = {row[0]: row for row in table(capsys.readouterr().out)[2:]}
    assert list(rows) == ["dense", "masked", "ragged", "packed", "packed-int8"]
    encoder, whole = ({name: float(row[at]) for name, row in rows.items()} for at in (2, 4))
    assert encoder["masked"] == encoder["dense"] == 1.0
    for bytes_of in (encoder, whole):
        assert bytes_of["packed-int8"] < bytes_of["packed"] < bytes_of["dense"]


def test_a_compact_model_and_its_graphs_are_the_fastest(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, model in (("dense", tiny_model(layers=3)), ("pruned", uneven())):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with script("bench_inference", monkeypatch) as bench:
        bench(
            "--dense", str(tmp_path / "dense"), "--pruned", str(tmp_path / "pruned"), "--threads", "1", "--batches", "2",
            "--tokens", "8", "--rounds", "3", "--seconds", "1",
        )  # fmt: skip
    out = capsys.readouterr().out
    assert "1 thread, 2 x 8 tokens, 3 rounds" in out
    rows = table(out)[2:]
    assert [row[0] for row in rows] == [
        "dense, eager", "compact, eager", "dense, ONNX fp32", "dense, ONNX int8", "compact, ONNX fp32", "compact, ONNX int8",
    ]  # fmt: skip
