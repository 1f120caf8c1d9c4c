"""Pruning itself: torch only; no transformers, no files."""

from finllm_prune.pruning.budgets import BUDGETS, Budget, Global, Uniform
from finllm_prune.pruning.criteria import CRITERIA, Criterion, Magnitude, Movement, Random, SoftMovement
from finllm_prune.pruning.groups import Group, Rule, Slot
from finllm_prune.pruning.pruner import Pruner, refuse_overlap
from finllm_prune.pruning.schedules import SCHEDULES, Constant, Cubic, Linear, Schedule
from finllm_prune.pruning.structures import NM, STRUCTURES, Block, Head, Layer, Neuron, Site, Structure, Unstructured

__all__ = [
    "BUDGETS", "CRITERIA", "SCHEDULES", "STRUCTURES",
    "Block", "Budget", "Constant", "Criterion", "Cubic", "Global", "Group", "Head", "Layer", "Linear", "Magnitude", "Movement",
    "NM", "Neuron", "Pruner", "Random", "Rule", "Schedule", "Site", "Slot", "SoftMovement", "Structure", "Uniform",
    "Unstructured", "refuse_overlap",
]  # fmt: skip
