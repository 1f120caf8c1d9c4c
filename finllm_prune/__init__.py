"""Fine-tune transformer models on financial text while pruning them."""

__version__ = "0.1.0"
