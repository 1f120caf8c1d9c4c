"""Quality of pruning methods at equal steps: ours, other projects', and dense fine-tuning as the ceiling.

    python scripts/bench_methods.py --data DATA --sparsities 0.5 0.75 0.9 --seeds 3 --out outputs/bench_methods
    python scripts/bench_methods.py --data DATA --methods dense movement --sparsities 0.9 --seeds 1 --threads 1
    python scripts/bench_methods.py --table-only --out outputs/bench_methods

One dense model is fine-tuned per seed; every method then starts from it and gets the same batches, steps and, unless its name
ends in _labels, the same distillation. With several --learning-rates each method runs each of them, and the table shows
the one with the best macro-F1 on the validation split. A cell is a method at a sparsity, a seed and a learning rate.

Each finished cell is one line of OUT/rows.jsonl. Stop it at any time: the same command goes on, and runs no cell twice
unless its settings or a default in the code have changed. Start it several times with the same OUT, with the same or with
other --methods, and the processes share the work. At the end: the table, and OUT/macro_f1.png.

DATA is a folder of train/validation/test splits with columns text and label, as Financial PhraseBank. A criterion NAME of
a recipe is two methods: NAME cuts single weights, structured_NAME neurons and heads. Methods that begin with
torch_pruning need their package: pip install 'finllm-prune[bench]'.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from bench.cells import Cell, append, claimed, read
from bench.measure import run
from bench.methods import DEFAULT, METHODS
from bench.peers import torch_pruning
from bench.protocol import Protocol
from bench.table import plot, table
from finllm_prune.errors import InputError


def main(argv: Sequence[str] | None = None, **defaults: Any) -> None:
    """Run what is missing; print the table and draw the plot. ``defaults`` are those of the command line."""
    parser = command_line()
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if not args.table_only:
        try:
            protocol, cells = grid(args)
        except InputError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        args.out.mkdir(parents=True, exist_ok=True)
        run_missing(cells, protocol)
    rows = read(args.out)
    if not rows:
        parser.exit(2, f"{parser.prog}: {args.out} holds no finished cell; run without --table-only first\n")
    plot(rows.values(), args.out / "macro_f1.png")
    print(f"\n{table(rows.values())}")


def grid(args: argparse.Namespace) -> tuple[Protocol, list[Cell]]:
    """All cells of the command line, seed by seed. Raises InputError for everything that can be found wrong by now."""
    if args.data is None:
        raise InputError("--data is missing: name a folder of train/validation/test splits")
    if unknown := [name for name in args.methods if name not in METHODS]:
        raise InputError(f"--methods: unknown name '{unknown[0]}'; known: {', '.join(METHODS)}")
    if any(not 0 < sparsity < 1 for sparsity in args.sparsities):
        raise InputError("--sparsities: they must lie between 0 and 1, exclusive")
    if any(name.startswith("torch_pruning") for name in args.methods):
        torch_pruning()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.progress:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    names = ("data", "model", "rows", "epochs", "dense_epochs", "dense_learning_rate", "out", "progress", "bf16")
    protocol = Protocol(**{name: getattr(args, name) for name in names})
    cells = [
        protocol.cell(method, sparsity, seed, rate)
        for seed in range(args.seed, args.seed + args.seeds)
        for sparsity in (0.0, *args.sparsities)
        for method in args.methods
        if METHODS[method].dense == (sparsity == 0)
        for rate in args.learning_rates
    ]
    return protocol, cells


def run_missing(cells: list[Cell], protocol: Protocol) -> None:
    """One line per cell; what another process works on is left to it."""
    done = read(protocol.out)
    missing = [cell for cell in cells if cell.key not in done]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished earlier.", flush=True)
    spent: list[float] = []
    for number, cell in enumerate(missing, 1):
        place = f"[{number}/{len(missing)}] {cell}"
        with claimed(protocol.out, cell.key) as mine:
            if not mine or cell.key in read(protocol.out):
                print(f"{place}: another process has it", flush=True)
                continue
            began = time.time()
            row = run(cell, protocol)
            append(protocol.out, row)
        spent.append(time.time() - began)
        left = (len(missing) - number) * sum(spent) / len(spent)
        note = ", collapsed to one class" if row["test"]["collapsed"] else ""
        print(
            f"{place}: macro-F1 {row['test']['macro_f1']['pruned']:.3f}{note}, "
            f"{spent[-1]:.0f} s; {left / 3600:.0f} h {left % 3600 / 60:.0f} min left",
            flush=True,
        )


def command_line() -> argparse.ArgumentParser:
    """The flags, most asked for first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of train/validation/test splits")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted on from --seed")
    parser.add_argument("--seed", type=int, default=42, help="the first")
    parser.add_argument(
        "--methods", nargs="+", default=DEFAULT, metavar="METHOD", help=f"of {', '.join(METHODS)}; default: {' '.join(DEFAULT)}"
    )  # fmt: skip
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[4e-4], help="each method runs each of them")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_methods"))
    parser.add_argument("--table-only", action="store_true", help="print and plot what is there; run nothing")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a folder or Hub id")
    parser.add_argument("--rows", type=int, default=1024, help="training rows: a fixed random sample")
    parser.add_argument("--epochs", type=float, default=8.0, help="of each method; 8 over 1024 rows are 256 steps")
    parser.add_argument("--dense-epochs", type=float, default=4.0, help="of the dense model that all start from")
    parser.add_argument("--dense-learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the default")
    parser.add_argument("--bf16", action="store_true", help="train all of them in bfloat16 autocast")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    return parser


if __name__ == "__main__":
    main()
