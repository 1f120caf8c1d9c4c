"""What one of several ranks does: all combinations in one process group, held against one rank with the same global batch.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.ranks OUT
"""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from finllm_prune.families import find_family
from finllm_prune.pruning import (
    CRITERIA,
    NM,
    Block,
    Cubic,
    Global,
    Head,
    Layer,
    Neuron,
    Pruner,
    Rule,
    Structure,
    Uniform,
    Unstructured,
)
from finllm_prune.pruning.budgets import select
from finllm_prune.pruning.sharding import Split
from finllm_prune.training.beside import load_beside, save_beside
from tests.conftest import tiny_model
from tests.pruning.runs import Batch

# 66 neurons lie on four ranks as 17, 17, 17 and 15, so that blocks of two rows are cut apart.
STRUCTURES: dict[str, Structure] = {
    "unstructured": Unstructured(), "block": Block(2, 2), "neuron": Neuron(), "head": Head(), "n:m": NM(1, 2),
    "layer": Layer(),
}  # fmt: skip
COMBINATIONS = [
    *itertools.product([name for name in STRUCTURES if name != "layer"], ("movement", "magnitude", "platon")),
    *itertools.product(("neuron", "layer"), ("soft_movement", "l0")),
    ("layer", "movement"),
]
UNDER = {
    "ddp": [*COMBINATIONS, ("unstructured", "soft_movement")],
    "fsdp2": COMBINATIONS,  # a steered criterion of single weights is refused there
}
STEPS, ACCUMULATED = 10, 2
Wrap = Callable[[PreTrainedModel], nn.Module]


def make_model() -> PreTrainedModel:
    return tiny_model(intermediate_size=66, seed=1)


def make_pruner(model: PreTrainedModel, structure: str, criterion: str) -> Pruner:
    cut = STRUCTURES[structure]
    budget = Uniform() if structure == "head" else Global()
    rule = Rule(cut.couples or "encoder", 0.5, cut, CRITERIA[criterion](), budget)
    return Pruner(find_family("bert").groups(model, [rule]), Cubic(0.1, 0.7, 0.9))


def global_batch(step: int) -> Batch:
    """16 rows, and 11 in the last step."""
    generator = torch.Generator().manual_seed(step)
    rows = 11 if step == STEPS - 1 else 16
    return {
        "input_ids": torch.randint(4, 300, (rows, 6), generator=generator),
        "labels": torch.randint(0, 3, (rows,), generator=generator),
    }


def train(
    model: nn.Module, pruner: Pruner, ranks: int, rank: int, steps: range = range(STEPS), momentum: float = 0.9,
) -> dict[str, Tensor]:  # fmt: skip
    """Each rank takes its rows of the batch, in two parts; SGD, for Adam turns the rounding of a zero gradient into a step.

    Returns the scores of larger units than single weights, which lie whole on each rank, before the masks freeze.
    """
    scores: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    for step in steps:
        batch = global_batch(step)
        rows = len(batch["labels"])
        parts = [
            {key: value[part::ACCUMULATED][rank::ranks] for key, value in batch.items()} for part in range(ACCUMULATED)
        ]
        for part in parts:
            (model(**part).loss * (len(part["labels"]) * ranks / rows)).backward()
        pruner.before_step((step + 1) / STEPS)
        optimizer.step()
        pruner.after_step()
        optimizer.zero_grad()
        if not pruner.frozen and not pruner.groups[0].rule.structure.single:
            scores = pruner.scores()
    return scores


def sharded(mesh: DeviceMesh) -> Wrap:
    def wrap(model: PreTrainedModel) -> nn.Module:
        for layer in find_family("bert").layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    return wrap


def run(structure: str, criterion: str, ranks: int, rank: int, wrap: Wrap | None = None) -> dict[str, Any]:
    """The hash of the masks, the sparsity and the whole weights at the end (on the first rank) of one run, and its scores."""
    model = make_model()
    pruner = make_pruner(model, structure, criterion)
    wrapped = model if wrap is None else wrap(model)
    pruner.follow(model)
    scores = train(wrapped, pruner, ranks, rank)
    pruner.finish()
    assert pruner.holds()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"hash": pruner.mask_hash(), "sparsity": pruner.sparsity(), "weights": weights, "scores": scores}


def compare(engine: str, wrap: Wrap, rank: int, ranks: int) -> dict[str, Any]:
    found = {}
    for structure, criterion in UNDER[engine]:
        torch.manual_seed(rank)
        many = run(structure, criterion, ranks, rank, wrap)
        one = run(structure, criterion, 1, 0)
        hashes: list[Any] = [None] * ranks
        dist.all_gather_object(hashes, many["hash"])
        found[f"{structure} {criterion}"] = {
            "hashes": hashes, "hash": one["hash"], "sparsity": [many["sparsity"], one["sparsity"]],
            "apart": max(float((many["weights"][name] - value).abs().max()) for name, value in one["weights"].items())
            if rank == 0 else 0.0,
            "scores apart": max(
                [float((many["scores"][name] - value).norm() / value.norm()) for name, value in one["scores"].items()],
                default=0.0,
            ),
        }  # fmt: skip
    return found


def reshard(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Half a run on all ranks, then the other half split over two of them, over one, and not at all, from its checkpoint."""
    args = TrainingArguments(str(folder), use_cpu=True, ddp_backend="gloo")
    state, half = TrainerState(global_step=STEPS // 2), STEPS // 2
    shapes = {"2": (ranks // 2, 2), "1": (ranks, 1)}
    meshes = {name: init_device_mesh("cpu", shape, mesh_dim_names=("same", "split")) for name, shape in shapes.items()}
    wraps: dict[str, Wrap | None] = {name: sharded(mesh) for name, mesh in meshes.items()} | {"whole": None}
    found = {}
    for structure, criterion in (("unstructured", "movement"), ("neuron", "platon"), ("n:m", "magnitude")):
        model = make_model()
        pruner = make_pruner(model, structure, criterion)
        sharded(init_device_mesh("cpu", (ranks,)))(model)
        pruner.follow(model)
        train(model, pruner, ranks, rank, range(half), momentum=0.0)
        (folder / f"checkpoint-{half}").mkdir(parents=True, exist_ok=True)
        save_beside(args, state, "pruner.safetensors", pruner.state_dict, split=True)
        if rank == 0:
            (folder / f"checkpoint-{half}" / "trainer_state.json").write_text(json.dumps({"global_step": half}))
        dist.barrier()
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        hashes = {}
        for name, wrap in wraps.items():
            again = make_model()
            again.load_state_dict(weights)
            pruner = make_pruner(again, structure, criterion)
            if wrap is not None:
                wrap(again)
                pruner.follow(again)
            pruner.load_state_dict(load_beside(args, state, "pruner.safetensors", again))
            # Without a wrapper nothing adds the gradients up: each rank takes the whole batch, as a process alone.
            share = (ranks, rank) if wrap is not None else (1, 0)
            train(again, pruner, *share, range(half, STEPS), momentum=0.0)
            pruner.finish()
            hashes[name] = pruner.mask_hash()
        one = make_model()
        pruner = make_pruner(one, structure, criterion)
        train(one, pruner, 1, 0, momentum=0.0)
        pruner.finish()
        found[f"{structure} {criterion}"] = hashes | {"undisturbed": pruner.mask_hash()}
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
        dist.barrier()
    return found


def search(mesh: DeviceMesh) -> bool:
    """Whether the histograms of all ranks find the threshold of one, among values that are often equal."""
    torch.manual_seed(0)
    grids = [
        torch.randn(600, 301),
        torch.randn(2, 7).repeat(1, 9),
        torch.randn(700, 200).mul_(8).round_(),
        torch.ones(1, 5),
    ]
    split = [Split(mesh, grid.shape) for grid in grids]
    spread = [each.spread(each.part(grid)) for each, grid in zip(split, grids, strict=True)]
    for k in (1, 1000, 100_000, 250_000, sum(grid.numel() for grid in grids)):
        one, many = select(grids, k), [mask.full_tensor() for mask in select(spread, k)]
        if not all(torch.equal(a, b) for a, b in zip(one, many, strict=True)):
            return False
    return True


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    engines = {"ddp": DistributedDataParallel, "fsdp2": sharded(mesh)}
    found: dict[str, Any] = {name: compare(name, wrap, rank, ranks) for name, wrap in engines.items()} | {
        "search": search(mesh)
    }
    found["reshard"] = reshard(Path(sys.argv[1]).with_name("checkpoints"), rank, ranks)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
