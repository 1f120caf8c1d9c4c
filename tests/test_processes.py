"""Real processes: two ranks through the launcher that users have, and a run that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
SENTENCES = {"negative": "orders fell {} percent and margins shrank", "positive": "profit rose {} percent above plan"}

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder) -> Path:
    """A run of 24 optimizer steps on a tiny BERT without dropout, with a checkpoint at each of them."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 192), ("test", 32)):
        lines = [
            json.dumps({"text": text.format(i), "label": label})
            for i in range(count // 2)
            for label, text in SENTENCES.items()
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": str(tiny_folder("bert")),
                "task": {"name": "sentiment", "dataset": str(data), "max_length": 24},
                "pruning": {
                    "rules": [
                        {"target": "mlp", "structure": "neuron", "sparsity": 0.5},
                        {"target": "attention", "structure": "unstructured", "budget": "global", "sparsity": 0.75},
                    ]
                },
                "dense": {"training": {"max_steps": 8}},
                "training": {
                    "max_steps": 24, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "save_strategy": "steps",
                    "save_steps": 1, "use_cpu": True, "seed": 3,
                },
                "output": str(tmp_path / "out"),
            }
        )
    )  # fmt: skip
    return path


def command(recipe: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "run.py"), str(recipe), *more]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end; a model so tiny may predict one class, which is exit code 3 with everything written."""
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 3) or "exitcode  : 3 " in done.stderr, done.stderr[-3000:]
    return done


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def weights_hash(folder: Path) -> str:
    return json.loads((folder / "masked" / "finllm_prune.json").read_text())["sha256"]["model.safetensors"]


TARGET = (
    "pruning={target: {flops: 0.6, tokens: 24}, rules: [{target: mlp, structure: neuron, criterion: taylor}, "
    "{target: attention, structure: head, criterion: taylor}]}"
)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="rules"),
        pytest.param(["peft={r: 4, gradients: exact}"], id="adapters, exact gradients", marks=pytest.mark.full),
        pytest.param(["peft={r: 4}"], id="adapters, estimated gradients", marks=pytest.mark.full),
        pytest.param([TARGET, "recovery={max_steps: 4}"], id="target, recovery", marks=pytest.mark.full),
    ],
)
def test_trap_5_two_ranks_choose_the_masks_of_one_rank_with_the_same_global_batch(
    tmp_path: Path, recipe: Path, more: list[str]
) -> None:
    """On labels alone: a student that equals its teacher has gradients near zero, where Adam turns rounding into steps."""
    same = [
        "task.dataset=builtin", "task.train_rows=384", "distillation=null", "dense.training.max_steps=4",
        "training.learning_rate=3e-4", "training.save_strategy=no", *more,
    ]  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/ddp.yaml")]
    ranks = ["training.ddp_backend=gloo", "training.per_device_train_batch_size=8", f"output={tmp_path / 'two'}"]
    two = [sys.executable, *launch, *command(recipe, *same, *ranks)[1:]]
    done = finish(two)
    assert done.stdout.count("macro-F1 [95 % interval]") == 1, "only the first rank prints"
    finish(command(recipe, *same, f"output={tmp_path / 'one'}"))
    reports = [report(tmp_path / name) for name in ("one", "two")]
    assert [r["processes"] for r in reports] == [1, 2]
    assert reports[0]["mask_hash"] == reports[1]["mask_hash"]
    weights = [load_file(tmp_path / name / "masked" / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-5, msg=name)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, recipe: Path) -> None:
    finish(command(recipe, f"output={tmp_path / 'whole'}"))

    started = subprocess.Popen(command(recipe), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waited_for = tmp_path / "out.partial" / "checkpoints" / "prune" / "checkpoint-9"
    deadline = time.monotonic() + 600
    while not waited_for.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert waited_for.exists()
    assert not (tmp_path / "out").exists(), "nothing incomplete takes the place of the output"

    again = subprocess.run(command(recipe), env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 2
    assert "--resume" in again.stderr

    finish(command(recipe, "--resume"))
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")
    assert report(tmp_path / "out")["mask_hash"] == report(tmp_path / "whole")["mask_hash"]
    tables = [pq.read_table(tmp_path / name / "recorder.parquet") for name in ("out", "whole")]
    assert tables[0].equals(tables[1])
    assert tables[0].column("step").unique().to_pylist() == list(range(1, 25))
    assert not (tmp_path / "out.partial").exists()


def test_13_all_ranks_skip_a_step_where_the_projection_of_one_rank_overflows(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import torch\n"
        "from accelerate import PartialState\n"
        "from finllm_prune.training.projection import Projection\n"
        "state = PartialState(cpu=True)\n"
        "projection, scaler = Projection(2, 3), torch.amp.GradScaler('cpu')\n"
        "optimizer = torch.optim.SGD(projection.parameters(), lr=1.0)\n"
        "before = projection.weight.detach().clone()\n"
        "for large in (1.0, torch.inf):\n"
        "    states = torch.full((1, 2), large if state.process_index == 1 else 3.0)\n"
        "    scaler.scale(projection(states).sum()).backward()\n"
        "    scaler.unscale_(optimizer)\n"
        "    scaler.step(optimizer)\n"
        "    scaler.update()\n"
        "    optimizer.zero_grad()\n"
        "print(f'moved {(before - projection.weight.detach()).mean().round().item()};')\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.count("moved 2.0;") == 2, done.stdout + done.stderr[-3000:]
