"""What a result is made of: data, recipe, versions, machine, commit; for the report."""

import dataclasses
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import DatasetCard

from finllm_prune.checkpoints.manifest import sha256
from finllm_prune.hub.card import license_of
from finllm_prune.prepare import Prepared
from finllm_prune.tasks.task import BUILTIN


def provenance(ready: Prepared) -> dict[str, Any]:
    """What a result is made of: for the report."""
    recipe, examples = ready.recipe, ready.examples
    inherited, data_license, hub_id = _licenses(ready)
    return {
        "seed": ready.arguments.seed,
        "base_model": {
            "name": recipe.model.name,
            "hub_id": None if Path(recipe.model.name).is_dir() else recipe.model.name,
            "origin": ready.origin,
            "license": inherited,
        },
        "license": recipe.model.license or inherited,
        "task": recipe.resolved["task"]["name"],
        "pipeline_tag": recipe.task.pipeline_tag,
        "data": {
            "source": examples.source,
            "hub_id": hub_id,
            "license": data_license,
            "fingerprint": examples.fingerprint(),
            "rows": {name: len(rows) for name, rows in examples.splits.items()},
            "test_labels": examples.counts("test"),
            "labels": {name: examples.counts(name) for name in examples.splits},
            **examples.facts,
        },
        "recipe": recipe.resolved,
        "recipe_sha256": sha256(ready.work / "recipe.yaml"),  # which lies there since before training
        "vocabulary": _vocabulary(ready),
        "processes": PartialState().num_processes,
        **surroundings(str(ready.arguments.device)),
    }


def _licenses(ready: Prepared) -> tuple[str | None, str | None, str | None]:
    """Of the base model and of the data, as their own cards declare them; and the Hub id of the data, where it has one."""
    task = ready.recipe.resolved["task"]
    place = str(BUILTIN / task["name"]) if task["dataset"] == "builtin" else task["dataset"]
    return license_of(ready.location), license_of(place, DatasetCard), None if Path(place).is_dir() else place


def surroundings(device: str) -> dict[str, Any]:
    """Versions, machine and commit."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "scikit-learn")
    return {
        "versions": {"python": platform.python_version(), "finllm_prune": version("finllm-prune")}
        | {name: version(name) for name in packages},
        "machine": {
            "device": device,
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "commit": _commit(),
    }


def _processor() -> str:
    """By its own name where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _vocabulary(ready: Prepared) -> dict[str, Any] | None:
    """What trimming kept, saved and changed, where there was any."""
    if ready.vocabulary is None:
        return None
    trimmed, change = ready.vocabulary
    figures = {"tokens": trimmed.whole, "kept": len(trimmed.old), "weight_bytes": trimmed.bytes}
    return figures | {"held_out": dataclasses.asdict(change), "summary": str(change)}


def _commit() -> str | None:
    """The commit of the source tree that runs, where it is one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit
