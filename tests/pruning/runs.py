"""Short training runs of tiny models with a Pruner, in a plain loop."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finllm_prune.families import find_family
from finllm_prune.pruning import BUDGETS, CRITERIA, STRUCTURES, Cubic, Pruner, Rule, Schedule, Structure

SMALL: dict[str, dict[str, Any]] = {"block": {"rows": 8, "cols": 8}}  # where the default does not fit a tiny model
SHARES = [name for name in BUDGETS if name != "sensitivity"]  # that one needs a dry pass first, and has its own tests
WEIGHTS_ALONE = [name for name in STRUCTURES if name in ("unstructured", "n:m")]

Batch = dict[str, Tensor]


def fits(criterion: str, structure: str) -> bool:
    """Whether a criterion takes a structure; that the others are refused is a test of its own."""
    return criterion != "second_order" or structure in WEIGHTS_ALONE


# All pairs that take any sparsity; n:m takes one alone, and has its own tests.
PAIRS = [(c, structure) for c in CRITERIA for structure in STRUCTURES if fits(c, structure) and structure != "n:m"]


def make_structure(name: str) -> Structure:
    return STRUCTURES[name](**SMALL.get(name, {}))


def make_rule(
    structure: str = "unstructured", criterion: str = "movement", budget: str = "uniform", sparsity: float = 0.5
) -> Rule:
    cut = make_structure(structure)
    return Rule(cut.couples or "encoder", sparsity, cut, CRITERIA[criterion](), BUDGETS[budget]())


def make_pruner(model: PreTrainedModel, *rules: Rule, schedule: Schedule | None = None) -> Pruner:
    return Pruner(find_family(model.config.model_type).groups(model, list(rules)), schedule or Cubic(0.1, 0.7, 0.9))


def make_batches(steps: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(4, 300, (4, 6), generator=generator),
            "labels": torch.randint(0, 3, (4,), generator=generator),
        }
        for _ in range(steps)
    ]


def make_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(
    model: PreTrainedModel, pruner: Pruner, optimizer: torch.optim.Optimizer, batches: list[Batch],
    steps: Iterable[int] | None = None,
) -> None:  # fmt: skip
    """The given steps (all by default) of a run over ``batches``; ``finish`` is left to the caller."""
    for step in range(len(batches)) if steps is None else steps:
        model(**batches[step]).loss.backward()
        pruner.before_step((step + 1) / len(batches))
        optimizer.step()
        pruner.after_step()
        optimizer.zero_grad()
