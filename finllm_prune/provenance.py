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

from finllm_prune.hub.card import base_license
from finllm_prune.prepare import Prepared


def provenance(ready: Prepared) -> dict[str, Any]:
    """What a result is made of: for the report."""
    recipe, examples = ready.recipe, ready.examples
    return {
        "seed": ready.arguments.seed,
        "base_model": {"name": recipe.model.name, "origin": ready.origin},
        "license": recipe.model.license or base_license(ready.location),
        "task": recipe.resolved["task"]["name"],
        "pipeline_tag": recipe.task.pipeline_tag,
        "data": {
            "source": examples.source,
            "fingerprint": examples.fingerprint(),
            "rows": {name: len(rows) for name, rows in examples.splits.items()},
            "test_labels": examples.counts("test"),
            "labels": {name: examples.counts(name) for name in examples.splits},
            **examples.facts,
        },
        "recipe": recipe.resolved,
        "vocabulary": _vocabulary(ready),
        "processes": PartialState().num_processes,
        **surroundings(str(ready.arguments.device)),
    }


def surroundings(device: str) -> dict[str, Any]:
    """Versions, machine and commit."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "scikit-learn")
    return {
        "versions": {"python": platform.python_version(), "finllm_prune": version("finllm-prune")}
        | {name: version(name) for name in packages},
        "machine": {
            "device": device,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "commit": _commit(),
    }


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
