"""Bytes on disk and time to load of each checkpoint format, against dense, alternated in one run.

    python scripts/bench_formats.py

MiniLM with 90 % zeros in its encoder by magnitude, not trained: neither figure depends on the values. "encoder" is its
linear layers, "whole" the file with the embeddings; the load ratio is the median of the pairwise ones.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import transformers
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finllm_prune.checkpoints import find_format
from finllm_prune.evaluation import weight_bytes
from finllm_prune.families import find_family
from finllm_prune.hub.base_model import locate
from finllm_prune.pruning import Constant, Magnitude, Pruner, Rule


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a folder or Hub id instead")
    parser.add_argument("--formats", nargs="+", default=["masked", "ragged", "packed", "packed-int8"])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    location, _ = locate(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(location)
    family = find_family(model.config.model_type)
    names = {f"{path}.weight" for path in family.linears(model)}
    with tempfile.TemporaryDirectory() as place:
        folders = {"dense": Path(place) / "dense"}
        model.save_pretrained(folders["dense"])
        rules = [Rule("encoder", args.sparsity, criterion=Magnitude())]
        Pruner(family.groups(model, rules), Constant()).finish()
        for name in args.formats:
            folders[name] = Path(place) / name
            find_format(name)(model, AutoTokenizer.from_pretrained(location), folders[name])
        seconds: dict[str, list[float]] = {name: [] for name in folders}
        for _ in range(args.rounds):
            for name, folder in folders.items():
                gc.collect()  # of the model before, whose memory else is given back on this one's time
                start = time.perf_counter()
                AutoModelForSequenceClassification.from_pretrained(folder)
                seconds[name].append(time.perf_counter() - start)
        dense, whole = encoder_bytes(folders["dense"], names), weight_bytes(folders["dense"])
        print("| format | encoder bytes | of dense | whole file | of dense | load s, median | of dense |")
        print("|---|---|---|---|---|---|---|")
        for name, folder in folders.items():
            part, file = encoder_bytes(folder, names), weight_bytes(folder)
            ratio = statistics.median(own / base for own, base in zip(seconds[name], seconds["dense"], strict=True))
            print(
                f"| {name} | {part:,} | {part / dense:.3f} | {file:,} | {file / whole:.3f} | "
                f"{statistics.median(seconds[name]):.3f} | {ratio:.2f} |"
            )


def encoder_bytes(folder: Path, names: set[str]) -> int:
    """Of the weights of these matrices, whole or in parts."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            own = [key for key in file.keys() if key in names or key.rpartition("_")[0] in names]  # noqa: SIM118
            total += sum(file.get_tensor(key).nbytes for key in own)
    return total


if __name__ == "__main__":
    main()
