"""Metrics: the plain functions and their `evaluate` modules against formulas written down here."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import finllm_prune.metrics
from finllm_prune.errors import InputError
from finllm_prune.metrics import find_metric

FOLDER = Path(finllm_prune.metrics.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


def accuracy(predictions: Any, references: Any) -> float:
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def macro_f1(predictions: Any, references: Any) -> float:
    p, r = np.array(predictions), np.array(references)
    scores = []
    for c in np.union1d(p, r):
        true_positives = np.sum((p == c) & (r == c))
        scores.append(2 * true_positives / (np.sum(p == c) + np.sum(r == c)))
    return float(np.mean(scores))


def micro_f1(predictions: Any, references: Any) -> float:
    true_positives = sum(p == r for p, r in zip(predictions, references, strict=True))
    false_ones = 2 * (len(references) - true_positives)
    return 2 * true_positives / (2 * true_positives + false_ones)


def mcc(predictions: Any, references: Any) -> float:
    """The correlation of the indicator vectors of both, summed over the classes; 0 where one of them is constant."""
    classes = np.union1d(predictions, references)
    p, r = (np.array(x)[:, None] == classes for x in (predictions, references))
    p, r = p - p.mean(0), r - r.mean(0)
    spread = np.sum(p * p) * np.sum(r * r)
    return float(np.sum(p * r) / np.sqrt(spread)) if spread > 0 else 0.0


def top3_accuracy(predictions: Any, references: Any) -> float:
    return float(np.mean([r in p[:3] for p, r in zip(predictions, references, strict=True)]))


def mse(predictions: Any, references: Any) -> float:
    return float(np.mean((np.array(predictions) - np.array(references)) ** 2))


def mae(predictions: Any, references: Any) -> float:
    return float(np.mean(np.abs(np.array(predictions) - np.array(references))))


def r2(predictions: Any, references: Any) -> float:
    """0 of one row; where all references are equal, 1 for a perfect prediction and 0 for another."""
    spread = np.sum((np.array(references) - np.mean(references)) ** 2)
    rest = mse(predictions, references) * len(references)
    if len(references) < 2:
        return 0.0
    return float(1 - rest / spread) if spread > 0 else float(rest == 0)


def pearson(predictions: Any, references: Any) -> float:
    p, r = np.array(predictions) - np.mean(predictions), np.array(references) - np.mean(references)
    spread = np.sqrt(np.sum(p * p) * np.sum(r * r))
    return float(np.sum(p * r) / spread) if spread > 0 else 0.0


def spearman(predictions: Any, references: Any) -> float:
    """The correlation of ranks, equal values sharing the mean of theirs."""
    ranks = [
        [np.mean([v < x for v in x_s]) + np.mean([v <= x for v in x_s]) for x in x_s]
        for x_s in (predictions, references)
    ]
    return pearson(*ranks)


FORMULAS = {
    "accuracy": accuracy, "macro_f1": macro_f1, "micro_f1": micro_f1, "mcc": mcc, "top3_accuracy": top3_accuracy,
    "mse": mse, "mae": mae, "r2": r2, "pearson": pearson, "spearman": spearman,
}  # fmt: skip


def given_to(name: str, classes: list[int]) -> list[Any]:
    """What a metric takes in the place of classes: all of them in an order, the predicted one first."""
    return [[c, (c + 1) % 5, (c + 2) % 5, (c + 3) % 5] for c in classes] if name == "top3_accuracy" else classes


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def test_every_metric_file_has_its_formula_here() -> None:
    assert sorted(FORMULAS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@example(rows=[(1, 1), (1, 1)])
@example(rows=[(0, 0)])
@example(rows=[(2, 0), (2, 1)])
@given(rows=pairs)
def test_a_metric_is_its_formula(name: str, rows: list[tuple[int, int]]) -> None:
    predictions, references = (list(column) for column in zip(*rows, strict=True))
    predictions = given_to(name, predictions)
    got = find_metric(name)(predictions, references)
    assert isinstance(got, float)
    assert got == pytest.approx(FORMULAS[name](predictions, references), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_evaluate_module_gives_the_same(name: str, tmp_path: Path) -> None:
    module = evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(tmp_path))
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 3, (2, 50)).tolist()
    predictions = given_to(name, predictions)
    assert module.compute(predictions=predictions, references=references) == {
        name: pytest.approx(FORMULAS[name](predictions, references))
    }


@pytest.mark.slow
def test_the_evaluate_modules_load_without_network_and_without_the_package(tmp_path: Path) -> None:
    code = (
        "import sys, socket, evaluate\n"
        "def refuse(*args, **kwargs): raise AssertionError('a metric asked the network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "for path in sys.argv[1:]:\n"
        "    said = [[0], [1], [1]] if 'top3' in path else [0, 1, 1]\n"
        "    print(evaluate.load(path).compute(predictions=said, references=[0, 1, 2]))\n"
        "assert 'finllm_prune' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(FOLDER / f"{name}.py") for name in NAMES)], cwd=tmp_path, text=True,
        capture_output=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [next(iter(ast.literal_eval(line))) for line in done.stdout.splitlines()] == NAMES


def test_an_unknown_metric_names_the_file_to_write() -> None:
    with pytest.raises(InputError, match=r"unknown metric 'f2': write it as finllm_prune/metrics/f2\.py"):
        find_metric("f2")
