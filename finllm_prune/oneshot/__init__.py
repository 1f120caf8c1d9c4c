"""One-shot pruning of causal language models of any size: block by block, from disk to disk."""

from finllm_prune.oneshot.recipe import OneShotRecipe
from finllm_prune.oneshot.report import OneShotReport
from finllm_prune.oneshot.run import oneshot

__all__ = ["OneShotRecipe", "OneShotReport", "oneshot"]
