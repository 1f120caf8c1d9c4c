"""Architectures as data: one file each, found by its ``model_type``."""

from finllm_prune.families.architecture import Architecture
from finllm_prune.families.family import Family, Part, find_architecture, find_family

__all__ = ["Architecture", "Family", "Part", "find_architecture", "find_family"]
