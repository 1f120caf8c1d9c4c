"""One pass over a streamed model: which blocks are worth least, and the pruning of all of them, one after the other."""

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from finllm_prune.errors import InputError
from finllm_prune.oneshot.likelihood import windows_asked
from finllm_prune.oneshot.streamed import Streamed
from finllm_prune.oneshot.texts import Batch
from finllm_prune.pruning import (
    Activations,
    Calibrated,
    Group,
    OneShot,
    Rule,
    Slot,
    Uniform,
    refuse_overlap,
    refuse_unreachable,
)
from finllm_prune.training import Pass, lies_in, prune_block, refuse_no_chain

Write = Callable[[int, dict[str, Tensor]], None]


class Plan:
    """What the rules cut in a model that has no weights yet.

    Args:
        model: whose layers the rules name.
        rules: of heads, neurons and single weights; and of whole layers, which may come beside them.

    Raises:
        InputError: a rule that the model cannot take.
    """

    def __init__(self, model: Streamed, rules: Sequence[Rule]):
        self.layers = [rule for rule in rules if rule.structure.couples == "encoder"]
        if len(self.layers) > 1 or any(rule.target != "encoder" for rule in self.layers):
            raise InputError(
                "pruning.rules: one rule of structure layer with target: encoder is what oneshot can carry out"
            )
        model.family.groups(model.model, self.layers)
        self.groups = model.family.groups(model.model, [rule for rule in rules if rule not in self.layers])
        if self.groups or not self.layers:
            refuse_overlap(self.groups)
            refuse_unreachable(self.groups)
        refuse_no_chain(model.model, model.family, self.groups)

    def dropped(self, worth: Tensor) -> set[int]:
        """The blocks that the rule for layers leaves out: those that are worth least."""
        (rule,) = self.layers
        assert rule.sparsity is not None
        kept = Uniform().share([worth], 1.0 - rule.sparsity)[0]
        return {block for block in range(len(worth)) if not kept[block]}

    def of(self, model: Streamed, block: int) -> list[Group]:
        """The groups of a block that has weights now."""
        return [
            Group(group.name, group.rule, [Slot(s.name, model.model.get_parameter(s.name), s.site) for s in group.slots])
            for group in self.groups
            if lies_in(group, model.model, model.family, block)
        ]  # fmt: skip


def worth_of_blocks(model: Streamed, method: Activations, windows: list[list[int]], batches: list[Batch]) -> Tensor:
    """(blocks,): what the model would miss without each."""
    if method.blocks == "influence":
        return influence(model, model.begin(batches))
    return perplexity_without(model, windows, model.begin(batches))


def influence(model: Streamed, passes: list[Pass]) -> Tensor:
    """1 - the mean cosine between the input and the output of each block, over all tokens."""
    found = []
    for index, layer in model.blocks("influence of blocks"):
        cosines = []
        for step in passes:
            before, step.hidden = step.hidden, step.run(index, layer)
            cosines.append(cosine_similarity(before.float(), step.hidden.float(), dim=-1)[step.real.to(before.device)])
        found.append(1.0 - torch.cat(cosines).double().mean())
    return torch.stack(found).float().cpu()


def perplexity_without(model: Streamed, windows: list[list[int]], passes: list[Pass]) -> Tensor:
    """The perplexity of the model without each block; all these models go through a block together."""
    without: list[list[Pass]] = []
    for index, layer in model.blocks("perplexity without each block"):
        skipping = [copy(step) for step in passes]
        for step in [*passes, *(step for variant in without for step in variant)]:
            step.hidden = step.run(index, layer)
        without.append(skipping)
    asked = windows_asked(windows)
    return torch.tensor([asked.perplexity(asked.log_likelihoods(model, each)).value for each in without])


def prune(
    model: Streamed, plan: Plan, method: OneShot, calibration: list[Pass], dropped: set[int], others: list[Pass],
    write: Write,
) -> dict[str, int]:  # fmt: skip
    """Prune each block on what it gets from the pruned blocks before it, and write it.

    Args:
        calibration: texts on their way to the first block; none for a method that needs none.
        dropped: blocks that become identities.
        others: rows that travel along, unseen by the method.
        write: takes the number of a block and its tensors by name.

    Returns:
        The number of zeros in each linear layer.
    """
    zeros: dict[str, int] = {}
    for index, layer in model.blocks("prune"):
        if index in dropped:
            _empty(layer)
        else:
            _cut(model, plan, method, calibration, index, layer)
            for step in calibration:
                step.hidden = step.run(index, layer)
        for step in others:
            step.hidden = step.run(index, layer)
        zeros |= zeros_of(model, index)
        write(index, tensors_of(model, index))
    return zeros


def tensors_of(model: Streamed, block: int) -> dict[str, Tensor]:
    """The tensors of a block that has weights now, by name; whoever keeps them keeps the block."""
    return {name: model.model.get_parameter(name).detach().cpu() for name in model.names(block)}


def zeros_of(model: Streamed, block: int) -> dict[str, int]:
    """Path -> the exact zeros of each linear layer of a block that has weights now."""
    sites = [site for part in ("attention", "mlp") for site in model.family.sites(model.model, part, block)]
    return {site.path: int((model.model.get_parameter(f"{site.path}.weight") == 0).sum()) for site in sites}


def _cut(
    model: Streamed, plan: Plan, method: OneShot, calibration: list[Pass], index: int, layer: nn.Module
) -> None:  # fmt: skip
    """A function of its own, at whose end no group holds the block's weights any more."""
    groups = plan.of(model, index)
    if isinstance(method, Calibrated):
        prune_block(model.model, groups, method, calibration, index, layer)
        return
    for group in groups:  # by scores of the weights alone
        assert group.rule.sparsity is not None
        scores = group.rule.structure.rank(method.score(group, {}))
        group.set_mask(Uniform().share([scores], 1.0 - group.rule.sparsity)[0])
        group.zero()


def _empty(layer: nn.Module) -> None:
    """An identity of a block whose norms come first: its linear layers and their biases are zero."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters():
                parameter.zero_()
