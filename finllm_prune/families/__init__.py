"""Architectures as data: one file each, found by its ``model_type``."""

from finllm_prune.families.architecture import Architecture
from finllm_prune.families.family import Family, Part, find_architecture, find_family
from finllm_prune.families.heads import auto_class, is_causal
from finllm_prune.families.shrinking import (
    Cut,
    alive,
    cut_in_place,
    expand,
    keep,
    narrow,
    shrink,
    tell_heads,
    without_effect,
)

__all__ = [
    "Architecture", "Cut", "Family", "Part",
    "alive", "auto_class", "cut_in_place", "expand", "find_architecture", "find_family", "is_causal", "keep", "narrow",
    "shrink", "tell_heads", "without_effect",
]  # fmt: skip
