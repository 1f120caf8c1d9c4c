"""ragged: what has no effect is gone, and each block is as narrow as it can be. Loads after ``import finllm_prune``.

Smaller files, and really faster on any hardware, as compact; beyond it, heads of every family go, and a budget that leaves
blocks of several widths loses nothing. The class is the plain one, the logits are the same. Without this package
``from_pretrained`` fails, and the name of the file that it misses says what to install and import. Not covered: zero blocks
behind a post-norm, single zeros; that error for what ``save_pretrained`` writes of a loaded model (``quantizer`` says why).
"""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.compact import without_idle_blocks
from finllm_prune.checkpoints.proof import save_proved
from finllm_prune.checkpoints.quantizer import tell_widths, write
from finllm_prune.families import find_family, shrink, without_effect


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the smaller model; returns it."""
    smaller = ragged(model)
    save_proved(model, tokenizer, folder, "ragged", smaller, write)
    return smaller


def ragged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without the blocks, heads and FFN neurons that have no effect, whose config tells the widths of its blocks."""
    smaller = smallest(model)
    tell_widths(smaller)
    return smaller


def smallest(model: PreTrainedModel) -> PreTrainedModel:
    """The same, with the config of the model."""
    busy = without_idle_blocks(model, find_family(model.config.model_type))
    return shrink(busy, without_effect(busy))
