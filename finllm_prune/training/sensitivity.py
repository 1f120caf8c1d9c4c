"""The dry pass before training: how much the loss changes when one matrix alone is cut."""

import logging
from collections.abc import Iterable

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm.auto import tqdm

from finllm_prune.pruning import Group, Magnitude, Rule, Sensitivity, Uniform, give_densities
from finllm_prune.pruning.sensitivity import allocate

logger = logging.getLogger(__name__)


@torch.no_grad()
def measure_sensitivity(model: nn.Module, groups: list[Group], batches: Iterable[dict[str, Tensor]]) -> None:
    """Gives each rule with ``budget: sensitivity`` its densities; the model is as before afterwards.

    Each group is cut alone, by magnitude, to each of the budget's levels, and the loss taken in eval mode.

    Args:
        model: returns ``.loss`` for a batch with labels.
        groups: of all rules, on this model; those of the other budgets are left alone.
        batches: the same on every rank, so that all ranks find the same densities.
    """
    rules = {id(group.rule): group.rule for group in groups if isinstance(group.rule.budget, Sensitivity)}
    if not rules:
        return
    device = groups[0].slots[0].parameter.device
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    was_training = model.training
    model.eval()
    dense = _loss(model, batches)
    for rule in rules.values():
        members = [group for group in groups if group.rule is rule]
        _share(model, rule, members, batches, dense)
    model.train(was_training)


def _share(model: nn.Module, rule: Rule, groups: list[Group], batches: list[dict[str, Tensor]], dense: float) -> None:
    budget = rule.budget
    assert isinstance(budget, Sensitivity)
    assert rule.sparsity is not None
    losses = [
        [_loss_without(model, group, level, batches) for level in budget.levels]
        for group in tqdm(groups, desc="sensitivity", leave=False)
    ]
    # Unlike machines may round differently, and masks must be equal on all ranks.
    losses = broadcast(torch.tensor(losses, dtype=torch.float64, device=groups[0].mask.device)).tolist()
    densities = allocate(losses, dense, [group.mask.numel() for group in groups], budget.levels, rule.sparsity)
    give_densities(groups, densities)
    for group, density in zip(groups, densities, strict=True):
        logger.info("%s keeps %.3f of its units.", group.name, density)


def _loss_without(model: nn.Module, group: Group, level: float, batches: list[dict[str, Tensor]]) -> float:
    group.set_mask(Uniform().share([Magnitude().score(group, {})], 1.0 - level)[0])
    group.park()
    loss = _loss(model, batches)
    group.unpark()
    group.set_mask(torch.ones_like(group.mask))
    group.park()
    return loss


def _loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    total = sum(float(model(**batch).loss) * len(batch["labels"]) for batch in batches)
    return total / sum(len(batch["labels"]) for batch in batches)
