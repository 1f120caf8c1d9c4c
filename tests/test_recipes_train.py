"""Every recipe of the repository parses, and trains a tiny random model of its own architecture to a complete output."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from finllm_prune.checkpoints import SERVED, verify
from finllm_prune.recipe import Recipe
from finllm_prune.run import run
from finllm_prune.tasks.reranking import Reranking
from tests import small
from tests.conftest import LABELS
from tests.rankings import write_set

ROOT = Path(__file__).parents[1]
OTHERS = ("accelerate", "oneshot", "suites")  # folders of what is no recipe
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in OTHERS)
SAMPLED = ("quickstart", "minilm_fast", "finbert", "instructions_qwen3")  # the others train in `make test-full`
MODEL_TYPES = {
    "BAAI/bge-reranker-base": "xlm-roberta",
    "ProsusAI/finbert": "bert",
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-Reranker-0.6B": "qwen3",
    "answerdotai/ModernBERT-base": "modernbert",
    "cross-encoder/ms-marco-MiniLM-L6-v2": "bert",
    "distilbert/distilroberta-base": "roberta",
    "microsoft/deberta-v3-base": "deberta-v2",
    "sentence-transformers/all-MiniLM-L6-v2": "bert",
    "yiyanghkust/finbert-tone": "bert",
}


def test_there_are_recipes() -> None:
    assert {"quickstart.yaml", "finbert.yaml", "distilroberta.yaml", "minilm.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(recipe.resolved))
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe
    assert recipe.gates, "a recipe says what it is to reach"


def labels_of(task: Any) -> list[str]:
    """What the outputs of a model for ``write_for`` are called."""
    if isinstance(task, Reranking):
        return ["relevance"]
    return ["score"] if task.scores else ["level", "move"] if task.label_sets else LABELS


def write_for(task: Any, folder: Path) -> Path:
    """The small data with the labels that a recipe's task asks for, in its columns."""
    if isinstance(task, Reranking):
        return write_set(folder)
    labels: dict[str, Any] = {name: name for name in LABELS}
    if task.scores is not None:
        labels = {"negative": -0.7, "neutral": 0.0, "positive": 0.7}
    if task.label_sets is not None:
        labels = {"negative": ["move"], "neutral": [], "positive": ["move", "level"]}
    for split in small.SPLITS:
        rows = [{task.text_column: row["text"], task.label_column: labels[row["label"]]} for row in small.rows(split)]
        small.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)  # transformers 5.17 knows no other
@pytest.mark.parametrize(
    "path",
    [path if path.stem in SAMPLED else pytest.param(path, marks=pytest.mark.full) for path in RECIPES],
    ids=[f"{path.parent.name}-{path.stem}" for path in RECIPES],
)
def test_a_recipe_trains_to_a_complete_output(
    path: Path, tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    written = Recipe.load(path)
    labels = labels_of(written.task)
    known = labels if written.dense.checkpoint is not None else LABELS
    writes = written.task.pipeline_tag == "text-generation"
    groups = {"num_key_value_heads": 4} if writes else {}  # of which a quarter can be cut
    model = tiny_folder(MODEL_TYPES[written.model.name], hidden=64, labels=known, **groups)
    head = AutoModelForCausalLM if writes else AutoModelForSequenceClassification
    if writes:
        head.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    overrides = [
        f"model.name={model}", f"task.dataset={write_for(written.task, tmp_path / 'data')}", f"output={tmp_path / 'out'}",
        "gates={}", "training.max_steps=2", "dense.training.max_steps=2", "training.use_cpu=true",
        "training.disable_tqdm=true",
    ]  # fmt: skip
    if written.dense.checkpoint is not None:
        overrides.append(f"dense.checkpoint={model}")
    if written.cosines is not None:
        overrides.append(f"cosines.encoder={model}")
    if getattr(written.task, "prompt", None) is not None:  # the tiny tokenizer has no room for the model's own
        overrides.append('task.prompt={template: "{query} {passage}"}')
    if written.recovery is not None:
        overrides.append("recovery={max_steps: 2}")
    if written.pruning.target is not None:  # no target in milliseconds can be counted on here
        overrides.append("pruning.target={flops: 0.5, tokens: 64}")
    # Making a graph takes longer than all else; it has a test of its own.
    overrides.append(f"export={[name for name in written.export if name not in SERVED]}")
    recipe = Recipe.load(path, overrides)
    report = run(recipe)
    assert report is not None
    expected = {
        "dense",
        *recipe.export,
        "plots",
        "README.md",
        "report.json",
        "flips.json",
        "report.html",
        "recipe.yaml",
        "recorder.parquet",
    }
    assert {file.name for file in recipe.output.iterdir()} == expected
    assert not recipe.output.with_name("out.partial").exists()
    assert Recipe.load(recipe.output / "recipe.yaml") == recipe
    figures = json.loads((recipe.output / "report.json").read_text())
    assert (recipe.pruning.target is None) == (report.target is None)
    for rule in recipe.pruning.rules if recipe.pruning.target is None else []:
        layers = [
            layer for layer in figures["layers"]
            if rule.target == "encoder" or ("attention." in layer["layer"] or "attn." in layer["layer"])
            == (rule.target == "attention")
        ]  # fmt: skip
        sizes = [math.prod(layer["shape"]) for layer in layers]
        kept = sum(layer["density"] * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)
        assert 1 - kept == pytest.approx(rule.sparsity, abs=0.02)
    if writes:  # the card asks as the model was asked
        assert json.dumps(recipe.task.template) in (recipe.output / "README.md").read_text()
    for name in recipe.export:
        assert verify(recipe.output / name)["format"] == name
        saved = head.from_pretrained(recipe.output / name)
        assert writes or list(saved.config.id2label.values()) == labels
    if "compact" in recipe.export:
        assert figures["bytes"]["compact"] < figures["bytes"]["dense"]
