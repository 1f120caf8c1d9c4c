"""The benchmark of GPUs, on what is there."""

from collections.abc import Iterator

import pytest
import torch

from tests.scripts import Script, script


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    with script("bench_gpu", monkeypatch) as main:
        yield main


def test_compact_is_smaller_and_without_sparse_cores_there_is_no_2_4(
    bench: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("--shapes", "tiny", "--device", "cpu", "--no-compile", "--batches", "2", "--tokens", "8", "--rounds", "3")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "eager" in line and "×" not in line]
    found = {row[1].strip(): float(row[2]) for row in rows}
    assert list(found) == ["dense, eager", "compact, eager"]
    assert found["compact, eager"] < found["dense, eager"]


def test_a_gpu_that_is_not_there_is_one_sentence(bench: Script, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        bench()
    assert "torch sees no GPU here; --device cpu --shapes tiny shows that it works" in capsys.readouterr().err
