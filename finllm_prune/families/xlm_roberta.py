"""XLM-RoBERTa: bge-reranker-v2-m3. The same layer names as BERT."""

from dataclasses import replace

from finllm_prune.families import bert

FAMILY = replace(bert.FAMILY, model_type="xlm-roberta")
