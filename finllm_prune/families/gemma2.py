"""Gemma 2. The same layer names as Llama; the norm behind a sub-layer makes zeros of zeros."""

from dataclasses import replace

from finllm_prune.families import llama

FAMILY = replace(llama.FAMILY, model_type="gemma2")
