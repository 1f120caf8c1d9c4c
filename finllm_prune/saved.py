"""What can be asked of a saved model: how good it is, and how sparse."""

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel

from finllm_prune.checkpoints import is_served, serve
from finllm_prune.errors import InputError, one_line
from finllm_prune.evaluation import compare, layer_table, quality_rows
from finllm_prune.hub.base_model import locate
from finllm_prune.inference import logits_of
from finllm_prune.prepare import label_order, load_config, load_model, load_tokenizer
from finllm_prune.tasks import Examples, Task, find_task

Rows = list[tuple[str, ...]]


class Saved:
    """A model of any format that is asked about a task's data; its weights are read when it answers first.

    Args:
        name: a folder or Hub id.
        task: turns rows into tokens.
        examples: whose labels the model must know, in whatever order.

    Raises:
        OtherLabels: it does not know them.
        InputError: it cannot be read.
    """

    def __init__(self, name: str, task: Task, examples: Examples):
        self.name, self.task, self.examples = name, task, examples
        self.location, self.origin = locate(name, served=True)
        self.config = load_config(self.location)
        self.labels = label_order(self.config, examples.labels, must_match=name)
        self.tokenizer = load_tokenizer(self.location)

    @cached_property
    def model(self) -> Callable[..., Any]:
        folder = Path(self.location)
        return serve(folder) if is_served(folder) else load_model(self.task, self.location, self.labels)

    def logits(self, rows: datasets.Dataset) -> Tensor:
        """Shape (rows, labels), the labels in the order of the data."""
        tokens = self.task.tokenize(rows, self.tokenizer)
        own = logits_of(self.model, tokens, self.task.collator(self.tokenizer))
        return own[:, [self.labels.index(label) for label in self.examples.labels]]


def evaluate_saved(
    model: str, task_name: str, dataset: str, baseline: str | None, max_length: int = 128
) -> tuple[dict[str, Any], Rows]:
    """Measure a saved model on a task's test split.

    Returns:
        All figures, and the rows of a table: (what, value), or (what, dense, pruned) with a baseline.

    Raises:
        InputError: the model's labels are not those of the data, or one of them cannot be read.
    """
    task = find_task(task_name)(dataset=dataset, max_length=max_length)  # type: ignore[call-arg]
    examples = task.load()
    names = dict.fromkeys([baseline or model, model])
    logits = {name: Saved(name, task, examples).logits(examples.splits["test"]) for name in names}
    quality = compare(task.judge(examples), logits[baseline or model], logits[model])
    if baseline is not None:
        return asdict(quality), list(quality_rows(quality))
    figures = {
        name: {"value": value["pruned"], "interval": value["pruned_interval"]}
        for name, value in quality.metrics.items()
    }
    rows = [(name, f"{v['value']:.3f} [{v['interval'][0]:.3f}, {v['interval'][1]:.3f}]") for name, v in figures.items()]
    return figures, list(rows)


def inspect_saved(model: str) -> Rows:
    """For every prunable layer: path, shape, sparsity; the last row is their sum. Raises InputError for what cannot be read."""
    location, _ = locate(model)
    load_config(location)
    try:
        layers = layer_table(AutoModel.from_pretrained(location))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{model}: its weights cannot be loaded: {one_line(error)}") from error
    rows: Rows = [(x["layer"], " × ".join(map(str, x["shape"])), f"{1 - x['density']:.1%}") for x in layers]
    sizes = [math.prod(layer["shape"]) for layer in layers]
    kept = sum(layer["density"] * size for layer, size in zip(layers, sizes, strict=True))
    return [*rows, ("all of them", f"{sum(sizes):,} weights", f"{1 - kept / sum(sizes):.1%}")]
