"""Pruning itself: torch only; no transformers, no files."""

from finllm_prune.pruning.adapters import Adapter, Factor, Frozen, attach
from finllm_prune.pruning.budgets import BUDGETS, Budget, Global, Sensitivity, Uniform
from finllm_prune.pruning.criteria import (
    CRITERIA,
    L0,
    Criterion,
    Gradient,
    Magnitude,
    Movement,
    Platon,
    Random,
    ScoreMovement,
    SecondOrder,
    SoftMovement,
    Taylor,
    Variance,
)
from finllm_prune.pruning.filling import refuse_unfillable
from finllm_prune.pruning.groups import Group, Rule, Slot, give_densities
from finllm_prune.pruning.oneshot import (
    ONESHOT,
    Activations,
    ByMatrix,
    Calibrated,
    OneShot,
    SparseGPT,
    Wanda,
    pattern_of,
    refuse_unfit,
)
from finllm_prune.pruning.pruner import Pruner, not_finite
from finllm_prune.pruning.refusals import refuse_overlap, refuse_unreachable, refuse_unsplittable
from finllm_prune.pruning.regularizers import L1, L2, REGULARIZERS, GroupLasso, Regularizer
from finllm_prune.pruning.schedules import SCHEDULES, Constant, Cubic, Cyclic, Exponential, Linear, Schedule
from finllm_prune.pruning.sharding import here, mesh_of, sampled, split_mesh, total
from finllm_prune.pruning.structures import NM, STRUCTURES, Block, Head, Layer, Neuron, Site, Structure, Unstructured
from finllm_prune.pruning.targets import Costs, equal_widths, spread

__all__ = [
    "BUDGETS", "CRITERIA", "L0", "L1", "L2", "NM", "ONESHOT", "REGULARIZERS", "SCHEDULES", "STRUCTURES",
    "Activations", "Adapter", "Block", "Budget", "ByMatrix", "Calibrated", "Constant", "Costs", "Criterion", "Cubic", "Cyclic",
    "Exponential", "Factor", "Frozen", "Global", "Gradient", "Group", "GroupLasso", "Head", "Layer", "Linear", "Magnitude",
    "Movement", "Neuron", "OneShot", "Platon", "Pruner", "Random", "Regularizer", "Rule", "Schedule", "ScoreMovement",
    "SecondOrder", "Sensitivity", "Site", "Slot", "SoftMovement", "SparseGPT", "Structure", "Taylor", "Uniform", "Unstructured",
    "Variance", "Wanda",
    "attach", "equal_widths", "give_densities", "here", "mesh_of", "not_finite", "pattern_of", "refuse_overlap",
    "refuse_unfillable", "refuse_unfit", "refuse_unreachable", "refuse_unsplittable", "sampled", "split_mesh", "spread",
    "total",
]  # fmt: skip
