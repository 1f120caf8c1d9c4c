"""Pruning itself: torch only; no transformers, no files."""

from finllm_prune.pruning.budgets import BUDGETS, Budget, Global, Uniform
from finllm_prune.pruning.criteria import CRITERIA, Criterion, Magnitude, Movement, Random, SoftMovement
from finllm_prune.pruning.groups import Group, Rule, Slot
from finllm_prune.pruning.oneshot import ONESHOT, Calibrated, OneShot, SparseGPT, Wanda, pattern_of, refuse_unfit
from finllm_prune.pruning.pruner import Pruner, refuse_overlap
from finllm_prune.pruning.schedules import SCHEDULES, Constant, Cubic, Linear, Schedule
from finllm_prune.pruning.structures import STRUCTURES, Block, Head, Neuron, Site, Structure, Unstructured

__all__ = [
    "BUDGETS", "CRITERIA", "ONESHOT", "SCHEDULES", "STRUCTURES",
    "Block", "Budget", "Calibrated", "Constant", "Criterion", "Cubic", "Global", "Group", "Head", "Linear", "Magnitude",
    "Movement", "Neuron", "OneShot", "Pruner", "Random", "Rule", "Schedule", "Site", "Slot", "SoftMovement", "SparseGPT",
    "Structure", "Uniform", "Unstructured", "Wanda",
    "pattern_of", "refuse_overlap", "refuse_unfit",
]  # fmt: skip
