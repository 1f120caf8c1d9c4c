"""What can be asked of a saved model: how good it is, and how sparse."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModel

from finllm_prune.checkpoints import is_served, serve
from finllm_prune.errors import InputError, one_line
from finllm_prune.evaluation import compare, layer_table, predict, quality_rows
from finllm_prune.hub.base_model import locate
from finllm_prune.prepare import label_order, load_config, load_model, load_tokenizer
from finllm_prune.tasks import find_task

Rows = list[tuple[str, ...]]


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
    predictions = {}
    for name in dict.fromkeys([baseline or model, model]):
        location, _ = locate(name, served=True)
        labels = label_order(load_config(location), examples.labels, must_match=name)
        tokenizer = load_tokenizer(location)
        tokens = task.tokenize(examples.splits["test"], tokenizer)
        folder = Path(location)
        classifier = serve(folder) if is_served(folder) else load_model(task, location, labels)
        classes = predict(classifier, tokens, task.collator(tokenizer))
        predictions[name] = np.array([examples.labels.index(labels[i]) for i in classes])
    references = np.array(examples.splits["test"]["label"])
    quality = compare(predictions[baseline or model], predictions[model], references, examples.labels, task.metrics)
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
        layers = layer_table(AutoModel.from_pretrained(location, trust_remote_code=False))
    except Exception as error:  # transformers trips over a damaged file in many ways
        raise InputError(f"{model}: its weights cannot be loaded: {one_line(error)}") from error
    rows: Rows = [(x["layer"], " × ".join(map(str, x["shape"])), f"{1 - x['density']:.1%}") for x in layers]
    sizes = [math.prod(layer["shape"]) for layer in layers]
    kept = sum(layer["density"] * size for layer, size in zip(layers, sizes, strict=True))
    return [*rows, ("all of them", f"{sum(sizes):,} weights", f"{1 - kept / sum(sizes):.1%}")]
