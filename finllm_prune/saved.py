"""What can be asked of a saved model: how good it is, and how sparse."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, TrainingArguments

from finllm_prune.checkpoints import is_served, serve
from finllm_prune.checkpoints.manifest import refuse_changed, sha256
from finllm_prune.errors import InputError, one_line
from finllm_prune.evaluation import compare, first_stage_rows, layer_table, quality_rows, with_interval
from finllm_prune.hub.base_model import locate
from finllm_prune.inference import logits_of
from finllm_prune.loading import (
    class_names,
    label_order,
    load_config,
    load_model,
    load_tokenizer,
    refuse_too_long,
    tell_limit,
)
from finllm_prune.recipe import Recipe
from finllm_prune.tasks import Examples, Task, find_task
from finllm_prune.tasks.classification import Classification, to_serve

Rows = list[tuple[str, ...]]
_MODEL_FILES = (".safetensors", ".onnx", ".json", ".txt", ".model")


class Saved:
    """A model of any format that is asked about a task's data; its weights are read when it answers first.

    Args:
        name: a folder or Hub id.
        task: turns rows into tokens.
        examples: whose labels the model must know, in whatever order.

    Raises:
        OtherLabels: it does not know them.
        InputError: it cannot be read, or is not what its manifest says.
    """

    def __init__(self, name: str, task: Task, examples: Examples):
        self.name, self.task, self.examples = name, task, examples
        self.location, self.origin = locate(name, served=True)
        refuse_changed(Path(self.location))
        self.config = load_config(self.location)
        self.labels = label_order(self.config, examples.labels, must_match=name)
        self.tokenizer = load_tokenizer(self.location)
        tell_limit(task, self.tokenizer)
        task.fit_tokenizer(self.tokenizer, self.config)

    @cached_property
    def model(self) -> Callable[..., Any]:
        folder = Path(self.location)
        return serve(folder) if is_served(folder) else load_model(self.task, self.location, self.labels)

    def logits(self, rows: datasets.Dataset) -> Tensor:
        """Shape (rows, labels), the labels in the order of the data."""
        tokens = self.task.tokenize(rows, self.tokenizer)
        if isinstance(self.model, PreTrainedModel):
            refuse_too_long(self.model, [tokens])
        own = logits_of(self.model, tokens, self.task.collator(self.tokenizer))
        # What one output means, or a language model said, has no order.
        same = len(self.labels) == 1
        return own if same else own[:, [self.labels.index(label) for label in self.examples.labels]]

    def fingerprint(self) -> list[Any]:
        """What its answers depend on beside the rows: the files of its folder or its commit on the Hub, task and labels."""
        task = [type(self.task).__module__, asdict(self.task)]  # type: ignore[call-overload]
        return [self._files, task, self.examples.labels]

    @cached_property
    def _files(self) -> list[Any]:
        folder = Path(self.location)
        if not folder.is_dir():
            return [self.location, self.config._commit_hash]
        files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
        return [[path.name, sha256(path)] for path in files]


def evaluate_saved(
    model: str, task_name: str | None = None, dataset: str | None = None, baseline: str | None = None,
    max_length: int | None = None, recipe: Path | None = None,
) -> tuple[dict[str, Any], Rows]:  # fmt: skip
    """Measure a saved model on a task's test split.

    Args:
        task_name, dataset, max_length: instead of the recipe's; without a recipe the built-in sentiment task.
        baseline: the dense model to compare with.
        recipe: whose task prepares the texts (pairs, masks, windows); None takes the ``recipe.yaml`` beside the model, if any.

    Returns:
        All figures, and the rows of a table: (what, value), or (what, dense, pruned) with a baseline.

    Raises:
        InputError: the model's labels are not those of the data, or one of them cannot be read.
    """
    own = Recipe.load(recipe) if recipe is not None else _beside(model)
    task = _task(own, task_name, dataset=dataset, max_length=max_length)
    seed = 0 if own is None else own.training.get("seed", TrainingArguments.seed)  # the run's own intervals
    examples = task.load()
    names = dict.fromkeys([baseline or model, model])
    logits = {name: Saved(name, task, examples).logits(examples.splits["test"]) for name in names}
    quality = compare(task.judge(examples), logits[baseline or model], logits[model], seed)
    if baseline is not None:
        return asdict(quality), [*quality_rows(quality), *first_stage_rows(quality.metrics, examples.facts)]
    figures = {name: _of_one(value) for name, value in quality.metrics.items()}
    rows: Rows = [(name, with_interval(value, "pruned")) for name, value in quality.metrics.items()]
    return figures, rows + [(what, value) for what, _, value in first_stage_rows(quality.metrics, examples.facts)]


def ask(model: str, texts: Sequence[str], names: Sequence[str] | None = None) -> Tensor:
    """The logits (texts, outputs) of an exported model, each text prepared and read as in the training of its recipe.

    Cleaned, masked, cut or read in windows: what a ``pipeline`` does not know of. Pairs of texts are refused.

    Args:
        names: of the companies that the texts are about, where training masked those of a column; they are masked in all texts,
            beside those of the recipe's list.

    Raises:
        InputError: no recipe of a classification of single texts lies beside the model, or it masked a column of names and none
            are given.
    """
    location, _ = locate(model, served=True)
    task = task_of_texts(model, location)
    if task is None:
        raise InputError(f"{model}: no recipe.yaml of a classification lies there; name a folder that a run exported")
    if names is None and task.mask is not None and task.mask.column is not None:
        raise InputError(
            f"{model}: in training the names of column '{task.mask.column}' were masked; give those of these texts as names, "
            "or names=[] where there are none"
        )
    rows = datasets.Dataset.from_dict({"text": task.prepared(texts, names or ()), "label": [0] * len(texts)})
    return Saved(model, task, Examples({}, class_names(load_config(location)), model)).logits(rows)


def task_of_texts(model: str, location: str) -> Classification | None:
    """The classification whose recipe a run left beside a model, for texts of one's own; None where there is none.

    Args:
        model: its name, as a user gave it.
        location: the folder where it lies.

    Raises:
        InputError: it is one of text pairs.
    """
    recipe = _beside(location)
    if recipe is None or not isinstance(recipe.task, Classification) or recipe.task.pipeline_tag == "text-generation":
        return None
    if recipe.task.pair_column is not None:
        raise InputError(
            f"{model}: it reads each text with its '{recipe.task.pair_column}', and single texts are asked here; give both to "
            "a pipeline as text and text_pair, or a file of both to `finllm-prune evaluate --dataset`"
        )
    served = to_serve(recipe.task)
    assert isinstance(served, Classification)
    return served


def _of_one(metric: dict[str, Any]) -> dict[str, Any]:
    """What ``compare`` found of a model that was held against itself."""
    above = {
        key.removeprefix("pruned_"): metric[key] for key in metric if key.startswith(("pruned_above", "first_stage"))
    }
    return {"value": metric["pruned"], "interval": metric["pruned_interval"]} | above


def _beside(model: str) -> Recipe | None:
    """The recipe that a run left in the folder of a model."""
    path = Path(model) / "recipe.yaml"
    return Recipe.load(path) if path.is_file() else None


def _task(recipe: Recipe | None, name: str | None, **changes: Any) -> Task:
    """The recipe's task where there is a recipe and it is of this task, with what is given changed."""
    given = {key: value for key, value in changes.items() if value is not None}
    if recipe is not None and (name is None or isinstance(recipe.task, find_task(name))):
        return to_serve(replace(recipe.task, **given))  # type: ignore[type-var]
    return find_task(name or "sentiment")(**given)


def inspect_saved(model: str) -> Rows:
    """For every prunable layer: path, shape, sparsity; the last row is their sum. Raises InputError for what cannot be read."""
    location, _ = locate(model)
    refuse_changed(Path(location))
    load_config(location)
    try:
        layers = layer_table(AutoModel.from_pretrained(location, trust_remote_code=False))
    except Exception as error:  # transformers trips over a damaged file in many ways
        raise InputError(f"{model}: its weights cannot be loaded: {one_line(error)}") from error
    rows: Rows = [(x["layer"], " × ".join(map(str, x["shape"])), f"{1 - x['density']:.1%}") for x in layers]
    sizes = [math.prod(layer["shape"]) for layer in layers]
    kept = sum(layer["density"] * size for layer, size in zip(layers, sizes, strict=True))
    return [*rows, ("all of them", f"{sum(sizes):,} weights", f"{1 - kept / sum(sizes):.1%}")]
