"""CPU latency of a compact model against its dense one, alternated in one run.

    python scripts/bench_inference.py --dense DIR --compact DIR
    python scripts/bench_inference.py                  # MiniLM with 75 % fewer neurons, not trained: speed alone

Prints the median and the quartiles of both, and the median of the pairwise ratios, at batch 1 and 16, 64 tokens.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from finllm_prune.checkpoints.compact import compact
from finllm_prune.evaluation import measure
from finllm_prune.families import find_family
from finllm_prune.hub.base_model import locate
from finllm_prune.pruning import Constant, Magnitude, Neuron, Pruner, Rule


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--compact", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's default")
    args = parser.parse_args()
    if (args.dense is None) != (args.compact is None):
        parser.error("name both --dense and --compact, or neither")
    if args.threads:
        torch.set_num_threads(args.threads)
    dense, small = (load(args.dense), load(args.compact)) if args.dense else untrained()
    print("| batch x tokens | threads | dense ms [IQR] | compact ms [IQR] | ratio, median |")
    print("|---|---|---|---|---|")
    for batch in args.batches:
        entry = measure(dense, small, batch, args.tokens, args.rounds)
        cells = [
            f"{median:.1f} [{iqr[0]:.1f}, {iqr[1]:.1f}]"
            for median, iqr in ((entry.dense_ms, entry.dense_iqr_ms), (entry.small_ms, entry.small_iqr_ms))
        ]
        print(f"| {batch} x {args.tokens} | {entry.threads} | {cells[0]} | {cells[1]} | {entry.ratio:.2f} |")


def load(folder: Path) -> PreTrainedModel:
    """A saved model."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder)
    return model


def untrained() -> tuple[PreTrainedModel, PreTrainedModel]:
    """MiniLM, and a copy without the 75 % of its neurons that have the lowest norm."""
    location, _ = locate("sentence-transformers/all-MiniLM-L6-v2")
    dense, pruned = (AutoModelForSequenceClassification.from_pretrained(location) for _ in range(2))
    rules = [Rule("mlp", 0.75, structure=Neuron(), criterion=Magnitude())]
    Pruner(find_family(pruned.config.model_type).groups(pruned, rules), Constant()).finish()
    return dense, compact(pruned)


if __name__ == "__main__":
    main()
