"""Gemma. The same layer names as Llama."""

from dataclasses import replace

from finllm_prune.families import llama

FAMILY = replace(llama.FAMILY, model_type="gemma")
