"""A smaller vocabulary: embeddings are over half of a small encoder, and a corpus uses a part of them."""

from finllm_prune.vocabulary.held_out import Change, held_out
from finllm_prune.vocabulary.tokenizer import trim_json, trim_tokenizer
from finllm_prune.vocabulary.trimming import Trim, Trimmed, trim

__all__ = ["Change", "Trim", "Trimmed", "held_out", "trim", "trim_json", "trim_tokenizer"]
