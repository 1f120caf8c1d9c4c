"""onnx-int8: the graph of ``onnx`` in 8 bits, by onnxruntime's dynamic quantization. Another model: measured, not equal.

Matrices and embeddings are stored as int8; what meets the matrices becomes 8 bits on the way, with one scale per batch, so a
text's logits move a little with its neighbours. The manifest says how far the logits of 64 rows of random tokens lie from
those of the model in memory ("difference"), and on which part of them both predict the same class ("agreement"); the same of
real texts under "rows".
"""

import logging
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.formats import GRAPH
from finllm_prune.checkpoints.manifest import write_manifest
from finllm_prune.checkpoints.onnx import Served, exportable, write_graph
from finllm_prune.checkpoints.onnx import engine as graph_engine
from finllm_prune.checkpoints.proof import agreement, in_fp32, logits_of, probe_of
from finllm_prune.errors import ProofError
from finllm_prune.staging import staged

ROWS = 64
# Another processor rounds other values of a batch up than this one.
SLACK = 1.5


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the fp32 graph, quantize it, and measure what that changed; returns the model that it was made of.

    Raises:
        ProofError: the fp32 graph is not the model in memory, or the int8 one gives no numbers; then no folder is left behind.
    """
    model = in_fp32(model)
    smaller = exportable(model)
    with staged(folder) as partial:
        write_graph(model, smaller, tokenizer, partial)
        quantize(partial / GRAPH)
        probe = probe_of(model, ROWS)
        expected, got = logits_of(model, probe), logits_of(Served(partial), probe)
        if not bool(torch.isfinite(got).all()):
            raise ProofError(f"{folder}: the 8-bit graph gives logits that are no numbers; export onnx instead")
        difference = float((got - expected).abs().max())
        measured = {"difference": difference, "agreement": agreement(got, expected)}
        write_manifest(partial, "onnx-int8", {}, probe, expected, SLACK * difference, measured)
    return smaller


def engine(model: PreTrainedModel) -> Served:
    """The 8-bit graph of a model, to be called and measured: unproved, and without a folder."""
    return graph_engine(model, quantize)


def quantize(graph: Path) -> None:
    """Replace a graph by its 8-bit one: a scale for each column of a matrix, and weights that take 7 bits of the 8.

    With all 8, processors without VNNI add products up in 16 bits that overflow, and would be another model than the rest.
    """
    model = onnx.load(graph)
    # The exporter's shapes of intermediate values are not those that the quantizer infers, and it refuses both together.
    del model.graph.value_info[:]
    advice = logging.getLogger()
    before = advice.level
    advice.setLevel(logging.ERROR)  # it recommends to optimize the graph first, which the exporter did
    try:
        quantize_dynamic(model, graph, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    finally:
        advice.setLevel(before)
