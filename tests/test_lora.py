"""LoRA: adapters train beside frozen weights, and what is cut goes from both; the merged model is a plain one."""

from pathlib import Path
from typing import Any

import pytest
import torch

import finllm_prune.run
from finllm_prune.prepare import prepare
from finllm_prune.recipe import parse
from finllm_prune.run import prune
from tests import small

NEURONS = {"target": "mlp", "structure": "neuron", "sparsity": 0.5, "criterion": "taylor"}
HEADS = {"target": "attention", "structure": "head", "sparsity": 0.5, "criterion": "movement"}


@pytest.fixture
def data(tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    small.few_resamples(monkeypatch)
    return {
        "model": str(tiny_folder("llama")), "peft": {"r": 4},
        "task": {"name": "sentiment", "dataset": str(small.write_folder(tmp_path / "data"))},
        "pruning": {"rules": [NEURONS, HEADS]},
        "training": {
            "max_steps": 10, "per_device_train_batch_size": 6, "learning_rate": 2e-3, "save_steps": 2, "use_cpu": True,
            "disable_tqdm": True, "seed": 3,
        },
        "export": ["masked", "compact"], "output": str(tmp_path / "out"),
    }  # fmt: skip


def test_a_run_with_adapters_ends_in_plain_models(data: dict[str, Any]) -> None:
    recipe = parse(data)
    report = finllm_prune.run.run(recipe)
    assert report.sparsity["targeted"] == 0.5
