"""The benchmark of scale on a tiny shape, and what it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.scripts import Script, script


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    with script("bench_scale", monkeypatch) as main:
        yield main


def test_shapes_and_memory_on_a_tiny_model(bench: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    bench(
        "--memory", "tiny", "--shapes", "tiny", "--device", "cpu", "--steps", "1", "--batch", "2", "--tokens", "8",
        "--rows", "2", "--out", str(out),
    )  # fmt: skip
    found = json.loads(out.read_text())
    trained = {row["work"]: row for row in found["shapes"] if "ratio" in row}
    weights, units = trained["training, single weights, global"], trained["training, neurons and heads"]
    assert weights["peak"] > weights["plain_peak"] + units["held"]
    assert weights["held"] > 6 * units["held"], "scores and moments in fp32 of weights in bf16"
    assert [row["sparsity"] for row in found["shapes"] if "sparsity" in row] == [0.5, 0.5]
    held = {row["variant"]: row["held"] / row["targeted"] for row in found["memory"] if row["targeted"]}
    assert 4.2 < held["90 % of single weights, movement"] < 4.3
    assert 2.2 < held["the same, `moments: factored`"] < 2.3
    assert 1.2 < held["the same, `moments: factored`, `regrow: false`"] < 1.3
    assert 0.0 < held["the same, `regrow: false`"] < 0.1
    assert "| tiny | 75 % of neurons |" in capsys.readouterr().out


def test_large_shapes_without_a_gpu_and_nothing_to_do_are_refused(
    bench: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench("--shapes", "8b")
        assert "torch sees no GPU here; use --shapes tiny --device cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench()
    assert "name what is measured" in capsys.readouterr().err
