"""The baselines without a fine-tuned model: what they print is what a judge of the task says."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from finllm_prune.tasks.reranking import Reranking
from finllm_prune.tasks.sentiment import Sentiment
from tests import small
from tests.rankings import write_set
from tests.scripts import script


def test_words_beat_the_most_frequent_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with script("bench_baselines", monkeypatch) as main:
        main("sentiment", "--balanced")
    first, *figures = capsys.readouterr().out.splitlines()
    assert first.startswith("TF-IDF, balanced logistic regression, C = ")
    found = {line.split()[0]: float(line.split()[1]) for line in figures}
    labels = list(Sentiment().load().splits["test"]["label"])
    assert found["accuracy"] > max(map(labels.count, set(labels))) / len(labels)


def test_cosines_are_those_of_query_and_passage_read_apart(
    tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Transformer(str(tiny_folder()))
    encoder = SentenceTransformer(modules=[base, Pooling(base.get_embedding_dimension())], device="cpu")
    encoder.save(str(tmp_path / "encoder"))
    folder = write_set(tmp_path / "data")
    with script("bench_baselines", monkeypatch) as main:
        main("reranking", "--dataset", str(folder), "--encoder", str(tmp_path / "encoder"), "--max-length", "8")
    task = Reranking(str(folder))
    examples = task.load()
    encoder.max_seq_length = 8
    rows = examples.splits["test"]
    one, other = (
        torch.tensor(encoder.encode(list(rows[name]), normalize_embeddings=True)) for name in ("text", "pair")
    )
    judge = task.judge(examples)
    expected = judge.value("ndcg_at_10", judge.answers((one * other).sum(-1, keepdim=True)))
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ndcg_at_10"))
    assert float(printed.split()[1]) == pytest.approx(expected, abs=6e-4)
