"""How pruning scales: bytes beside plain AdamW, several ranks and what they foretell, shapes of large language models.

    python scripts/bench_scale.py --memory                      # counted, on one rank: MiniLM-L6 and BERT-base
    python scripts/bench_scale.py --plan                        # 1, 2 and 4 gloo ranks here; 8 to 512 GPUs by a model
    python scripts/bench_scale.py --shapes 1b --device cuda     # tokens/s, peak memory, Wanda and SparseGPT; also 8b
    python scripts/bench_scale.py --shapes tiny --device cpu    # only to see that it works

All weights are random. More than one of --memory, --plan and --shapes may be given; --out keeps the figures as JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scale import foretold, memory, shapes

HERE = Path(__file__).parent


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of 1, 2 and 4 ranks, each a process with one thread."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.ranks:
            out = Path(folder) / f"{ranks}.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            numbers = [str(args.steps), str(args.batch), str(args.tokens)]
            subprocess.run([*launch, "-m", "scale.ranks", str(out), args.model, *numbers], env=environment, check=True)
            rows += json.loads(out.read_text())
    return rows


def plan_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Markdown; a row without pruning gives the base of those beside it."""
    base = {(row["engine"], row["ranks"]): row["seconds"] for row in rows if row["pruning"] == "plain"}
    lines = [
        f"{args.model}, random weights, {args.batch} x {args.tokens} tokens per rank, one thread per rank, gloo; "
        f"{os.cpu_count()} cores, which more ranks than that share.\n",
        "| engine | ranks | pruning | steps/s | time, of plain | more where masks are chosen, s "
        "| per step: calls, bytes (formula) | per choice: calls, bytes | model, gradients, AdamW: MB per rank "
        "| pruning: MB per rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["engine"], row["ranks"])):
        (calls, size), (more_calls, more), (said_calls, said) = row["step"], row["choice"], row["foretold"]
        lines.append(
            f"| {row['engine']} | {row['ranks']} | {row['pruning']} | {1 / row['seconds']:.2f} "
            f"| {row['seconds'] / base[row['engine'], row['ranks']]:.2f} | {row['seconds_choosing'] - row['seconds']:.2f} "
            f"| {calls}, {size:,} ({said_calls}, {said:,}) | {more_calls}, {more:,} "
            f"| {row['bytes'] / 1e6:.1f} | {row['held'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def shape_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training with each kind of rules, then one shot; what does not fit is a row that says so."""
    device = torch.device(args.device)
    size = (args.shapes, device)
    work: dict[str, Callable[[], dict[str, Any]]] = {
        f"training, {rules}": lambda rules=rules: shapes.train(
            *size, rules, args.batch, args.tokens, args.steps, args.checkpointing
        )
        for rules in shapes.RULES
    } | {name: lambda name=name: shapes.once(*size, name, args.rows, args.tokens) for name in ("wanda", "sparsegpt")}
    rows = []
    for name, measure in work.items():
        try:
            rows.append(measure())
        except torch.OutOfMemoryError:
            rows.append({"work": name, "failed": "does not fit into memory"})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Measure, print the tables and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--memory", nargs="*", choices=list(memory.SHAPES), help="shapes; without any, MiniLM-L6 and BERT-base"
    )
    parser.add_argument("--plan", action="store_true", help="several gloo ranks on this machine")
    parser.add_argument("--shapes", choices=list(shapes.SHAPES))
    parser.add_argument("--device", default="cuda", help="of --shapes")
    parser.add_argument("--model", default="MiniLM-L6", choices=list(memory.SHAPES), help="of --plan")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="of --plan")
    parser.add_argument("--steps", type=int, default=8, help="of each variant, in turn with the others")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="of one-shot calibration")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in --shapes")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    args = parser.parse_args()
    if args.memory is None and not args.plan and args.shapes is None:
        parser.error("name what is measured: --memory, --plan or --shapes")
    if args.shapes and args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--shapes {args.shapes} --device {args.device}: torch sees no GPU here; use --shapes tiny --device cpu"
        )
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor(), "cores": os.cpu_count()}
    if args.memory is not None:
        found["memory"] = [
            memory.measure(shape, variant, args.batch, args.tokens)
            for shape in args.memory or ["MiniLM-L6", "BERT-base"]
            for variant in memory.RULES
        ]
        print(memory.table(found["memory"]), "\n")
    if args.plan:
        found["plan"] = plan(args)
        print(plan_table(found["plan"], args), "\n")
        print(foretold.table(found["plan"]), "\n")
    if args.shapes:
        found["shapes"] = shape_rows(args)
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
        print(shapes.table(args.shapes, device, found["shapes"]), "\n")
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
