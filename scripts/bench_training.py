"""What pruning costs per optimizer step and in memory, against the plain `transformers.Trainer` on the same batches.

    python scripts/bench_training.py [--rounds 3] [--steps 32]

MiniLM-L6 with its real weights, batch 32 x 64 tokens, AdamW, no distillation. Each round trains every variant once, in turn,
for the same few steps; the masks are chosen as often as in a run of 256 steps (64 times between 5 % and 70 % of it), and the
ratio is taken round by round. The peak of the resident memory is read in a process of its own per variant.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import datasets
import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from finllm_prune.families import find_family, shrink, without_effect
from finllm_prune.hub.base_model import locate
from finllm_prune.pruning import Cubic, Global, Head, Magnitude, Neuron, Pruner, Rule
from finllm_prune.training import PruningTrainer, Recording

VARIANTS: dict[str, list[Rule]] = {
    "plain Trainer": [],
    "unstructured, global": [Rule("encoder", 0.9, budget=Global())],
    "neurons": [Rule("mlp", 0.75, structure=Neuron())],
    "unstructured, global, recorded": [Rule("encoder", 0.9, budget=Global())],
    "heads": [Rule("attention", 0.5, structure=Head())],
    "neurons and heads": [Rule("mlp", 0.75, structure=Neuron()), Rule("attention", 0.5, structure=Head())],
    "recovery without 75 % of neurons and heads": [
        Rule("mlp", 0.75, Neuron(), Magnitude()),
        Rule("attention", 0.75, Head(), Magnitude()),
    ],
}


class Clock(TrainerCallback):
    """Sums the time from the beginning to the end of each step; the first one warms up and is left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self.begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.begin)


def train(variant: str, steps: int, batch: int, tokens: int) -> float:
    """Train one variant afresh and return the seconds per step."""
    set_seed(0)
    location, _ = locate("sentence-transformers/all-MiniLM-L6-v2")
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(location, num_labels=3)
    ids = torch.randint(1000, 30000, (steps * batch, tokens))
    rows = datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": (ids[:, 0] % 3).tolist()}
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-4, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, weight_decay=0.01,
        )  # fmt: skip
        rules = VARIANTS[variant]
        if variant.startswith("recovery"):
            Pruner(find_family(model.config.model_type).groups(model, rules), Cubic()).finish()
            trainer: Trainer = PruningTrainer(shrink(model, without_effect(model)), arguments, train_dataset=rows)
        elif rules:
            schedule = Cubic(updates=max(1, steps // 4))
            pruner = Pruner(find_family(model.config.model_type).groups(model, rules), schedule)
            # As in a run of 256 steps, which has a moment every six steps.
            recording = Recording(every=min(1.0, 6 / steps)) if variant.endswith("recorded") else None
            trainer = PruningTrainer(model, arguments, train_dataset=rows, pruner=pruner, recording=recording)
        else:
            model.accepts_loss_kwargs = False
            trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.add_callback(clock)  # behind all others, so that their work at the end of a step is counted
        trainer.train()
    return sum(clock.seconds[1:]) / (steps - 1)


def peak_megabytes(variant: str, args: argparse.Namespace) -> float:
    """The peak resident memory of a process that trains one variant for ten steps."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        variant,
        "--batch",
        str(args.batch),
        "--tokens",
        str(args.tokens),
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        train(args.memory_of, 10, args.batch, args.tokens)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    memory = {variant: peak_megabytes(variant, args) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant, series in times.items():
            series.append(train(variant, args.steps, args.batch, args.tokens))
    plain = times["plain Trainer"]
    print(
        f"\nMiniLM-L6, batch {args.batch} x {args.tokens} tokens, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    print("| variant | seconds per step, median | ratio to plain: median (min to max) | peak memory, MB | ratio |")
    print("|---|---|---|---|---|")
    for variant, series in times.items():
        ratios = [own / base for own, base in zip(series, plain, strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        share = memory[variant] / memory["plain Trainer"]
        print(f"| {variant} | {statistics.median(series):.3f} | {spread} | {memory[variant]:.0f} | {share:.2f} |")


if __name__ == "__main__":
    main()
