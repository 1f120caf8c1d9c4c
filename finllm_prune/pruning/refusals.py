"""Rules that cannot be carried out together, or not on this many processes: refused before training."""

from collections.abc import Sequence

from finllm_prune.errors import InputError
from finllm_prune.pruning.criteria import Movement, SecondOrder, SteeredScores
from finllm_prune.pruning.groups import Group, Rule


def refuse_overlap(groups: list[Group]) -> None:
    """Each weight is cut by one rule at most, and some weight by one."""
    if not groups:
        raise InputError("pruning.rules: the rules match nothing in this model; name a target that it has")
    seen: set[int] = set()
    for group in groups:
        for slot in group.slots:
            if id(slot.parameter) in seen:
                raise InputError(f"pruning.rules: {slot.name} is cut by two rules; give each target one rule")
            seen.add(id(slot.parameter))


def refuse_unsplittable(rules: Sequence[Rule]) -> None:
    """What needs all of a matrix's single weights in one place, and is not done on a model that is split among ranks."""
    for i, rule in enumerate(rules):
        if isinstance(rule.criterion, SecondOrder) or (
            isinstance(rule.criterion, SteeredScores) and rule.structure.single
        ):
            raise InputError(
                f"pruning.rules.{i}.criterion: {type(rule.criterion).__name__} looks at all of a matrix at once, which FSDP "
                "splits among ranks; set movement, taylor or platon, or launch with DDP"
            )
        if isinstance(rule.criterion, Movement) and rule.criterion.factors(rule.structure):
            raise InputError(
                f"pruning.rules.{i}.criterion: factored moments are means over whole columns, which FSDP splits among ranks; "
                "set moments: whole, or launch with DDP"
            )
