"""Tiny causal language models of the real classes, and a tokenizer with a chat template that writes as they do."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests import small
from tests.conftest import loud

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 entries, as Qwen's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator([row["text"] for row in small.rows("train")], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=256
    )
    tokenizer.chat_template = chat
    return tokenizer


def causal(model_type: str = "qwen3", **more: object) -> PreTrainedModel:
    """4 heads in 2 kv groups, 64 neurons, the head tied to the embeddings; every other block of Gemma sees 4 tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=2, sliding_window=4, sliding_window_pattern=2, **more,
    )  # fmt: skip
    return loud(AutoModelForCausalLM.from_config(config))
