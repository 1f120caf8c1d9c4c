"""Launched as users launch it: FSDP2 and DDP on several processes, which are killed, go on, and end with the same masks."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finllm_prune.training.trainer import complete_checkpoint
from tests.test_processes import ENVIRONMENT, ROOT, command, finish, recipe, report, weights_hash

pytestmark = pytest.mark.slow
__all__ = ["recipe"]  # a fixture

SAME = [
    "task.dataset=builtin", "task.train_rows=384", "distillation=null", "dense.training.max_steps=4",
    "training.learning_rate=1e-4", "training.save_steps=4", "training.save_total_limit=1",
]  # fmt: skip


def launched(engine: str, ranks: int, recipe: Path, *more: str) -> list[str]:
    """The command of accelerate; FSDP on a CPU takes a stand-in for GPUs."""
    config = ROOT / "recipes" / "accelerate" / f"{engine}.yaml"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        str(ranks),
    ]
    script = ["-m", "tests.on_cpu"] if engine == "fsdp2" else [str(ROOT / "scripts" / "run.py")]
    shares = ["training.ddp_backend=gloo", f"training.per_device_train_batch_size={16 // ranks}"]
    return [*launch, *script, str(recipe), *SAME, *shares, *more]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert what()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed") / "whole"


@pytest.fixture
def whole(once: Path, recipe: Path) -> Path:
    """The output of an undisturbed run of one process, which is the same for each test."""
    if not once.exists():
        finish(command(recipe, *SAME, f"output={once}"))
    return once


def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "out.partial" / "checkpoints" / "prune"


@pytest.mark.parametrize(("many", "fewer"), [(2, [1]), pytest.param(4, [2, 1], marks=pytest.mark.full)])
def test_fsdp2_saves_on_sigterm_and_goes_on_with_fewer_ranks(
    tmp_path: Path, recipe: Path, whole: Path, many: int, fewer: list[int]
) -> None:
    started = start(launched("fsdp2", many, recipe))
    wait_for((checkpoints(tmp_path) / "checkpoint-8" / "pruner.safetensors").exists)
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=600)
    last = complete_checkpoint(str(checkpoints(tmp_path)), pruned=True)
    assert last is not None
    step = int(last.rpartition("-")[2])
    assert 8 < step < 24, "of the step at which it was told to end"
    assert told.count(f"[rank 0] SIGTERM: the checkpoint of step {step} is complete; go on with --resume.") == 1
    assert [path.name for path in checkpoints(tmp_path).iterdir()] == [f"checkpoint-{step}"], "save_total_limit: 1"

    shutil.copytree(tmp_path / "out.partial", tmp_path / "kept")
    for ranks in fewer:
        done = finish(launched("fsdp2", ranks, recipe, "--resume"))
        assert report(tmp_path / "out")["processes"] == ranks
        assert done.stdout.count("macro-F1 [95 % interval]") == 1, "only the first rank prints"
        assert "\n[rank 1] Base model" not in done.stderr
        assert report(tmp_path / "out")["mask_hash"] == report(whole)["mask_hash"]
        weights = [load_file(folder / "masked" / "model.safetensors") for folder in (tmp_path / "out", whole)]
        for name, value in weights[1].items():
            torch.testing.assert_close(weights[0][name], value, rtol=0, atol=1e-5, msg=name)
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", tmp_path / "out.partial")

    refused = subprocess.run(
        command(recipe, *SAME, "--resume"), env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert refused.returncode == 2
    assert "was written under FSDP, so go on in the same way" in " ".join(refused.stderr.split())


def test_a_killed_rank_ends_the_launcher_and_the_run_goes_on(tmp_path: Path, recipe: Path, whole: Path) -> None:
    started = start(launched("ddp", 2, recipe))
    wait_for((checkpoints(tmp_path) / "checkpoint-8" / "pruner.safetensors").exists)
    ranks = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    started.communicate(timeout=600)
    assert started.returncode not in (0, 2, 3)
    assert not (tmp_path / "out").exists()
    finish(launched("ddp", 2, recipe, "--resume"))
    assert report(tmp_path / "out")["mask_hash"] == report(whole)["mask_hash"]


def test_one_process_saves_on_sigterm_and_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, recipe: Path, whole: Path
) -> None:
    started = start(command(recipe, *SAME))
    wait_for((checkpoints(tmp_path) / "checkpoint-4" / "pruner.safetensors").exists)
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=600)
    assert started.returncode == 128 + signal.SIGTERM
    saved = complete_checkpoint(str(checkpoints(tmp_path)), pruned=True)
    assert saved is not None
    assert f"the checkpoint of step {saved.rpartition('-')[2]} is complete" in told

    full = subprocess.run(
        command(recipe, *SAME, "--resume"), env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    assert full.returncode == 2, full.stderr[-3000:]
    told = full.stderr.partition("Error: ")[2].splitlines()[0]  # the progress bar ends behind it
    assert "checkpoints/prune cannot be written: " in told
    assert told.endswith("go on with --resume (the checkpoints before this one are whole)")
    assert "Traceback" not in full.stderr
    assert complete_checkpoint(str(checkpoints(tmp_path)), pruned=True) == saved

    finish(command(recipe, *SAME, "--resume"))
    assert weights_hash(tmp_path / "out") == weights_hash(whole)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped_steps"] == 0
