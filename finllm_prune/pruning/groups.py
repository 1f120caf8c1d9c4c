"""Weights that are cut by one unit grid, and the values that wait beside the model while they are cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from finllm_prune.errors import InputError
from finllm_prune.pruning.budgets import Budget, Global, Sensitivity, Uniform
from finllm_prune.pruning.criteria import Criterion, Movement, SteeredScores
from finllm_prune.pruning.regularizers import Regularizer
from finllm_prune.pruning.sharding import Split, here, moved, total
from finllm_prune.pruning.structures import NM, Head, Neuron, Site, Structure, Unstructured


@dataclass(frozen=True)
class Rule:
    """One line of ``pruning.rules``: what is cut, in which units, who survives, and how much is cut.

    Args:
        target: "attention", "mlp" or "encoder" (both), or a pattern of module paths (``families.Architecture``).
        sparsity: the part of the target's units that is cut at the end, 0 < sparsity < 1; None leaves it to the Pruner's
            costs (``finllm_prune.pruning.targets``), for heads and neurons.
        structure: what is cut together.
        criterion: who survives.
        budget: how the sparsity is shared among the target's matrices.
        regularizer: a penalty on the target's weights while the sparsity grows.
        regrow: whether cut units wait beside the model and come back where their score rises again. Without it a cut is for
            good, and nothing waits: that takes one more tensor of the cut weights' size off.
    """

    target: str
    sparsity: float | None
    structure: Structure = field(default_factory=Unstructured)
    criterion: Criterion = field(default_factory=Movement)
    budget: Budget = field(default_factory=Uniform)
    regularizer: Regularizer | None = None
    regrow: bool = True

    def __post_init__(self) -> None:
        if self.regularizer is not None and not self.criterion.trains_weights:
            raise InputError(
                "pruning.rules: a regularizer moves weights, and score_movement freezes them; remove the regularizer"
            )
        if not self.regrow:
            self._refuse_unless_for_good()
        if self.sparsity is None:
            self._refuse_unpriced()
            return
        if not 0 < self.sparsity < 1:
            raise InputError(f"pruning.rules: sparsity must lie between 0 and 1 (exclusive), not {self.sparsity}")
        self.structure.check(self.sparsity)
        self._refuse_misfits(self.sparsity)

    def _refuse_unless_for_good(self) -> None:
        """What needs cut units whole again."""
        if isinstance(self.criterion, SteeredScores):
            raise InputError(
                f"pruning.rules: {self.criterion} lets units go and come back until its sparsity is met; set regrow: true, or "
                "another criterion"
            )
        if isinstance(self.budget, Sensitivity) or self.sparsity is None:
            raise InputError(
                f"pruning.rules: without regrow the rule for {self.target} can only cut more and more, and pruning.target and "
                "budget sensitivity change their mind; set regrow: true, or a sparsity and another budget"
            )

    def _refuse_unpriced(self) -> None:
        """What a target in milliseconds, FLOPs or bytes cannot share out."""
        if not isinstance(self.structure, Neuron | Head):
            raise InputError(
                f"pruning.rules: the rule for {self.target} has no sparsity, and pruning.target shares heads and neurons only; "
                "set its structure to neuron (target mlp) or head (target attention), or give it a sparsity"
            )
        if self.criterion.worth(torch.ones(1)) is None:
            raise InputError(
                f"pruning.rules: pruning.target adds up what cuts cost the loss, and the scores of {self.criterion} tell an "
                "order only; set criterion to taylor, platon or movement with a sensitivity above 0"
            )
        if self.budget != Uniform():
            raise InputError(
                "pruning.rules: pruning.target is a budget itself, over all its rules; remove the rule's budget"
            )

    def _refuse_misfits(self, sparsity: float) -> None:
        """Parts of a rule that undo each other."""
        budget = self.budget
        if isinstance(self.structure, NM) and budget not in (Uniform(), Global()):
            raise InputError(
                "pruning.rules: n:m leaves n of every m weights in every matrix, which a budget with knobs would undo; "
                "set budget: uniform or global, without knobs"
            )
        if isinstance(budget, Global) and budget.floor > 1.0 - sparsity + 1e-9:
            raise InputError(
                f"pruning.rules: a floor of {budget.floor} leaves no way to sparsity {sparsity}; "
                f"set floor to at most {1.0 - sparsity:.6g}"
            )
        if isinstance(budget, Global) and budget.ceiling < 1.0 - sparsity - 1e-9:
            raise InputError(
                f"pruning.rules: a ceiling of {budget.ceiling} keeps less than sparsity {sparsity} does; "
                f"set ceiling to at least {1.0 - sparsity:.6g}"
            )
        if isinstance(budget, Sensitivity) and budget.levels and sparsity > budget.levels[-1]:
            raise InputError(
                f"pruning.rules: sparsity {sparsity} is above the highest level tried by budget sensitivity, "
                f"{budget.levels[-1]}; add a higher level to levels"
            )


class Slot:
    """A parameter seen as a matrix: a bias is a weight with one column, so that it goes with its row.

    Where units are whole rows or columns, ``lines`` are the numbers of those that are cut, and ``parked`` holds these alone;
    otherwise ``parked`` has the weight's shape, zero where units are kept. ``origin`` is what a ``rewind`` goes back to.
    """

    judged: ClassVar[bool] = True
    """Whether its values say what a unit is worth; an adapter's factor is only cut with the others."""

    frozen: ClassVar[bool] = False
    """Whether no optimizer moves it and no checkpoint holds it."""

    def __init__(self, name: str, parameter: nn.Parameter, site: Site):
        self.name = name
        self.parameter = parameter
        self.site = site
        self.split = Split.of(parameter, name)
        self.lines: Tensor | None = None
        self.parked: Tensor | None = None
        self.origin: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The rows that lie on this rank, which are all of them unless the model is split (FSDP2)."""
        data = here(self.parameter).detach()
        return data if data.ndim == 2 else data.unsqueeze(1)

    @property
    def gradient(self) -> Tensor | None:
        grad = None if self.parameter.grad is None else here(self.parameter.grad)
        return grad if grad is None or grad.ndim == 2 else grad.unsqueeze(1)

    @property
    def effective(self) -> Tensor:
        """What the forward multiplies by, which criteria judge: the weight, with what an adapter adds to it."""
        return self.weight

    @property
    def effective_gradient(self) -> Tensor | None:
        """The loss's gradient with respect to ``effective``, or an estimate of it."""
        return self.gradient

    @property
    def outline(self) -> Tensor:
        """The shape of the whole matrix, without values."""
        shape = self.parameter.shape
        return torch.empty(shape if len(shape) == 2 else (*shape, 1), device="meta")

    def cover(self, pruned: Tensor) -> None:
        """Before a forward: what else is added to ``pruned`` weights is made up for, so that they count as zeros."""

    def uncover(self) -> None:
        """The inverse of ``cover``, where it was done: cut weights are zeros themselves."""

    def add_parked(self, sign: int) -> None:
        """Bring the parked values back into the weight (1), or take them out of it (-1)."""
        if self.parked is not None and self.lines is not None:
            self.weight.index_add_(self.site.axis, self.lines, self.parked, alpha=sign)
        elif self.parked is not None:
            self.weight.add_(self.parked, alpha=sign)

    def beside(self) -> dict[str, Tensor]:
        """What the slot holds beside its parameter, by name, each in the weight's shape."""
        found = {"parked": self.parked, "origin": self.origin}
        if self.parked is not None and self.lines is not None:
            found["parked"] = torch.zeros_like(self.weight).index_add_(self.site.axis, self.lines, self.parked)
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def hold(self, found: Mapping[str, Tensor]) -> None:
        """The inverse of ``beside``, for the lines that are cut now."""
        self.parked, self.origin = found.get("parked"), found.get("origin")
        if self.parked is not None and self.lines is not None:
            self.parked = self.parked.index_select(self.site.axis, self.lines)


class Group:
    """The slots that share one unit grid: a matrix alone, or the coupled matrices and biases of an MLP or attention.

    ``mask`` (bool, the grid's shape) is True where a unit is kept. While a unit is cut its weights are exact zeros in
    the model, and their values are *parked*: ``W = weight + parked``. A ``gate`` (fp32, 0 to 1) weighs the units that are
    kept: the model holds ``gate * W``, and what is missing is parked. ``heard`` is ``sum(dL/dW' * W)`` per unit where gradients
    were consumed as they came (``pruning.adapters``).
    """

    def __init__(self, name: str, rule: Rule, slots: list[Slot]):
        self.name = name
        self.rule = rule
        self.slots = slots
        shapes = {rule.structure.units(slot.outline, slot.site) for slot in slots}
        if len(shapes) != 1:
            raise InputError(f"{name}: its matrices do not share one unit grid ({sorted(map(tuple, shapes))})")
        self.shape = shapes.pop()
        whole = torch.ones(self.shape, dtype=torch.bool, device=slots[0].parameter.device)
        self.mask = whole if self.split is None else self.split.part(whole)
        self.kept = self.units
        self.gate: Tensor | None = None
        self.heard: Tensor | None = None
        rule.criterion.check(self)

    @property
    def split(self) -> Split | None:
        """How the grid is split among ranks; a grid of larger units than single weights lies whole on each."""
        return self.slots[0].split if self.rule.structure.single else None

    @property
    def units(self) -> int:
        """On all ranks together; ``kept`` likewise."""
        return self.shape.numel()

    @property
    def cut(self) -> bool:
        return self.kept < self.units

    @property
    def matrices(self) -> list[Slot]:
        """Without biases, and without what an adapter adds."""
        return [slot for slot in self._judged() if slot.parameter.ndim == 2]

    def sum(self, value: Callable[[Slot], Tensor], among: Sequence[Slot] | None = None) -> Tensor:
        """A weight-shaped value per slot, summed per unit over the whole group (or some of its slots), on all ranks."""
        structure, slots = self.rule.structure, self._judged() if among is None else among
        parts = [
            structure.reduce(value(slot), slot.site)
            if slot.split is None or structure.single
            else structure.reduce_rows(value(slot), slot.site, slot.split.rows.start, slot.outline)
            for slot in slots
        ]
        mine = parts[0]
        for part in parts[1:]:
            mine = mine + part
        split = slots[0].split
        return mine if split is None or structure.single else total(mine, split.mesh)

    def expand(self, grid: Tensor, slot: Slot) -> Tensor:
        """A grid over the rows of a slot that lie here."""
        whole = self.rule.structure.expand(grid, slot.outline, slot.site)
        return whole if slot.split is None or self.rule.structure.single else whole[slot.split.rows]

    def spread(self, grid: Tensor) -> Tensor:
        """The grid with what other ranks hold of it."""
        return grid if self.split is None else self.split.spread(grid)

    def part(self, whole: Tensor) -> Tensor:
        """What lies here of a grid that every rank has made."""
        return whole if self.split is None else self.split.part(whole)

    def whole(self, grid: Tensor) -> Tensor:
        """The inverse of ``part``; all ranks have to join in."""
        return grid if self.split is None else self.split.whole(grid)

    def set_mask(self, mask: Tensor, gate: Tensor | None = None) -> None:
        """Take a new mask; the weights follow at the next ``park``."""
        self.mask, self.gate = mask, gate
        self.kept = int(total(mask.count_nonzero(), None if self.split is None else self.split.mesh))
        for slot in self.slots:
            slot.lines = self._lines(slot) if self.cut and gate is None and self.rule.structure.sliced else None

    def pruned(self, slot: Slot) -> Tensor:
        """True where the slot's weights are cut; made anew at each call, for only grids are kept."""
        return self.expand(~self.mask, slot)

    def _lines(self, slot: Slot) -> Tensor:
        axis = slot.site.axis
        along = self.rule.structure.expand(~self.mask, slot.outline, slot.site).select(1 - axis, 0)
        mine = along if slot.split is None or axis == 1 else along[slot.split.rows]
        return mine.nonzero().squeeze(1)

    def follow(self, parameters: Mapping[str, nn.Parameter], state: dict[str, Tensor]) -> None:
        """Go where the parameters of these names are, with mask, parked values and the criterion's state."""
        before = self.split
        after = Split.of(parameters[self.slots[0].name], self.name) if self.rule.structure.single else None
        mask, gate = (None if grid is None else moved(grid, before, after) for grid in (self.mask, self.gate))
        for key, tensor in state.items():
            if tensor.shape == self.mask.shape:
                state[key] = moved(tensor, before, after)
        held = []
        for slot in self.slots:
            was, slot.split = slot.split, Split.of(parameters[slot.name], slot.name)
            held.append({key: moved(tensor, was, slot.split) for key, tensor in slot.beside().items()})
            slot.parameter = parameters[slot.name]
        assert mask is not None
        self.set_mask(mask, gate)
        for slot, found in zip(self.slots, held, strict=True):
            slot.hold(found)

    def unpark(self) -> None:
        """Whole weights again: the optimizer's momentum and decay act on cut weights as on any other."""
        for slot in self.slots:
            slot.add_parked(1)
            slot.parked = None

    def clear_gradients(self) -> None:
        """The optimizer sees no gradient of what is cut, and none at all (so no decay either) of frozen weights."""
        self.heard = None
        for slot in self.slots:
            if not self.rule.criterion.trains_weights:
                slot.parameter.grad = None
            elif (gradient := slot.gradient) is not None:
                if self.cut:
                    gradient.masked_fill_(self.pruned(slot), 0)
                if self.gate is not None:
                    gradient.mul_(self._weigh(slot))

    def park(self) -> None:
        """Move the values of cut weights beside the model, exactly: ``W - 0 = W`` there and ``W - W = 0`` elsewhere.

        Where a cut is for good, they are gone.
        """
        if not self.rule.regrow:
            self.zero()
            return
        for slot in self.slots:
            slot.parked = None
            if self.gate is not None:
                # The larger of the two parts is at least half of W, so one of the subtractions is exact (Sterbenz), and
                # W comes back to the bit.
                slot.parked = slot.weight - slot.weight * self._weigh(slot)
            elif slot.lines is not None:
                slot.parked = slot.weight.index_select(slot.site.axis, slot.lines)
            elif self.cut:
                slot.parked = slot.weight.masked_fill(self.expand(self.mask, slot), 0)
            slot.add_parked(-1)

    def _weigh(self, slot: Slot) -> Tensor:
        assert self.gate is not None
        return self.expand(self.gate.to(slot.weight.dtype), slot)

    def remember(self) -> None:
        """Keep the whole weights of now, the first time, for a later ``rewind``."""
        for slot in self.slots:
            slot.origin = slot.weight.clone() if slot.origin is None else slot.origin

    def rewind(self) -> None:
        """Whole weights as they were when they were remembered."""
        for slot in self.slots:
            if slot.origin is not None:
                slot.weight.copy_(slot.origin)
                slot.origin = None

    def zero(self) -> None:
        """Write the cut weights as zeros and forget their values: these units do not come back."""
        for slot in self.slots:
            slot.parked = None
            if self.cut:
                slot.weight.masked_fill_(self.pruned(slot), 0)

    def _judged(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.judged]


def give_densities(groups: Sequence[Group], densities: Sequence[float]) -> None:
    """What a dry pass has found for the groups of one rule with ``budget: sensitivity``: the rule knows it from now on."""
    rule = groups[0].rule
    assert isinstance(rule.budget, Sensitivity)
    measured = replace(rule, budget=replace(rule.budget, densities=tuple(densities)))
    for group in groups:
        group.rule = measured
