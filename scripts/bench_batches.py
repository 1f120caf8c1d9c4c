"""Training throughput: batches of texts of like length, tokenized once, against the plain Trainer with padding to max_length.

    python scripts/bench_batches.py [--data FOLDER] [--rounds 5] [--rows 512] [--max-length 128]

MiniLM-L6 with its real weights, AdamW, fine-tuning without pruning or teacher, one epoch of the same texts for both sides: the
embedded sentences, or the rows of FOLDER/train. The plain side is what many scripts do: transformers.Trainer, rows tokenized by
`map` with padding="max_length". A second plain side pads each batch to its longest text, in random order. Rounds take turns, so
that the ratio is taken round by round. Tokenizing is counted for all: once, as `datasets` keeps it between epochs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from finllm_prune.hub.base_model import locate
from finllm_prune.loading import without_load_report
from finllm_prune.tasks.sentiment import Sentiment
from finllm_prune.training import PruningTrainer

LOCATION, _ = locate("sentence-transformers/all-MiniLM-L6-v2")
Side = Callable[[Sentiment, datasets.Dataset, PreTrainedTokenizerBase, TrainingArguments], Trainer]


def model_for(labels: int) -> AutoModelForSequenceClassification:
    """The same fresh head on all sides."""
    set_seed(0)
    with without_load_report():
        return AutoModelForSequenceClassification.from_pretrained(LOCATION, num_labels=labels)


def bucketed(
    task: Sentiment, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> Trainer:
    """What a recipe with `train_sampling_strategy: group_by_length` does."""
    args.train_sampling_strategy = "group_by_length"
    tokens = task.tokenize(rows, tokenizer)
    model = model_for(len(set(rows["label"])))
    return PruningTrainer(model, args, train_dataset=tokens, data_collator=task.collator(tokenizer))


def to_longest(
    task: Sentiment, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> Trainer:
    """The plain Trainer, each batch padded to its longest text."""
    tokens = task.tokenize(rows, tokenizer)
    return plain(model_for(len(set(rows["label"]))), args, tokens, DataCollatorWithPadding(tokenizer))


def to_max_length(
    task: Sentiment, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> Trainer:
    """The plain Trainer, each text padded to max_length."""
    tokens = rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=task.max_length, padding="max_length"),
        batched=True, remove_columns=["text"], load_from_cache_file=False,
    ).rename_column("label", "labels")  # fmt: skip
    return plain(model_for(len(set(rows["label"]))), args, tokens, default_data_collator)


def plain(model: torch.nn.Module, args: TrainingArguments, tokens: datasets.Dataset, collator: object) -> Trainer:
    """transformers' own, its loss scaled as it should be."""
    model.accepts_loss_kwargs = False
    return Trainer(model, args, train_dataset=tokens, data_collator=collator)


SIDES: dict[str, Side] = {
    "plain Trainer, padding to max_length": to_max_length,
    "plain Trainer, padding to the longest of a batch": to_longest,
    "finllm-prune, length buckets": bucketed,
}


def seconds(side: Side, task: Sentiment, rows: datasets.Dataset, batch: int) -> tuple[float, float]:
    """Of tokenizing and one epoch; and the mean loss of the epoch, which says that all sides train."""
    tokenizer = AutoTokenizer.from_pretrained(LOCATION)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=1e-4, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, report_to="none",
        )  # fmt: skip
        begin = time.perf_counter()
        trainer = side(task, rows, tokenizer, args)
        result = trainer.train()
        return time.perf_counter() - begin, result.training_loss


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="builtin", help="a folder of splits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    task = Sentiment(dataset=args.data, max_length=args.max_length)
    train = task.load().splits["train"]
    rows = train.shuffle(seed=0).select(range(min(args.rows, len(train)))).flatten_indices()
    lengths = sorted(len(ids) for ids in task.tokenize(rows, AutoTokenizer.from_pretrained(LOCATION))["input_ids"])
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, side in SIDES.items():
            took, losses[name] = seconds(side, task, rows, args.batch)
            times[name].append(took)
    print(
        f"\nMiniLM-L6, {len(rows)} texts of {Path(args.data).name}, {statistics.median(lengths):.0f} tokens in the median and "
        f"{lengths[-1]} at most, max_length {args.max_length}, batch {args.batch}, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds"
    )
    print("| | texts per second, median | times the first: median (min to max) | mean loss |")
    print("|---|---|---|---|")
    first = next(iter(times.values()))
    for name, series in times.items():
        ratios = [base / own for own, base in zip(series, first, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {len(rows) / statistics.median(series):.1f} | {spread} | {losses[name]:.3f} |")


if __name__ == "__main__":
    main()
