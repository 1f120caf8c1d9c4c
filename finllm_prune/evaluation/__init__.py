"""Evaluation: quality, latency, sparsity, the frozen report and its figures."""

from finllm_prune.evaluation.latency import Latency, alternate, measure, on_cpu, token_ids
from finllm_prune.evaluation.quality import Quality, compare, predict
from finllm_prune.evaluation.report import GATES, Report, check_gates, quality_rows
from finllm_prune.evaluation.sparsity import layer_table, removed, weight_bytes

__all__ = [
    "GATES", "Latency", "Quality", "Report",
    "alternate", "check_gates", "compare", "layer_table", "measure", "on_cpu", "predict", "quality_rows", "removed",
    "token_ids", "weight_bytes",
]  # fmt: skip
