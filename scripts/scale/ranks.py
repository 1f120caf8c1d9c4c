"""What one of several gloo ranks measures: seconds per step with and without pruning, what the Pruner sends, what it holds.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m scale.ranks OUT MiniLM-L6 8 4 64
"""

import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from finllm_prune.families import find_family
from finllm_prune.pruning import Cubic, Global, Group, Neuron, Pruner, Rule
from finllm_prune.pruning.sharding import here
from scale.memory import held_bytes, make_bert

RULES = {
    "plain": None,
    "single weights, global": Rule("encoder", 0.9, budget=Global()),
    "neurons": Rule("mlp", 0.75, structure=Neuron()),
}


class Traffic(TorchDispatchMode):
    """Counts the collective calls that run inside, and the bytes of their results on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.calls += 1
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


class Candidate:
    """A model in training on all ranks, with a Pruner or without."""

    def __init__(self, rule: Rule | None, shape: str, engine: str, steps: int):
        self.model: PreTrainedModel = make_bert(shape)
        self.steps = steps
        groups = find_family("bert").groups(self.model, [rule]) if rule is not None else []
        self.pruner = Pruner(groups, Cubic(0.0, 0.5, 1.0, updates=steps // 2)) if groups else None
        self.wrapped: nn.Module = self.model
        if engine == "DDP":
            self.wrapped = DistributedDataParallel(self.model)
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in find_family("bert").layers(self.model):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        if self.pruner is not None:
            self.pruner.follow(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, number: int, batch: dict[str, Tensor], traffic: Traffic | None = None) -> float:
        """The seconds of one step; masks are chosen where its number is odd."""
        dist.barrier()
        begin = time.perf_counter()
        self.wrapped(**batch).loss.backward()
        if self.pruner is not None:
            with traffic or nullcontext():
                self.pruner.before_step((number + 1) / self.steps)
        self.optimizer.step()
        if self.pruner is not None:
            with traffic or nullcontext():
                self.pruner.after_step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin

    def bytes(self) -> tuple[int, int]:
        """On this rank: weights, gradients and AdamW's moments; what the Pruner holds."""
        parts = [here(parameter) for parameter in self.model.parameters()]
        own = sum(4 * part.nbytes for part in parts)
        return own, 0 if self.pruner is None else held_bytes(self.pruner, self.model)


def measure(shape: str, engine: str, steps: int, batch: int, tokens: int) -> list[dict[str, Any]]:
    """All candidates in turn, step by step, and then two steps of each whose traffic is counted; the first two warm up."""
    torch.manual_seed(dist.get_rank())
    rows = {"input_ids": torch.randint(0, 500, (batch, tokens)), "labels": torch.arange(batch) % 3}
    steps = steps // 2 * 2 + 2
    candidates = {name: Candidate(rule, shape, engine, steps + 4) for name, rule in RULES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(steps):
        for name, candidate in candidates.items():
            seconds[name].append(candidate.step(number, rows))
    found = []
    for name, candidate in candidates.items():
        quiet, choosing = Traffic(), Traffic()
        candidate.step(steps, rows, quiet)
        candidate.step(steps + 1, rows, choosing)
        own, held = candidate.bytes()
        groups = candidate.pruner.groups if candidate.pruner is not None else []
        found.append(
            {
                "ranks": dist.get_world_size(), "engine": engine, "pruning": name, "bytes": own, "held": held,
                "seconds": statistics.median(seconds[name][2::2]),
                "seconds_choosing": statistics.median(seconds[name][3::2]),
                "step": [quiet.calls, quiet.bytes], "choice": [choosing.calls - quiet.calls, choosing.bytes - quiet.bytes],
                "foretold": foretold(engine, groups), "groups": len(groups),
            }
        )  # fmt: skip
    return found


def foretold(engine: str, groups: list[Group]) -> list[int]:
    """Calls and bytes of a step by the formula: under FSDP2 a sum per group of shared units, and one number for all."""
    if engine == "DDP" or not groups:
        return [0, 0]
    shared = [group for group in groups if not group.rule.structure.single]
    return [1 + len(shared), 4 + 4 * sum(group.units for group in shared)]


def main() -> None:
    """Both engines, one after the other."""
    out, shape, steps, batch, tokens = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [row for engine in ("DDP", "FSDP2") for row in measure(shape, engine, int(steps), int(batch), int(tokens))]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
