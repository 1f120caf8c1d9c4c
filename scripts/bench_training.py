"""What pruning costs per optimizer step and in memory, against the plain `transformers.Trainer` on the same batches.

    python scripts/bench_training.py [--rounds 3] [--steps 32]
    python scripts/bench_training.py --only taught kept recovery      # and what a whole run costs with its teacher

MiniLM-L6 with its real weights, batch 32 x 64 tokens, AdamW; a teacher of the same size where the variant says so, for logits
and hidden states. Each round trains every variant once, in turn, for the same few steps; the masks are chosen as often as in
a run of 256 steps (64 times between 5 % and 70 % of it), and the ratio is taken round by round. The peak of the resident
memory is read in a process of its own per variant.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    default_data_collator,
    set_seed,
)

from finllm_prune.families import find_family, shrink, without_effect
from finllm_prune.hub.base_model import locate
from finllm_prune.pruning import Cubic, Global, Head, Magnitude, Neuron, Pruner, Rule
from finllm_prune.training import Distillation, PruningTrainer, Recording, Teacher

_THREE_QUARTERS = (Rule("mlp", 0.75, Neuron(), Magnitude()), Rule("attention", 0.75, Head(), Magnitude()))


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Args:
        rules: what is cut while it is trained; without any, the plain Trainer trains the dense model.
        small: whether that is gone before the first step, as in recovery.
        teacher: that runs ``beside`` the student, or whose answers are ``kept``; None trains on labels alone.
        recorded: by the flight recorder.
    """

    rules: Sequence[Rule] = ()
    small: bool = False
    teacher: str | None = None
    recorded: bool = False


PLAIN, PASS, RECORDER = "plain Trainer", "one pass of the teacher, kept", "of it, the flight recorder itself"
_EVERY = 6  # steps between two moments of the flight recorder in a run of 256
VARIANTS = {
    PLAIN: Variant(),
    "unstructured, global": Variant([Rule("encoder", 0.9, budget=Global())]),
    "neurons": Variant([Rule("mlp", 0.75, structure=Neuron())]),
    "unstructured, global, recorded": Variant([Rule("encoder", 0.9, budget=Global())], recorded=True),
    "heads": Variant([Rule("attention", 0.5, structure=Head())]),
    "neurons and heads": Variant([Rule("mlp", 0.75, structure=Neuron()), Rule("attention", 0.5, structure=Head())]),
    "neurons and heads, taught": Variant(_THREE_QUARTERS, teacher="beside"),
    "neurons and heads, teacher kept": Variant(_THREE_QUARTERS, teacher="kept"),
    "recovery without 75 % of neurons and heads": Variant(_THREE_QUARTERS, small=True),
    "recovery, taught": Variant(_THREE_QUARTERS, small=True, teacher="beside"),
    "recovery, teacher kept": Variant(_THREE_QUARTERS, small=True, teacher="kept"),
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


def train(name: str, steps: int, batch: int, tokens: int) -> dict[str, float]:
    """Train one variant afresh; its seconds per step, and those of the teacher's pass over as many rows, where it is kept."""
    set_seed(0)
    variant = VARIANTS[name]
    location, _ = locate("sentence-transformers/all-MiniLM-L6-v2")
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(location, num_labels=3)
    rows = random_rows(steps * batch, tokens)
    clock = Clock()
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-4, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, weight_decay=0.01,
        )  # fmt: skip
        parts: dict[str, Any] = {}
        if variant.teacher is not None:
            dense = AutoModelForSequenceClassification.from_pretrained(location, num_labels=3)
            teacher = parts["teacher"] = Teacher(dense, Distillation(), range(model.config.num_hidden_layers))
            teacher.to(arguments.device)
        if variant.teacher == "kept":
            began = time.perf_counter()
            rows = teacher.keep_answers(rows, default_data_collator, Path(folder))
            spent[PASS] = (time.perf_counter() - began) / steps
        trainer: Trainer
        if not variant.rules:
            model.accepts_loss_kwargs = False
            trainer = Trainer(model, arguments, train_dataset=rows)
        else:
            groups = find_family(model.config.model_type).groups(model, list(variant.rules))
            if variant.small:
                Pruner(groups, Cubic()).finish()
                model = shrink(model, without_effect(model))
            else:
                parts["pruner"] = Pruner(groups, Cubic(updates=max(1, steps // 4)))
                parts["recording"] = Recording(every=min(1.0, _EVERY / steps)) if variant.recorded else None
            trainer = PruningTrainer(model, arguments, train_dataset=rows, **parts)
        looks: list[float] = []
        if isinstance(trainer, PruningTrainer) and trainer.recorder is not None:
            vars(trainer.recorder)["on_step_end"] = timed(trainer.recorder.on_step_end, looks)
        trainer.add_callback(clock)  # behind all others, so that their work at the end of a step is counted
        trainer.train()
        if looks:
            spent[RECORDER] = sum(looks) / len(trainer.recorder.moments) / _EVERY
    return {name: sum(clock.seconds[1:]) / (steps - 1)} | spent


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, with the seconds of each call put down."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = call(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return result

    return measured


def random_rows(count: int, tokens: int) -> datasets.Dataset:
    """So many texts of random tokens, of three classes."""
    ids = torch.randint(1000, 30000, (count, tokens))
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": (ids[:, 0] % 3).tolist()}
    )


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
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="of the variants those with one of these in their names"
    )
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        train(args.memory_of, 10, args.batch, args.tokens)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    names = [name for name in VARIANTS if name == PLAIN or any(word in name for word in args.only or [name])]
    memory = {name: peak_megabytes(name, args) for name in names}
    times: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        found: dict[str, float] = {}
        for name in names:
            found |= train(name, args.steps, args.batch, args.tokens)
        for name, seconds in found.items():
            times.setdefault(name, []).append(seconds)
    print(
        f"\nMiniLM-L6, batch {args.batch} x {args.tokens} tokens, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    print("| variant | seconds per step, median | ratio to plain: median (min to max) | peak memory, MB | ratio |")
    print("|---|---|---|---|---|")
    ratios = {
        name: [own / base for own, base in zip(series, times[PLAIN], strict=True)] for name, series in times.items()
    }
    for name, own in ratios.items():
        spread = f"{statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f})"
        space = f"{memory[name]:.0f} | {memory[name] / memory[PLAIN]:.2f}" if name in memory else " | "
        print(f"| {name} | {statistics.median(times[name]):.3f} | {spread} | {space} |")
    if all(
        f"{what}, {how}" in ratios for what in ("neurons and heads", "recovery") for how in ("taught", "teacher kept")
    ):
        print("\n" + whole_runs({name: statistics.median(own) for name, own in ratios.items()}))


def whole_runs(cost: dict[str, float], dense: int = 4, pruned: int = 8) -> str:
    """The cost of whole runs, as parts of as many dense steps: ``dense`` epochs for the teacher and ``pruned`` for the rest.

    Args:
        cost: of a step, as a part of one of the plain Trainer.
    """
    lines = [
        "| of the pruned epochs at full size | teacher | cost of all epochs, of as many dense ones |",
        "|---|---|---|",
    ]
    for full in (1.0, 0.5, 0.3):
        for kind in ("taught", "teacher kept"):
            passes = cost[PASS] if kind == "teacher kept" else 0.0
            steps = full * cost[f"neurons and heads, {kind}"] + (1.0 - full) * cost[f"recovery, {kind}"]
            lines.append(f"| {full:.0%} | {kind} | {(dense + pruned * steps + passes) / (dense + pruned):.2f} |")
    return "\n".join([*lines, f"\n{dense} epochs for the dense teacher, {pruned} for pruning and recovery."])


if __name__ == "__main__":
    main()
