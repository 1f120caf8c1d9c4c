"""CPU latency, throughput and bytes: a pruned model against its dense one, in PyTorch and onnxruntime, alternated in one run.

    python scripts/bench_inference.py              # MiniLM's size without 75 % of its heads and neurons; random weights
    python scripts/bench_inference.py --base       # the same of BERT-base's size
    python scripts/bench_inference.py --dense DIR --pruned DIR        # saved models, as dense/ and masked/ of a run
    python scripts/bench_inference.py --threads 1 --batches 1 --tokens 128 --rounds 5

For each number of threads and each shape of the input, a table: megabytes of the weights (of the file, for a graph), median
and quartiles of the milliseconds per call, texts per second, and how many times faster than dense eager PyTorch (the median
of the ratios within a round). "compact" is the pruned model without its dead blocks, heads and neurons.

--compile, --openvino and --torch-pruning add dense torch.compile (40 s of compiling for each shape or so), OpenVINO on both
fp32 graphs, and Torch-Pruning's model of the same size (the latter two: pip install 'finllm-prune[bench]').
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bench.contest import BASELINE, Contestant, size, table
from bench.peers import TorchPruning
from finllm_prune.checkpoints import GRAPH, find_format, onnx, onnx_int8, serve
from finllm_prune.checkpoints.manifest import MANIFEST
from finllm_prune.evaluation import alternate, removed, token_ids
from finllm_prune.families import find_family
from finllm_prune.hub.base_model import locate
from finllm_prune.pruning import Constant, Head, Magnitude, Neuron, Pruner, Rule


def main() -> None:
    """Measure and print the tables."""
    args = command_line()
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned, tokenizer = models(args)
        contestants = dict(gather(args, dense, pruned, tokenizer, Path(folder)))
        if unknown := set(args.only or ()) - set(contestants):
            raise SystemExit(
                f"--only: no row is called {', '.join(sorted(unknown))}; there are {', '.join(contestants)}"
            )
        contestants = {
            name: each for name, each in contestants.items() if name in (BASELINE, *(args.only or contestants))
        }
        for threads in args.threads:
            torch.set_num_threads(threads)
            torch.compiler.reset()
            engines = {name: each.engine(threads) for name, each in contestants.items()}
            for batch in args.batches:
                for tokens in args.tokens:
                    inputs = token_ids(dense.config.vocab_size, batch, tokens)
                    times = alternate(engines, inputs, args.rounds, args.seconds)
                    print(f"\n{threads} thread{'s' if threads > 1 else ''}, {batch} x {tokens} tokens, "
                          f"{len(times[BASELINE])} rounds\n")  # fmt: skip
                    print(table(contestants, times, batch), flush=True)


def gather(
    args: argparse.Namespace, dense: PreTrainedModel, pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Iterator[tuple[str, Contestant]]:  # fmt: skip
    """Everything that the flags ask for, by the name in the tables."""
    compact = onnx.exportable(pruned)
    yield BASELINE, eager(dense)
    if args.compile:
        yield "dense, torch.compile", Contestant(size(dense), lambda threads: torch.compile(dense))
    yield "compact, eager", eager(compact)
    if args.torch_pruning:
        yield "torch-pruning, eager", eager(torch_pruned(dense, pruned))
    for name, model in (("dense", dense), ("compact", pruned)):
        graph, int8 = folder / name, folder / f"{name}-int8"
        find_format("onnx")(model, tokenizer, graph)
        shutil.copytree(graph, int8, ignore=shutil.ignore_patterns(MANIFEST))
        onnx_int8.quantize(int8 / GRAPH)
        fp32 = served(graph)
        yield f"{name}, ONNX fp32", fp32
        yield f"{name}, ONNX int8", served(int8)
        if args.openvino:
            yield f"{name}, OpenVINO fp32", Contestant(fp32.bytes, lambda threads, at=graph: OpenVino(at, threads))


def models(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Dense and pruned, of one vocabulary, and its tokenizer."""
    if args.dense:
        dense, pruned = (AutoModelForSequenceClassification.from_pretrained(at) for at in (args.dense, args.pruned))
        return dense.eval(), pruned.eval(), AutoTokenizer.from_pretrained(args.dense)
    location, _ = locate("sentence-transformers/all-MiniLM-L6-v2")
    # The defaults of BertConfig are BERT-base, whose vocabulary MiniLM shares.
    config = AutoConfig.for_model("bert") if args.base else AutoConfig.from_pretrained(location)
    dense, pruned = (AutoModelForSequenceClassification.from_config(config).eval() for _ in range(2))
    pruned.load_state_dict(dense.state_dict())
    rules = [
        Rule("mlp", args.sparsity, structure=Neuron(), criterion=Magnitude()),
        Rule("attention", args.sparsity, structure=Head(), criterion=Magnitude()),
    ]
    Pruner(find_family("bert").groups(pruned, rules), Constant()).finish()
    return dense, pruned, AutoTokenizer.from_pretrained(location)


def torch_pruned(dense: PreTrainedModel, pruned: PreTrainedModel) -> PreTrainedModel:
    """Torch-Pruning's model, with as much of the encoder's linear layers gone as in ours."""
    model: PreTrainedModel = type(dense)(dense.config).eval()
    sparsity = removed(dense, pruned)["encoder_linear"]
    # The benchmark's peer cuts an optimizer's moments along, so it wants one that has some.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    TorchPruning(sparsity, importance="magnitude").cut(model, optimizer, sparsity)
    return model


def eager(model: PreTrainedModel) -> Contestant:
    """A model as PyTorch runs it."""
    return Contestant(size(model), lambda threads: model)


def served(folder: Path) -> Contestant:
    """A folder in onnxruntime."""
    return Contestant((folder / GRAPH).stat().st_size, lambda threads: serve(folder, threads))


class OpenVino:
    """A graph in OpenVINO, behind the call of a model."""

    def __init__(self, folder: Path, threads: int):
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self.model = openvino.compile_model(folder / GRAPH, "CPU", settings)
        self.inputs = [each.any_name for each in self.model.inputs]

    def __call__(self, **inputs: Tensor) -> Any:
        blank = torch.zeros_like(inputs["input_ids"])  # of token types
        return self.model({name: inputs.get(name, blank).numpy() for name in self.inputs})


def command_line() -> argparse.Namespace:
    """The flags, most asked for first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="a folder with a dense model and its tokenizer")
    parser.add_argument("--pruned", type=Path, help="a folder with a pruned one: masked, compact")
    parser.add_argument("--base", action="store_true", help="random weights of BERT-base's size instead of MiniLM's")
    parser.add_argument("--sparsity", type=float, default=0.75, help="of the heads and neurons, without --pruned")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="for a shape; three rounds are counted at the least")
    parser.add_argument("--compile", action="store_true", help="add dense torch.compile, which takes 40 s and more")
    parser.add_argument("--openvino", action="store_true", help="add OpenVINO on the fp32 graphs")
    parser.add_argument("--torch-pruning", action="store_true", help="add Torch-Pruning's model of the same size")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows, and dense eager, where memory is short")
    args = parser.parse_args()
    if (args.dense is None) != (args.pruned is None):
        parser.error("name both --dense and --pruned, or neither")
    return args


if __name__ == "__main__":
    main()
