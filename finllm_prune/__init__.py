"""Fine-tune transformer models on financial text while pruning them."""

from finllm_prune.registration import register

__version__ = "0.1.0"

register()
