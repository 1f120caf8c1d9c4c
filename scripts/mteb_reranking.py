"""A reranker measured by mteb, on the questions and candidates of a set in BEIR's layout.

    python scripts/mteb_reranking.py outputs/reranking/compact                     # the embedded questions
    python scripts/mteb_reranking.py outputs/fiqa/compact --dataset path/to/fiqa   # a folder, or a Hub id

mteb asks ``sentence_transformers.CrossEncoder`` for the scores of each query's first passages and computes its own figures from
them; `finllm-prune evaluate` gives the same ones, with intervals. Needs `pip install 'finllm-prune[mteb]'`.
"""

import argparse
from typing import Any

import datasets
import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import CrossEncoder

from finllm_prune.tasks.reranking import Reranking

FIGURES = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "Recall@10": "recall_at_10", "Recall@100": "recall_at_100"}


class Local(AbsTaskRetrieval):
    """The test split of a task of ours as mteb has it: corpus, queries, judgements and the candidates to be ranked."""

    metadata = TaskMetadata(
        name="FinllmPruneReranking", description="Candidates of a first stage, to be put into order", type="Reranking",
        category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
        dataset={"path": "local", "revision": "local"},
    )  # fmt: skip

    def __init__(self, task: Reranking):
        super().__init__()
        self.task = task

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """A query without candidates is left to mteb as it is: judged, with nothing to rank."""
        examples = self.task.load()
        judged, pools = examples.judged["test"], examples.pools["test"]
        rows = examples.splits["test"]
        pairs = [(query, passage) for query in judged for passage in pools.get(query, ())]
        queries = dict.fromkeys(judged, "") | {q: text for (q, _), text in zip(pairs, rows["text"], strict=True)}
        corpus = {passage: text for (_, passage), text in zip(pairs, rows["pair"], strict=True)}
        tables = {
            name: datasets.Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
            for name, texts in (("queries", queries), ("corpus", corpus))
        }
        ranked = {query: list(pools.get(query, ())) for query in judged}
        self.dataset = {"default": {"test": {**tables, "relevant_docs": judged, "top_ranked": ranked}}}
        self.data_loaded = True


def measure(model: str, task: Reranking) -> dict[str, float]:
    """Name -> what mteb makes of it on the test split."""
    found = mteb.evaluate(CrossEncoder(model), Local(task), cache=None, show_progress_bar=False)
    (scores,) = found.task_results[0].scores["test"]
    return {name: float(scores[key]) for name, key in FIGURES.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a cross-encoder: a folder or Hub id")
    parser.add_argument("--dataset", default="builtin", help="builtin, a folder in BEIR's layout, or a Hub id")
    parser.add_argument("--candidates", type=int, default=100, help="passages of the first stage for each query")
    args = parser.parse_args()
    for name, value in measure(args.model, Reranking(args.dataset, candidates=args.candidates)).items():
        print(f"{name} {value:.5f}")


if __name__ == "__main__":
    main()
