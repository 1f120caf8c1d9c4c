"""What a task is worth without a fine-tuned transformer: TF-IDF with logistic regression, or the cosines of a sentence encoder.

    python scripts/bench_baselines.py sentiment --dataset FOLDER            # also filings: --balanced
    python scripts/bench_baselines.py reranking --dataset FOLDER [--encoder MODEL] [--max-length 64] [--split test]

Both are measured as `finllm-prune evaluate` measures a model, with intervals over the same rows. Classes: words and pairs of
words (scikit-learn's TfidfVectorizer, sublinear), C chosen among 1, 3, 10 and 30 by macro-F1 on the validation split. Rankings:
the candidates of each query, by the cosine of query and passage, each read apart and cut to --max-length tokens. The default is
the embedded data, and all-MiniLM-L6-v2.
"""

import argparse
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from finllm_prune.evaluation import compare
from finllm_prune.hub.base_model import locate
from finllm_prune.tasks import find_task
from finllm_prune.tasks.task import Examples


def words(examples: Examples, task: Any, balanced: bool) -> tuple[str, torch.Tensor]:
    """What it is called, and log-probabilities of the test rows, (rows, classes)."""
    train, judge = examples.splits["train"], task.judge(examples, "validation")
    best: tuple[float, float, Any] | None = None
    for strength in (1.0, 3.0, 10.0, 30.0):
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            LogisticRegression(C=strength, class_weight="balanced" if balanced else None, max_iter=2000),
        ).fit(list(train["text"]), list(train["label"]))
        found = judge.value("macro_f1", judge.answers(told(model, examples, "validation")))
        if best is None or found > best[0]:
            best = found, strength, model
    assert best is not None
    kind = "balanced logistic regression" if balanced else "logistic regression"
    return f"TF-IDF, {kind}, C = {best[1]:g}", told(best[2], examples, "test")


def told(model: Any, examples: Examples, split: str) -> torch.Tensor:
    """Log-probabilities; a class that no training row has is never said."""
    logits = np.full((len(examples.splits[split]), len(examples.labels)), -np.inf)
    logits[:, model.classes_] = model.predict_log_proba(list(examples.splits[split]["text"]))
    return torch.from_numpy(logits)


def cosines(examples: Examples, encoder: str, tokens: int, split: str) -> torch.Tensor:
    """(pairs, 1), in the order of the rows."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(locate(encoder)[0], device="cpu")
    model.max_seq_length = tokens
    rows = examples.splits[split]
    sides = []
    for column, encode in (("text", model.encode_query), ("pair", model.encode_document)):
        texts = list(dict.fromkeys(rows[column]))
        vectors = encode(texts, normalize_embeddings=True, convert_to_tensor=True)
        place = {text: i for i, text in enumerate(texts)}
        sides.append(vectors[[place[text] for text in rows[column]]])
    return (sides[0] * sides[1]).sum(-1, keepdim=True).cpu()


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sentiment", "filings", "reranking"])
    parser.add_argument("--dataset", default="builtin", help="a folder, or an id of the Hub")
    parser.add_argument("--balanced", action="store_true", help="weigh classes alike")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="of a ranking")
    args = parser.parse_args()
    task = find_task(args.task)(dataset=args.dataset)
    examples = task.load()
    split = args.split if args.task == "reranking" else "test"
    if args.task == "reranking":
        name, logits = f"cosines of {args.encoder}", cosines(examples, args.encoder, args.max_length, split)
    else:
        name, logits = words(examples, task, args.balanced)
    judge = task.judge(examples, split)
    units = {"row": "rows", "query": "queries"}[judge.unit]
    print(f"{name}; {split} split of {args.dataset}, {len(judge)} {units}")
    for metric, found in compare(judge, logits, logits, seed=42).metrics.items():
        low, high = found["pruned_interval"]
        print(f"{metric:16} {found['pruned']:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
