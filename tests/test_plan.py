"""A plan tells what a run then finds, and refuses what a run would refuse."""

import json
import sys
from pathlib import Path

import pytest

from finllm_prune.cli import main
from finllm_prune.evaluation import flops, parameter_bytes
from finllm_prune.plan import plan
from finllm_prune.recipe import Recipe, parse
from tests import small
from tests.conftest import tiny_model
from tests.test_target import few_cells, target_recipe

ROOT = Path(__file__).parents[1]


def test_a_plan_of_the_quickstart(tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch) -> None:
    few_cells(monkeypatch, tmp_path / "cache")
    model = tiny_folder(layers=2)
    recipe = Recipe.load(
        ROOT / "recipes" / "quickstart.yaml",
        [
            f"model={model}", f"task.dataset={small.write_folder(tmp_path / 'data')}", f"output={tmp_path / 'out'}",
            "training.use_cpu=true", "training.per_device_train_batch_size=8",
        ],
    )  # fmt: skip
    found = plan(recipe)
    dense = tiny_model()
    neurons = 2 * 32 * (2 * 32 + 1)  # a half of 64 in two blocks: a row with its bias, and a column
    assert found.parameters["dense"] == sum(parameter.numel() for parameter in dense.parameters())
    assert found.parameters["dense"] - found.parameters["pruned"] == neurons
    assert found.parameters["pruned"] - found.parameters["not_zero"] == 2 * 4 * 32 * 32 // 2
    assert found.bytes == {
        "dense": parameter_bytes(dense), "masked": parameter_bytes(dense), "compact": parameter_bytes(dense) - 4 * neurons,
    }  # fmt: skip
    assert found.flops["dense"] == flops(dense, 70)
    assert found.flops["dense"] - found.flops["pruned"] == 2 * 70 * 2 * 32 * 64
    assert found.latency is not None
    assert found.latency["ratio"] == pytest.approx(found.latency["pruned_ms"] / found.latency["dense_ms"])
    assert min(found.seconds["pruning"], found.seconds["dense"]) > 0
    # Weights, gradients and two moments of the student, the teacher, scores and their moments of what is cut.
    assert found.peak_bytes > 5 * parameter_bytes(dense)
    assert found.target is None
    assert not (tmp_path / "out.partial").exists()


def test_a_plan_shares_the_target_out_and_a_miss_is_refused_before_training(
    tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_cells(monkeypatch, tmp_path / "cache")
    content = target_recipe(tiny_folder(), tmp_path, {"flops": 0.5, "tokens": 32})
    found = plan(parse(content))
    assert found.target is not None
    assert found.target["lowest"] < 0.5
    assert 0.3 < found.flops["pruned"] / found.flops["dense"] <= 0.5
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(content))

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["finllm-prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    assert call("plan", file, "--json", tmp_path / "plan.json") == 0
    assert json.loads((tmp_path / "plan.json").read_text())["parameters"] == found.parameters
    assert "training time" in capsys.readouterr().out
    for command in ("plan", "run"):
        assert call(command, file, "pruning.target.flops=0.01") == 2
        assert "pruning.target.flops: 0.01 cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
