"""Quality at equal steps: movement pruning beside `torch.nn.utils.prune` gradual magnitude, and dense fine-tuning.

    python scripts/bench_quality.py --data DATA --rows 1024 --sparsities 0.75 0.9 --seeds 42 --out outputs/bench_quality

One dense MiniLM is fine-tuned per seed (4 epochs); every method then starts from it and runs 8 epochs with the same batches,
learning rate and distillation. Resumable: a finished cell is read from its report, never run again. DATA is a folder of
train/validation/test splits with columns text and label, as Financial PhraseBank.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finllm_prune.evaluation import compare, predict
from finllm_prune.families import find_family
from finllm_prune.prepare import Prepared, load_model, prepare, training_arguments
from finllm_prune.pruning import Cubic
from finllm_prune.recipe import Recipe, parse
from finllm_prune.run import run
from finllm_prune.training import PruningTrainer, Teacher

METHODS = {
    "movement": [{"target": "encoder", "criterion": "movement", "structure": "unstructured", "budget": "global"}],
    "soft_movement": [
        {"target": "encoder", "criterion": "soft_movement", "structure": "unstructured", "budget": "global"}
    ],
    "magnitude": [{"target": "encoder", "criterion": "magnitude", "structure": "unstructured", "budget": "global"}],
    "neurons": [{"target": "mlp", "criterion": "movement", "structure": "neuron", "budget": "uniform"}],
}


def main() -> None:
    """Run what is missing and print the table."""
    args = arguments()
    lines = []
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        dense = dense_baseline(args, seed, folder / "dense")
        lines.append(("dense, 4 epochs", 0.0, seed, dense))
        cells: Iterable[tuple[str, float]] = [(method, s) for s in args.sparsities for method in args.methods]
        for method, sparsity in cells:
            out = folder / f"{method}-{sparsity:g}"
            if method == "torch_gradual":
                figures = torch_gradual(args, seed, folder, out, sparsity)
            elif method == "dense":
                figures = torch_gradual(args, seed, folder, folder / "dense-longer", 0.0)
            else:
                figures = ours(args, seed, folder, out, METHODS[method], sparsity)
            lines.append((method, sparsity, seed, figures))
            print(line(*lines[-1]), flush=True)
    print(
        "\n| method | sparsity | seed | macro-F1 [95 % interval] | accuracy | encoder sparsity | latency ratio, batch 1 / 16 |"
    )
    print("|---|---|---|---|---|---|---|")
    for entry in lines:
        print(line(*entry))


def recipe(args: argparse.Namespace, seed: int, rules: list[dict[str, Any]], output: Path, **more: Any) -> Recipe:
    """The protocol of the page's head, as a recipe."""
    coupled = any(rule.get("structure") == "neuron" for rule in rules)
    return parse(
        {
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "task": {"name": "sentiment", "dataset": str(args.data), "max_length": 64, "train_rows": args.rows},
            "pruning": {"rules": rules},
            "training": {
                "num_train_epochs": args.epochs,
                "learning_rate": args.learning_rate,
                "per_device_train_batch_size": 32,
                "warmup_steps": 0.06,
                "weight_decay": 0.01,
                "train_sampling_strategy": "group_by_length",
                "disable_tqdm": not args.progress,
                "seed": seed,
            },
            "export": ["masked", "compact"] if coupled else ["masked"],
            "output": str(output),
            **more,
        }
    )


def dense_baseline(args: argparse.Namespace, seed: int, out: Path) -> dict[str, Any]:
    """Fine-tune the dense model that all methods start from and are taught by."""
    if not (out / "figures.json").is_file():
        some_rule = [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]
        ready = prepare(recipe(args, seed, some_rule, out, dense={}), resume=False, overwrite=True)
        changes = {"num_train_epochs": args.dense_epochs, "learning_rate": args.dense_learning_rate}
        arguments = training_arguments(ready.recipe, ready.work, "dense", changes)
        train(ready, ready.model, arguments)
        ready.model.save_pretrained(out)
        ready.tokenizer.save_pretrained(out)
        finish(ready, ready.model, ready.model, out)
    return read(out / "figures.json")


def ours(
    args: argparse.Namespace, seed: int, folder: Path, out: Path, rules: list[dict[str, Any]], sparsity: float
) -> dict[str, Any]:
    """One run of the product."""
    if not (out / "report.json").is_file():
        rules = [{**rule, "sparsity": sparsity} for rule in rules]
        run(recipe(args, seed, rules, out, dense={"checkpoint": str(folder / "dense")}), overwrite=True)
    return read(out / "report.json")


def torch_gradual(args: argparse.Namespace, seed: int, folder: Path, out: Path, sparsity: float) -> dict[str, Any]:
    """`torch.nn.utils.prune` global magnitude on the same cubic schedule; sparsity 0 is plain dense fine-tuning."""
    if not (out / "figures.json").is_file():
        rule = [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]
        plan = recipe(args, seed, rule, out, dense={"checkpoint": str(folder / "dense")})
        ready = prepare(plan, resume=False, overwrite=True)
        student = load_model(plan.task, str(folder / "dense"), ready.examples.labels)
        family = find_family(student.config.model_type)
        linears = list(family.linears(student).values())
        teacher_model = load_model(plan.task, str(folder / "dense"), ready.examples.labels)
        assert plan.distillation is not None
        teacher = Teacher(teacher_model, plan.distillation, range(len(family.layers(student))))
        callbacks = [TorchGradual(linears, sparsity)] if sparsity else []
        train(ready, student, ready.arguments, teacher=teacher, callbacks=callbacks)
        for linear in linears if sparsity else []:
            prune.remove(linear, "weight")
        out.mkdir(parents=True, exist_ok=True)
        finish(ready, teacher_model, student, out)
    return read(out / "figures.json")


class TorchGradual(TrainerCallback):
    """Cuts the lowest magnitudes of all layers together, up to the schedule's sparsity, as often as we do."""

    def __init__(self, linears: list[nn.Linear], sparsity: float):
        self.parameters = [(linear, "weight") for linear in linears]
        self.sparsity = sparsity
        self.schedule = Cubic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        before, now = (state.global_step - 1) / state.max_steps, state.global_step / state.max_steps
        if self.schedule.due(before, now):
            total = sum(linear.weight.numel() for linear, _ in self.parameters)
            cut = sum(int((linear.weight == 0).sum()) for linear, _ in self.parameters)
            wanted = round(self.sparsity * self.schedule.fraction(now) * total)
            if wanted > cut:
                prune.global_unstructured(self.parameters, prune.L1Unstructured, amount=wanted - cut)


def train(ready: Prepared, model: nn.Module, arguments: TrainingArguments, **parts: Any) -> None:
    """Fine-tune on the protocol's rows."""
    PruningTrainer(
        model, arguments, train_dataset=ready.tokens["train"], processing_class=ready.tokenizer,
        data_collator=ready.recipe.task.collator(ready.tokenizer), **parts,
    ).train()  # fmt: skip


def finish(ready: Prepared, dense: nn.Module, model: nn.Module, out: Path) -> None:
    """Measure a model on the test split and write its figures."""
    test, collator = ready.tokens["test"], ready.recipe.task.collator(ready.tokenizer)
    quality = compare(
        predict(dense, test, collator), predict(model, test, collator), np.array(test["labels"]),
        ready.examples.labels, ready.recipe.task.metrics,
    )  # fmt: skip
    linears = find_family(model.config.model_type).linears(model).values()
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears)
    sparsity = {"encoder_linear": zeros / sum(linear.weight.numel() for linear in linears)}
    figures = {**quality.metrics, "collapsed": quality.collapsed, "sparsity": sparsity}
    (out / "figures.json").write_text(json.dumps(figures))


def line(method: str, sparsity: float, seed: int, figures: dict[str, Any]) -> str:
    """One row of the table."""
    f1, low_high = figures["macro_f1"]["pruned"], figures["macro_f1"]["pruned_interval"]
    ratios = [f"{entry['ratio']:.2f}" for entry in figures.get("latency", []) if entry["model"] == "compact"]
    note = " (collapsed to one class)" if figures["collapsed"] else ""
    return (
        f"| {method} | {sparsity:g} | {seed} | {f1:.3f} [{low_high[0]:.3f}, {low_high[1]:.3f}]{note} "
        f"| {figures['accuracy']['pruned']:.3f} | {figures['sparsity']['encoder_linear']:.3f} | {' / '.join(ratios)} |"
    )


def read(path: Path) -> dict[str, Any]:
    """The figures of a finished cell."""
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train/validation/test splits")
    parser.add_argument("--rows", type=int, default=1024, help="training rows: a fixed random sample")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.75, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument(
        "--methods", nargs="+", default=["dense", "movement", "torch_gradual"], help="also: " + ", ".join(METHODS)
    )
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dense-epochs", type=float, default=4.0)
    parser.add_argument("--dense-learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the default")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_quality"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    main()
