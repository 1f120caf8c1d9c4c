"""What lies on a checkpoint's base model: a head for classes and scores, or one for the next token."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is a language model with its head, and no classifier."""
    return any(name.endswith("ForCausalLM") for name in config.architectures or ())


def auto_class(config: PreTrainedConfig) -> Any:
    """Whose ``from_pretrained`` reads a finished model of such a config with its head."""
    return AutoModelForCausalLM if is_causal(config) else AutoModelForSequenceClassification
