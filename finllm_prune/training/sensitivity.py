"""The dry pass before training: how much the loss changes when one matrix alone is cut."""

import functools
import logging
from collections.abc import Callable, Iterable

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm.auto import tqdm

from finllm_prune.pruning import Group, Magnitude, Rule, Sensitivity, Uniform, give_densities
from finllm_prune.pruning.sensitivity import allocate

logger = logging.getLogger(__name__)

BatchLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module, groups: list[Group], batches: Iterable[dict[str, Tensor]], loss: BatchLoss | None = None
) -> None:  # fmt: skip
    """Gives each rule with ``budget: sensitivity`` its densities; the model is as before afterwards.

    Each group is cut alone, by magnitude, to each of the budget's levels, and the loss taken in eval mode.

    Args:
        model: put into eval mode meanwhile.
        groups: of all rules, on this model; those of the other budgets are left alone.
        batches: the same on every rank, so that all ranks find the same densities.
        loss: (model, batch with labels) -> the mean over the batch's rows; None takes the model's own.
    """
    rules = {id(group.rule): group.rule for group in groups if isinstance(group.rule.budget, Sensitivity)}
    if not rules:
        return
    device = groups[0].slots[0].parameter.device
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    was_training = model.training
    model.eval()
    mean = functools.partial(_mean, model, batches, loss or _own)
    dense = mean()
    for rule in rules.values():
        _share(rule, [group for group in groups if group.rule is rule], dense, mean)
    model.train(was_training)


def _share(rule: Rule, groups: list[Group], dense: float, mean: Callable[[], float]) -> None:
    budget = rule.budget
    assert isinstance(budget, Sensitivity)
    assert rule.sparsity is not None
    losses = [
        [_loss_without(group, level, mean) for level in budget.levels]
        for group in tqdm(groups, desc="sensitivity", leave=False)
    ]
    # Unlike machines may round differently, and masks must be equal on all ranks.
    losses = broadcast(torch.tensor(losses, dtype=torch.float64, device=groups[0].mask.device)).tolist()
    densities = allocate(losses, dense, [group.mask.numel() for group in groups], budget.levels, rule.sparsity)
    give_densities(groups, densities)
    for group, density in zip(groups, densities, strict=True):
        logger.info("%s keeps %.3f of its units.", group.name, density)


def _loss_without(group: Group, level: float, mean: Callable[[], float]) -> float:
    group.set_mask(Uniform().share([Magnitude().score(group, {})], 1.0 - level)[0])
    group.park()
    loss = mean()
    group.unpark()
    group.set_mask(torch.ones_like(group.mask))
    group.park()
    return loss


def _mean(model: nn.Module, batches: list[dict[str, Tensor]], loss: BatchLoss) -> float:
    total = sum(float(loss(model, batch)) * len(batch["labels"]) for batch in batches)
    return total / sum(len(batch["labels"]) for batch in batches)


def _own(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss
