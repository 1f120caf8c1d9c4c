"""The adapter for mteb: its figures are ours."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import finllm_prune
from finllm_prune.inference import logits_of
from finllm_prune.tasks.reranking import Reranking
from tests.conftest import loud
from tests.rankings import write_set

OURS = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "Recall@10": "recall_at_10", "Recall@100": "recall_at_100"}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("mteb", reason="mteb is not installed: pip install 'finllm-prune[mteb]'")
    pytest.importorskip("sentence_transformers")
    monkeypatch.syspath_prepend(str(Path(finllm_prune.__file__).parents[1] / "scripts"))
    yield importlib.import_module("mteb_reranking")
    del sys.modules["mteb_reranking"]


@pytest.mark.parametrize("dataset", ["builtin", "a folder"])
def test_mteb_measures_what_we_measure(
    adapter: Any, dataset: str, tmp_path: Path, tiny_folder, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tiny_folder(labels=["relevance"])
    model = loud(AutoModelForSequenceClassification.from_pretrained(folder))
    model.save_pretrained(folder)
    if dataset != "builtin":  # of one query BM25 finds nothing
        more = {"queries.jsonl": ['{"_id": "vain", "text": "zebra"}'], "qrels/test.tsv": ["vain\tlease0\t1"]}
        dataset = str(write_set(tmp_path / "set", more))
    task = Reranking(dataset, max_length=64, candidates=20)
    examples = task.load()
    judge = task.judge(examples)
    rows = task.tokenize(examples.splits["test"], tokenizer)
    answers = judge.answers(logits_of(model, rows, task.collator(tokenizer)))
    found = adapter.measure(str(folder), task)
    assert found == pytest.approx({name: judge.value(metric, answers) for name, metric in OURS.items()}, abs=1e-5)
    assert 0.05 < found["nDCG@10"] < 0.95
