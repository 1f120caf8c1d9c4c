"""Suites: two models on many sets, and whether the pruned one may replace the dense one."""

from finllm_prune.suite.measuring import evaluate_suite
from finllm_prune.suite.page import page
from finllm_prune.suite.report import SetResult, SuiteReport
from finllm_prune.suite.suite import Suite

__all__ = ["SetResult", "Suite", "SuiteReport", "evaluate_suite", "page"]
