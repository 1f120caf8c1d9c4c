"""Hybrid filling (Lagunas et al. 2021, https://arxiv.org/abs/2109.04838): fine cuts choose, whole heads and neurons go.

Blocks or single weights are cut as always until the masks freeze. Then a head or neuron of which anything useful is left is
dense again, with the values that were parked, and is fine-tuned; one of which nothing is left goes, with its biases.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.pruning.criteria import SecondOrder
from finllm_prune.pruning.groups import Group, Rule, Slot
from finllm_prune.pruning.oneshot import pattern_of


def survivors(group: Group, pruned: Mapping[str, Tensor]) -> Tensor:
    """The mask of a group of coupled matrices: the units that still read something and write something.

    Args:
        group: heads or neurons, rows of their inputs and columns of their output.
        pruned: slot name -> True where the matrix's own mask has cut it, in the weight's shape.
    """

    def stays(slot: Slot) -> Tensor:
        return (~pruned[slot.name]).float()

    matrices = [slot for slot in group.slots if slot.parameter.ndim == 2]
    left = [
        group.sum(stays, [slot for slot in matrices if slot.site.axis == axis]) for axis in (0, 1)
    ]  # inputs, output
    mask = torch.minimum(*left) > 0
    if not bool(mask.any()):
        mask[(left[0] + left[1]).argmax()] = True
    return mask


def refuse_unfillable(rules: Sequence[Rule]) -> None:
    """What can be told without a model; rules that cut whole units already are left as they are."""
    if all(rule.structure.couples for rule in rules):
        raise InputError(
            "pruning.fill: every rule cuts whole units already, so there is nothing to fill; remove the key, or set a "
            "rule's structure to block"
        )
    for i, rule in enumerate(rules):
        if not rule.regrow:
            raise InputError(
                f"pruning.rules.{i}.regrow: pruning.fill brings back what waits beside the model; set regrow: true, or "
                "fill: false"
            )
        if pattern_of(rule.structure) is not None:
            raise InputError(
                f"pruning.rules.{i}.structure: n:m leaves weights in every head and neuron, so pruning.fill would undo it; "
                "set block or unstructured, or fill: false"
            )
        if isinstance(rule.criterion, SecondOrder) and rule.criterion.correct:
            raise InputError(
                f"pruning.rules.{i}.criterion: second_order moves the others to make up for what pruning.fill brings back; "
                "set correct: false, or fill: false"
            )
        if not (rule.structure.couples or rule.criterion.trains_weights):
            raise InputError(
                f"pruning.rules.{i}.criterion: score_movement does not train weights, and what pruning.fill brings back "
                "is fine-tuned; set another criterion, or fill: false"
            )
