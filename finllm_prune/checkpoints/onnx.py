"""onnx: a graph that onnxruntime runs without PyTorch, of the smallest model: dead blocks, heads and neurons are gone.

``model.onnx`` with the tokenizer and the config beside it, which names the labels (its widths are the dense model's). Batch
and tokens are free; the inputs are those that the tokenizer makes and the model knows. Serving it takes no PyTorch::

    tokenizer, labels = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder).id2label
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    (logits,) = session.run(None, {each.name: batch[each.name] for each in session.get_inputs()})
    print([labels[i] for i in logits.argmax(-1)])

A run and ``finllm-prune export`` hold it against the model on real texts too, as the folder's tokenizer reads them: "rows" of
the manifest. Single zeros make it no faster. Not covered: graphs above 2 GB, the limit of one ONNX file.
"""

import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401  # torch.onnx exports with it: that it is missing is said before training
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from finllm_prune.checkpoints.formats import GRAPH
from finllm_prune.checkpoints.manifest import refuse_changed, write_manifest
from finllm_prune.checkpoints.proof import compare_logits, in_fp32, logits_of, probe_of
from finllm_prune.checkpoints.ragged import smallest
from finllm_prune.staging import staged

TOLERANCE = 1e-4


class Served:
    """An exported graph behind the call of a model: int64 tensors by name in, ``logits`` out, on the CPU.

    Args:
        folder: what ``save`` wrote.
        threads: of onnxruntime; 0 takes as many as PyTorch has.

    Raises:
        InputError: a file is not the one that the manifest in the folder names.
    """

    def __init__(self, folder: Path, threads: int = 0):
        refuse_changed(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Threads that spin after a call would slow down what is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]

    def __call__(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Token types are zeros unless they are given, as in the model."""
        given = {
            name: inputs[name] if name in inputs else torch.zeros_like(inputs["input_ids"]) for name in self.inputs
        }
        (logits,) = self.session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        return SequenceClassifierOutput(logits=torch.from_numpy(np.asarray(logits)))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the graph; returns the model that it was made of.

    Raises:
        ProofError: onnxruntime's logits differ from those of the model in memory, its weights in fp32, by more than 1e-4; then
            no folder is left behind.
    """
    model = in_fp32(model)
    smaller = exportable(model)
    with staged(folder) as partial:
        write_graph(model, smaller, tokenizer, partial)
        probe = probe_of(model)
        write_manifest(partial, "onnx", {}, probe, logits_of(model, probe), TOLERANCE)
    return smaller


def exportable(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without the blocks, heads and neurons that have no effect, as the exporter wants it."""
    smaller = smallest(model)
    vars(smaller.config).pop("quantization_config", None)  # of a ragged one: a graph needs no quantizer
    nn.Module.to(smaller.eval(), device="cpu", dtype=torch.float32)
    smaller.config.use_cache = False  # or a decoder would give its keys and values out
    return smaller


def write_graph(
    model: PreTrainedModel, smaller: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """The files of ``smaller``, held against ``model`` at several shapes, with and without padding."""
    probe = probe_of(model)
    values = probe | {"token_type_ids": torch.zeros_like(probe["input_ids"])}
    known = inspect.signature(smaller.forward).parameters
    example = {name: values[name] for name in tokenizer.model_input_names if name in known}
    onnx.save(_graph(smaller, example), folder / GRAPH)
    smaller.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    served = Served(folder)
    for inputs in (probe, *_shapes(model)):
        compare_logits(logits_of(served, inputs), logits_of(model, inputs), folder, TOLERANCE)


def engine(model: PreTrainedModel, finish: Callable[[Path], None] = lambda _: None) -> Served:
    """The graph of a model, to be called and measured: unproved, and without a folder.

    Args:
        finish: changes the file, as a quantizer does.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / GRAPH
        onnx.save(_graph(exportable(model), probe_of(model)), file)
        finish(file)
        return Served(file.parent)


def _graph(smaller: PreTrainedModel, example: dict[str, Tensor]) -> onnx.ModelProto:
    """With the inputs of the example; rows and tokens are free."""
    axes = {0: "batch", 1: "tokens"}
    with _quiet():
        program = torch.onnx.export(
            smaller, (), kwargs=example, dynamo=True, verbose=False, input_names=list(example), output_names=["logits"],
            dynamic_shapes=dict.fromkeys(example, axes), external_data=False,
        )  # fmt: skip
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    for node in graph.graph.node:
        # Lines of this machine's Python files, with their paths: more bytes than the weights of a tiny model.
        del node.metadata_props[:]
    return graph


def _shapes(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Random token ids, 1 and 3 rows of 7 and up to 64 tokens; the last of three rows ends in padding."""
    for rows, tokens in ((1, 7), (3, 7), (1, 64), (3, 64)):
        inputs = probe_of(model, rows, min(tokens, model.config.max_position_embeddings - 4))
        if rows > 1:
            inputs["attention_mask"][-1, -tokens // 3 :] = 0
            inputs["input_ids"][-1, -tokens // 3 :] = model.config.pad_token_id or 0
        yield inputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself: its own deprecations, axis names that it joins, no torchvision, no folding."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: ", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
