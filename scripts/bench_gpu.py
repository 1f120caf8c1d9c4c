"""GPU latency in half precision: compact and 2:4 against dense, eager and compiled, alternated in one run; random weights.

    python scripts/bench_gpu.py                                    # BERT-base's size on cuda, bf16
    python scripts/bench_gpu.py --shapes 1b 8b --batches 1 --tokens 512
    python scripts/bench_gpu.py --shapes tiny --device cpu         # only to see that it works

"compact" has lost --sparsity of its heads and neurons. "2:4" has lost every second weight of its linear layers, and runs on
the GPU's sparse tensor cores (from compute capability 8.0); elsewhere it is left out. For each shape of model and input, a
table as that of bench_inference.py: megabytes of the weights, milliseconds per call, texts per second, times faster than
dense eager (the median of the ratios within a round).
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from bench.contest import BASELINE, Contestant, size, table
from finllm_prune.checkpoints.semi_structured import use_sparse_cores
from finllm_prune.evaluation import alternate, token_ids
from finllm_prune.families import find_family, shrink, without_effect
from finllm_prune.pruning import NM, Constant, Head, Magnitude, Neuron, Pruner, Rule
from scale.shapes import SHAPES, make_llama, settle


def main() -> None:
    """Measure and print the tables."""
    args = command_line()
    device = torch.device(args.device)
    for shape in args.shapes:
        dense = make(shape, device)
        contestants = dict(gather(dense, args.sparsity, args.compile))
        engines = {name: each.engine(0) for name, each in contestants.items()}
        for batch in args.batches:
            for tokens in args.tokens:
                times = alternate(engines, token_ids(dense.config.vocab_size, batch, tokens), args.rounds, args.seconds)
                print(f"\n{shape}, {device}, bf16, {batch} x {tokens} tokens, {len(times[BASELINE])} rounds\n")
                print(table(contestants, times, batch), flush=True)


def make(shape: str, device: torch.device) -> PreTrainedModel:
    """A classifier with random weights in bf16: an encoder of BERT-base's size, or a Llama."""
    if shape != "bert-base":
        return make_llama(shape, device).eval()
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert"), dtype=torch.bfloat16).eval()
    nn.Module.to(model, device=device)
    return model


def gather(dense: PreTrainedModel, sparsity: float, compiled: bool) -> Iterator[tuple[str, Contestant]]:
    """All that is measured on one shape of model, by the name in the table."""
    whole = [Rule("mlp", sparsity, Neuron(), Magnitude()), Rule("attention", sparsity, Head(), Magnitude())]
    compact = cut(dense, whole)
    models = {"dense": dense, "compact": shrink(compact, without_effect(compact))}
    half = cut(dense, [Rule("encoder", 0.5, NM(2, 4), Magnitude())])
    bytes_of = {name: size(model) for name, model in models.items()}
    linears = find_family(dense.config.model_type).linears(dense)
    if turned := use_sparse_cores(half):
        # Half of the values, and two bits for the place of each.
        bytes_of["2:4"] = size(dense) - round(0.4375 * sum(linears[path].weight.nbytes for path in turned))
        models["2:4"] = half
    for name, model in models.items():
        yield f"{name}, eager", Contestant(bytes_of[name], engine(model, dense.device))
        if compiled:
            yield f"{name}, torch.compile", Contestant(bytes_of[name], engine(torch.compile(model), dense.device))


def cut(dense: PreTrainedModel, rules: list[Rule]) -> PreTrainedModel:
    """A masked copy."""
    model = copy.deepcopy(dense)
    Pruner(find_family(model.config.model_type).groups(model, rules), Constant()).finish()
    return model


def engine(model: Callable[..., Any], device: torch.device) -> Callable[[int], Callable[..., Any]]:
    """A call that ends when the device has done it."""

    def call(**inputs: Tensor) -> None:
        model(**{name: value.to(device) for name, value in inputs.items()})
        settle(device)

    return lambda threads: call


def command_line() -> argparse.Namespace:
    """The flags, most asked for first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["bert-base", *SHAPES], default=["bert-base"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sparsity", type=float, default=0.75, help="of the heads and neurons of compact")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60, help="for a shape; three rounds are counted at the least")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="eager only")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu --shapes tiny shows that it works")
    return args


if __name__ == "__main__":
    main()
