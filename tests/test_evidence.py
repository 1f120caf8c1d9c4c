"""What is asked of two models beside their metrics: whom, about what, and what of it may be told."""

import json
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.evaluation import compare
from finllm_prune.evaluation.evidence import KINDS, Questions, collect
from finllm_prune.judges import ClassJudge, RankingJudge, ScoreJudge
from finllm_prune.recipe import parse
from finllm_prune.tasks import KEPT
from finllm_prune.tasks.asking import turns_text

LABELS = ["low", "high"]
RECIPE: dict[str, Any] = {
    "model": "m",
    "task": "sentiment",
    "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]},
    "output": "out",
}


def answers(kind: str, rows: datasets.Dataset) -> Tensor:
    """Two models that read the number of a text: dense calls it high from 50 on, pruned from 60 on."""
    found = [
        float("".join(sign for sign in text if sign.isdigit() or sign == ".").strip(".") or 0) for text in rows["text"]
    ]
    distance = torch.tensor(found)[:, None] - {"dense": 50, "pruned": 60}[kind]
    return torch.cat([-distance, distance], dim=1) / 10


def test_what_is_asked_is_a_sample_of_what_changes_and_texts_are_told_apart() -> None:
    texts = [f"Alpha reports {number % 100} units." if number % 2 else "No figure was given." for number in range(400)]
    rows = datasets.Dataset.from_dict({"text": texts})
    right = np.array([int(number % 2 and number % 100 >= 50) for number in range(400)])
    judge, logits = ClassJudge(right, LABELS, ("accuracy",)), {kind: answers(kind, rows) for kind in KINDS}
    asked: list[int] = []

    def ask(kind: str, changed: datasets.Dataset) -> Tensor:
        asked.append(len(changed))
        return answers(kind, changed)

    quality = compare(judge, **logits, resamples=9)
    found = collect(judge, rows, logits, quality, ask, Questions(sample=100), resamples=9)
    numbers, negations, companies = found.robustness
    assert [entry["of"] for entry in found.robustness] == [100, 100, 100]
    assert (negations["rows"], companies["rows"]) == (100, 0)
    assert 30 < numbers["rows"] < 70, "every other text has a number"
    assert asked == [numbers["rows"]] * 2 + [100] * 2, "only texts that change are asked about, each model once"
    assert numbers["dense"] > 0, "some are 50 or more when multiplied"
    assert found == collect(judge, rows, logits, quality, ask, Questions(sample=100), resamples=9)
    assert (found.headline, found.unit, found.units) == ("accuracy", "row", 400)
    assert found.tested.difference == pytest.approx(quality.metrics["accuracy"]["difference"])
    assert found.tested.difference == -20 / 400
    assert found.verdict == "worse"
    assert found.confusion == {"labels": LABELS, "dense": [[300, 0], [0, 100]], "pruned": [[300, 0], [20, 80]]}
    assert found.changed is not None
    assert {row["text"] for row in found.changed} <= set(texts)
    assert all(row["lost"] and (row["truth"], row["pruned"]) == ("high", "low") for row in found.changed)
    assert "Alpha" not in json.dumps(found.to_dict())
    assert collect(judge, rows, logits, quality, ask, Questions(texts=False), resamples=9).changed is None
    turns = datasets.Dataset.from_dict({"text": [turns_text([{"role": "user", "content": text}]) for text in texts]})
    found = collect(judge, turns, logits, quality, ask, Questions(), resamples=9)
    assert [entry["rows"] for entry in found.robustness] == [0, 0, 0], "they would be turns no longer"


def test_one_error_alone_is_no_slice() -> None:
    texts = ["one", "two words", "three words here"]
    rows = datasets.Dataset.from_dict({"text": texts, f"{KEPT}sector": ["banks", "energy", "energy"]})
    judge = ScoreJudge(np.array([0.0, 0.5, 1.0]), ("mse",), 0.1)
    logits = {"dense": torch.tensor([[0.1], [0.4], [0.8]]), "pruned": torch.tensor([[0.2], [0.5], [0.9]])}
    asked = Questions(slices=["sector"], perturbations=[], texts=False)
    found = collect(judge, rows, logits, compare(judge, **logits, resamples=9), answers, asked, resamples=9)
    assert [(part["part"], part["units"]) for part in found.slices] == [("energy", 2)]
    assert found.slices[0]["interval"][0] < found.slices[0]["difference"] == pytest.approx(0.02)


def test_queries_without_candidates_and_queries_of_the_same_words_are_units_of_their_own() -> None:
    pools = {"q1": ["a", "b"], "q2": [], "q3": ["a"], "q4": ["b", "c"]}
    texts = {"q1": "What is 5?", "q2": "what is it", "q3": "Why not?", "q4": "Why not?"}
    pairs = [(texts[query], passage) for query, pool in pools.items() for passage in pool]
    rows = datasets.Dataset.from_dict({"text": [text for text, _ in pairs], "pair": [passage for _, passage in pairs]})
    judge = RankingJudge({query: {"a": 1, "c": 1} for query in pools}, pools)
    logits = {
        kind: torch.tensor([[2.0], [1.0], [0.0], [turn], [-turn]]) for kind, turn in (("dense", -1.0), ("pruned", 1.0))
    }

    def ask(kind: str, changed: datasets.Dataset) -> Tensor:
        return torch.zeros(len(changed), 1)

    found = collect(
        judge, rows, logits, compare(judge, **logits, resamples=9), ask, Questions(sample=None), resamples=9
    )
    parts = {(row["by"], row["part"]): (row["units"], row["dense"]) for row in found.slices if row["by"] == "negation"}
    assert found.units == 4
    assert parts == {
        ("negation", "with"): (2, pytest.approx(judge.worth(judge.answers(logits["dense"]))[2:].mean())),
        ("negation", "without"): (1, pytest.approx(judge.worth(judge.answers(logits["dense"]))[0])),
    }
    assert {row["change"]: (row["rows"], row["of"]) for row in found.robustness}["negations"] == (3, 3)
    assert found.changed is not None
    assert [(row["text"], row["lost"]) for row in found.changed] == [("Why not?", True)]


def test_a_recipe_chooses_what_is_asked() -> None:
    changes = [{"name": "companies", "column": "issuer"}]
    asked = parse(RECIPE | {"evidence": {"slices": ["length", "sector"], "perturbations": changes}})
    assert asked.evidence is not None
    assert asked.task.keep_columns == ["sector", "issuer"]  # type: ignore[attr-defined]
    assert parse(asked.resolved) == asked
    assert parse(RECIPE | {"evidence": False}).evidence is None
    asked = parse(RECIPE | {"task": "reranking", "evidence": {"slices": ["sector"]}})
    assert asked.task.keep_columns == ["sector"]  # type: ignore[attr-defined]
    every, ranking = (parse(RECIPE | {"task": task}).evidence for task in ("sentiment", "reranking"))
    assert every is not None
    assert ranking is not None
    assert (len(every.perturbations), len(ranking.perturbations)) == (3, 0), "all candidates would be scored anew"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"margin": 2}, "evidence.margin: it lies between 0 and 1"),
        ({"sample": 0}, "evidence.sample: at least one is needed, not 0"),
        ({"bin": 3}, "evidence.bin: unknown key; did you mean 'bins'"),
        ({"texts": "perhaps"}, "evidence.texts: "),
        ({"perturbations": ["typos"]}, "evidence.perturbations.0: unknown name 'typos'"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(RECIPE | {"task": "sentiment", "evidence": asked})
    assert said in str(caught.value)
