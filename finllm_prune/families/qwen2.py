"""Qwen2 and Qwen2.5. The same layer names as Llama; its queries, keys and values have biases."""

from dataclasses import replace

from finllm_prune.families import llama

FAMILY = replace(llama.FAMILY, model_type="qwen2")
