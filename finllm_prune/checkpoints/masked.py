"""masked: zeros in place. Loads with plain ``from_pretrained``; the same size and speed as dense."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.compact import evened
from finllm_prune.checkpoints.proof import save_proved


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the model as it is, a ragged one with zeros for what it lost; returns what lies in ``folder``."""
    even = evened(model)
    save_proved(model, tokenizer, folder, "masked", even)
    return even
