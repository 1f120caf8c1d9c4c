"""Which units stay, by the scores of a rule."""

import logging
import math
from collections.abc import Sequence

from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.pruning.budgets import bounds
from finllm_prune.pruning.criteria import State
from finllm_prune.pruning.groups import Group, Rule
from finllm_prune.pruning.sharding import here

logger = logging.getLogger(__name__)


def ordered(
    rule: Rule, groups: Sequence[Group], states: Sequence[State], progress: float, final: bool
) -> list[Tensor] | None:
    """The scores (fp32, unit grids) of a rule's groups, where they put them into an order; what is gone for good comes last.

    Args:
        states: what the criterion remembers of each group.
        progress: the part of the run that is done, which messages name.
        final: there is no later cut.

    Raises:
        InputError: scores are infinite or NaN, or still equal at the final cut.
    """
    scores = [rule.criterion.score(group, state) for group, state in zip(groups, states, strict=True)]
    ends = [bounds(group.spread(score)) for group, score in zip(groups, scores, strict=True)]
    for group, (low, high) in zip(groups, ends, strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"pruning: the scores of {group.name} are infinite or NaN at {progress:.0%} of the run, for the "
                "training has diverged; lower training.learning_rate or set training.max_grad_norm"
            )
    if any(low == high and group.units > 1 for group, (low, high) in zip(groups, ends, strict=True)):
        name = type(rule.criterion).__name__
        if final:
            raise InputError(
                f"pruning.rules: all {name} scores of target {rule.target} are still equal at the end, so no cut has a "
                "reason; train longer, begin earlier, or check that gradients reach the target"
            )
        logger.warning("No cut at progress %.3f: all %s scores of a matrix are equal.", progress, name)
        return None
    return scores if rule.regrow else _cut_last(groups, scores, ends)


def cut(
    rule: Rule, groups: Sequence[Group], states: Sequence[State], scores: Sequence[Tensor], fraction: float, final: bool
) -> None:
    """Give the groups the masks that are due, by the criterion's own cutoff or by the budget.

    Args:
        scores: as ``ordered`` gives them.
        fraction: the part of the rule's sparsity that is due.
        final: the budget has the last word, so that the sparsity is the rule's.
    """
    assert rule.sparsity is not None
    density = 1.0 - fraction * rule.sparsity
    cutoff = None if final else rule.criterion.cutoff(fraction)
    if cutoff is None:
        ranked = [rule.structure.rank(score) for score in scores]
        spread = [group.spread(score) for group, score in zip(groups, ranked, strict=True)]
        masks = [here(mask) for mask in rule.budget.share(spread, density)]
    else:
        masks = [_above(score, cutoff) for score in scores]
        units = sum(mask.numel() for mask in masks)
        rule.criterion.steer(states, sum(int(mask.sum()) for mask in masks) / units - density)
    for group, state, mask in zip(groups, states, masks, strict=True):
        rule.criterion.compensate(group, state, group.mask & ~mask)
        group.set_mask(mask if rule.regrow else mask & group.mask)


def worth(rule: Rule, groups: Sequence[Group], scores: Sequence[Tensor]) -> dict[str, Tensor]:
    """Group name -> what the loss would change by without each unit, for groups that share the limit of all."""
    found = {group.name: rule.criterion.worth(score) for group, score in zip(groups, scores, strict=True)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}  # a rule refuses other criteria


def _cut_last(groups: Sequence[Group], scores: Sequence[Tensor], ends: Sequence[tuple[float, float]]) -> list[Tensor]:
    """The scores with those of cut units below all others: what is cut goes on to be cut."""
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return [
        score.masked_fill(~group.mask, low - 0.1 * (high - low)) for group, score in zip(groups, scores, strict=True)
    ]


def _above(score: Tensor, cutoff: float) -> Tensor:
    """Units above a cutoff; the best unit stays even where none is."""
    mask = score > cutoff
    if not bool(mask.any()):
        mask.view(-1)[score.reshape(-1).argmax()] = True
    return mask
