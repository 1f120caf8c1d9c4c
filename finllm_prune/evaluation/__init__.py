"""Evaluation: quality, latency, sparsity, the frozen report and its figures."""

from finllm_prune.evaluation.latency import Engine, Latency, alternate, cpu_threads, measure, on_cpu, token_ids
from finllm_prune.evaluation.latency_table import LatencyTable, measured_table
from finllm_prune.evaluation.quality import Quality, compare, refuse_one_unit
from finllm_prune.evaluation.report import (
    GATES,
    TITLES,
    Report,
    check_gates,
    first_stage_rows,
    quality_rows,
    with_interval,
)
from finllm_prune.evaluation.sparsity import layer_table, removed, weight_bytes
from finllm_prune.evaluation.targets import Target, check_target, flops, parameter_bytes, price, refuse_out_of_reach

__all__ = [
    "GATES", "TITLES", "Engine", "Latency", "LatencyTable", "Quality", "Report", "Target",
    "alternate", "check_gates", "check_target", "compare", "cpu_threads", "first_stage_rows", "flops", "layer_table", "measure",
    "measured_table", "on_cpu", "parameter_bytes", "price", "quality_rows", "refuse_one_unit", "refuse_out_of_reach", "removed",
    "token_ids", "weight_bytes", "with_interval",
]  # fmt: skip
