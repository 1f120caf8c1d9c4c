"""Architectures as data: one file each, found by its ``model_type``."""

from finllm_prune.families.family import Family, Part, find_family

__all__ = ["Family", "Part", "find_family"]
