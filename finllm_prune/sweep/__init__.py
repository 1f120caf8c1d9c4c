"""One recipe at several sparsities or targets and seeds: runs in processes of their own, and what they come to together."""

from finllm_prune.sweep.grid import Cell, Grid
from finllm_prune.sweep.results import Result, Results, Setting
from finllm_prune.sweep.sweep import Outcome, Sweep, plan_sweep, run_sweep
from finllm_prune.sweep.teacher import train_teacher

__all__ = [
    "Cell", "Grid", "Outcome", "Result", "Results", "Setting", "Sweep", "plan_sweep", "run_sweep", "train_teacher",
]  # fmt: skip
