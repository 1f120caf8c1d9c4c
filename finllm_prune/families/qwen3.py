"""Qwen3. The same layer names as Llama; its query and key norms are shared by all heads, so no cut concerns them."""

from dataclasses import replace

from finllm_prune.families import llama

FAMILY = replace(llama.FAMILY, model_type="qwen3")
