"""Checkpoint formats: one file each, found by its name, with a ``save`` that proves what it wrote."""

from finllm_prune.checkpoints.formats import (
    FORMATS,
    GRAPH,
    LOSSY,
    PLUGGED,
    SERVED,
    find_engine,
    find_format,
    is_served,
    serve,
)
from finllm_prune.checkpoints.graphs import refuse_no_graph
from finllm_prune.checkpoints.manifest import exported_in
from finllm_prune.checkpoints.proof import prove_rows, proved, verify, zero_counts

__all__ = [
    "FORMATS", "GRAPH", "LOSSY", "PLUGGED", "SERVED",
    "exported_in", "find_engine", "find_format", "is_served", "prove_rows", "proved",
    "refuse_no_graph", "serve", "verify", "zero_counts",
]  # fmt: skip
