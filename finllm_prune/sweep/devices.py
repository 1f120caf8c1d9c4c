"""Devices as users name them (``cuda:0``, ``cpu``), as the environment of a process that sees nothing else."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from finllm_prune.errors import InputError


@dataclass(frozen=True)
class Device:
    """Where one cell runs at a time.

    Args:
        name: as it was given; empty for whatever a run takes by itself.
        environment: variables that its processes get beside those of this one.
    """

    name: str
    environment: dict[str, str]


def find_devices(names: Sequence[str]) -> list[Device]:
    """One for each name, in their order; a name that comes twice runs two cells at once. The CPU's threads are shared evenly.

    Raises:
        InputError: there is no such device here.
    """
    if not names:
        return [Device("", {})]
    threads = max(1, torch.get_num_threads() // len(names))
    return [Device(name, {"OMP_NUM_THREADS": str(threads)} | _seeing(name)) for name in names]


@contextmanager
def seen_by(device: Device) -> Iterator[None]:
    """Within the block this process sees what the device's processes will see, if it has not used a GPU before."""
    before = dict(os.environ)
    os.environ.update(device.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _seeing(name: str) -> dict[str, str]:
    kind, _, number = name.partition(":")
    if name == "cpu":
        return {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    if kind == "mps" and not number and torch.backends.mps.is_available():
        return {}
    known = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if kind == "cuda" and (number or "0").isdecimal() and f"cuda:{int(number or 0)}" in known:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = visible.split(",") if visible else [str(i) for i in range(len(known))]
        return {"CUDA_VISIBLE_DEVICES": shown[int(number or 0)].strip()}
    here = [*known, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    raise InputError(f"--devices: there is no {name} here; name some of {', '.join(here)}")
