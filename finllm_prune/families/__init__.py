"""Architectures as data: one file each, found by its ``model_type``."""

from finllm_prune.families.architecture import Architecture
from finllm_prune.families.family import Family, Part, find_architecture, find_family
from finllm_prune.families.shrinking import Cut, alive, expand, keep, shrink, tell_heads, without_effect

__all__ = [
    "Architecture", "Cut", "Family", "Part",
    "alive", "expand", "find_architecture", "find_family", "keep", "shrink", "tell_heads", "without_effect",
]  # fmt: skip
