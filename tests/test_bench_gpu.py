"""The benchmark of GPUs, on what is there."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import finllm_prune

Bench = Callable[..., None]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Runs ``bench_gpu.py`` in this process."""
    monkeypatch.syspath_prepend(str(Path(finllm_prune.__file__).parents[1] / "scripts"))

    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
        importlib.import_module("bench_gpu").main()

    yield main
    for name in [name for name in sys.modules if name.split(".")[0] in ("bench", "bench_gpu", "scale")]:
        del sys.modules[name]


def test_compact_is_smaller_and_without_sparse_cores_there_is_no_2_4(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("--shapes", "tiny", "--device", "cpu", "--no-compile", "--batches", "2", "--tokens", "8", "--rounds", "3")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "eager" in line and "×" not in line]
    found = {row[1].strip(): float(row[2]) for row in rows}
    assert list(found) == ["dense, eager", "compact, eager"]
    assert found["compact, eager"] < found["dense, eager"]


def test_a_gpu_that_is_not_there_is_one_sentence(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        bench()
    assert "torch sees no GPU here; --device cpu --shapes tiny shows that it works" in capsys.readouterr().err
