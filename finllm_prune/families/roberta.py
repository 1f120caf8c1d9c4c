"""RoBERTa: distilroberta and its financial fine-tunings. The same layer names as BERT."""

from dataclasses import replace

from finllm_prune.families import bert

FAMILY = replace(bert.FAMILY, model_type="roberta")
