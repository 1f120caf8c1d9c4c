"""Rules that cannot be carried out together, or not on this many processes: refused before training."""

from collections.abc import Sequence

from finllm_prune.errors import InputError
from finllm_prune.pruning.budgets import Uniform
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


def refuse_unreachable(groups: Sequence[Group]) -> None:
    """A sparsity that rounds to all units, one of which would stay after all, or to none."""
    for rule in {id(group.rule): group.rule for group in groups}.values():
        own = [group for group in groups if group.rule is rule]
        if isinstance(rule.budget, Uniform):
            for group in own:
                _refuse_all_or_none(rule, [group], rule.budget)
        else:
            _refuse_all_or_none(rule, own, Uniform())


def _refuse_all_or_none(rule: Rule, groups: list[Group], rounding: Uniform) -> None:
    if rule.sparsity is None:
        return
    units, least = sum(group.units for group in groups), len(groups)
    kept, multiple = rounding.nearest(1.0 - rule.sparsity, units), rounding.multiple
    where = groups[0].name if least == 1 else f"each of {groups[0].name} and {least - 1} more"
    widths = f", kept in multiples of {multiple}" if multiple > 1 else ""
    said = f"pruning.rules: sparsity {rule.sparsity} of the {units} units{widths}"
    if kept < least:
        remedy = (
            "lower the budget's multiple, or sparsity" if multiple > 1 else f"set at most {1.0 - least / units:.4g}"
        )
        raise InputError(f"{said} would leave none in {where}; {remedy}")
    if kept >= units:
        remedy = "lower the budget's multiple, or raise sparsity" if multiple > 1 else f"set at least {1.0 / units:.4g}"
        raise InputError(f"{said} would cut none in {where}; {remedy}")


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
