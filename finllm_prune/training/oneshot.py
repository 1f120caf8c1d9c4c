"""One shot on a whole model, block by block: each block's inputs come from the pruned blocks before it.

Not covered: models whose blocks are no plain chain (shared weights, a convolution between two blocks): they are refused.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast, recursively_apply, send_to_device
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.families import Architecture, Family
from finllm_prune.inference import answer
from finllm_prune.pruning import Activations, ByMatrix, Calibrated, Group, OneShot, Pruner, pattern_of


def prune_once(
    model: PreTrainedModel, family: Architecture, pruner: Pruner, method: OneShot, batches: Iterable[dict[str, Tensor]]
) -> None:
    """Choose the final masks before training and fix them in the Pruner.

    Without data the rules' own criterion and budget choose, which are to be the method's. With data, a block is run on the
    cached hidden states, pruned, and run again for the inputs of the next one, so that one block's statistics are held.

    Args:
        model: dense, with the Pruner's groups.
        batches: as the model takes them; tokens that ``attention_mask`` leaves out do not count.

    Raises:
        InputError: the model's blocks are no plain chain.
    """
    if not isinstance(method, Calibrated):
        pruner.finish()
        return
    assert isinstance(family, Family)  # `refuse_no_chain` has told
    masks: dict[str, Tensor] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        layers = family.layers(model)
        passes = record(model, layers, batches)
        if not passes:
            raise InputError("pruning.oneshot: there is no calibration data; give at least one batch, or use magnitude")
        for index, layer in enumerate(tqdm(layers, desc="one shot", leave=False)):
            groups = [group for group in pruner.groups if lies_in(group, model, family, index)]
            masks |= prune_block(model, groups, method, passes, index, layer)
            for step in passes:
                step.hidden = step.run(index, layer)
    model.train(was_training)
    pruner.fix(masks)


def prune_block(
    model: PreTrainedModel, groups: Sequence[Group], method: Calibrated, passes: Sequence["Pass"], index: int, layer: nn.Module
) -> dict[str, Tensor]:  # fmt: skip
    """Write the new weights of a block; returns the masks by the names of its groups.

    Args:
        groups: of this block.
        passes: what reaches it.
        index, layer: which block it is.
    """
    masks: dict[str, Tensor] = {}
    linears = [model.get_submodule(group.slots[-1].site.path) for group in groups]
    for group, seen in zip(groups, _observe(method, passes, index, layer, linears), strict=True):
        weight, rule = group.slots[0].weight, group.rule
        assert rule.sparsity is not None  # a one-shot method is refused beside a target
        if isinstance(method, Activations):
            mask = broadcast(method.choose(group, seen))
            group.set_mask(mask)
            group.zero()
        else:
            assert isinstance(method, ByMatrix)
            mask, pruned = method.prune(weight, seen, rule.sparsity, pattern_of(rule.structure))
            weight.copy_(pruned)
            # Unlike machines may round differently, and masks must be equal on all ranks; DDP equals the weights.
            mask = broadcast(mask)
        masks[group.name] = mask
    return masks


def refuse_no_chain(model: PreTrainedModel, family: Family, groups: list[Group]) -> None:
    """What can be told without running the model: blocks that are used several times, targets outside of the blocks."""
    blocks, depth = len(family.layers(model)), getattr(model.config, family.depth)
    if blocks != depth:
        raise InputError(
            f"pruning.oneshot: {family.model_type} runs {blocks} sets of weights as {depth} blocks, which cannot be "
            "calibrated one after the other; use oneshot: magnitude"
        )
    for group in groups:
        if group.rule.structure.couples == "encoder":
            raise InputError(
                "pruning.oneshot: whole layers are chosen by `finllm-prune oneshot`; use it, or name those to keep in "
                "model.keep_layers"
            )
        if not any(lies_in(group, model, family, block) for block in range(blocks)):
            raise InputError(
                f"pruning.oneshot: {group.name} lies in none of the model's blocks; set target to attention, mlp or "
                "encoder, or use oneshot: magnitude"
            )


@dataclass
class Pass:
    """One calibration batch on its way through the blocks.

    Args:
        real: (batch, tokens), False at padding.
        hidden: (batch, tokens, width), the input of the next block.
        calls: for each block, its other arguments: masks, positions.
    """

    real: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def to(self, device: torch.device) -> "Pass":
        """The same, waiting there. Blocks share masks and positions, and go on sharing them."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device)
            return moved[id(tensor)]

        return Pass(*recursively_apply(move, (self.real, self.hidden, self.calls)))

    def run(self, index: int, layer: nn.Module) -> Tensor:
        """The output of a block, where this pass's own states lie: the block may lie elsewhere."""
        device = next(layer.parameters()).device
        hidden, (args, kwargs) = send_to_device((self.hidden, self.calls[index]), device)
        return _hidden(layer(hidden, *args, **kwargs)).to(self.hidden.device)

    def inputs(self, index: int, layer: nn.Module, linears: Sequence[nn.Module]) -> list[Tensor]:
        """The inputs of some of a block's layers, (tokens, in), without padding."""
        seen: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(module, args[0])  # the tokens come first; DeBERTa sends relative positions after them

        with ExitStack() as hooks:
            for linear in linears:
                hooks.enter_context(linear.register_forward_pre_hook(keep))
            self.run(index, layer)
        return [inputs[self.real.to(inputs.device)] for inputs in (seen[linear] for linear in linears)]


def record(model: PreTrainedModel, layers: nn.ModuleList, batches: Iterable[dict[str, Tensor]]) -> list[Pass]:
    """The input of the first block and the other arguments of all, from one run of the dense model."""
    passes: list[Pass] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    ends: list[Tensor] = []  # the input of the first block, then the latest output

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ends[:] = ends or [args[0]]
        if args[0] is not ends[-1]:
            raise InputError(
                f"pruning.oneshot: in this {model.config.model_type} model something lies between two blocks, so that they "
                "cannot be calibrated one after the other; use oneshot: magnitude"
            )
        # A cache would go on growing with each run of a block.
        calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "past_key_values"}))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ends[1:] = [_hidden(output)]

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(after))
        for batch in batches:
            calls.clear()
            ends.clear()
            answer(model, {key: value.to(model.device) for key, value in batch.items()})
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            passes.append(Pass(real, ends[0], list(calls)))
    return passes


def _observe(
    method: Calibrated, passes: Sequence[Pass], index: int, layer: nn.Module, linears: list[nn.Module]
) -> list[Tensor]:
    """The statistics of each linear layer's inputs, over all batches: added up one by one, for they are the largest of all."""
    first, *others = passes
    total = [method.statistics(inputs) for inputs in first.inputs(index, layer, linears)]
    for step in others:
        for held, inputs in zip(total, step.inputs(index, layer, linears), strict=True):
            held += method.statistics(inputs)
    return total


def lies_in(group: Group, model: PreTrainedModel, family: Family, block: int) -> bool:
    """Whether a block holds what the group cuts."""
    return group.slots[0].site.path.startswith(f"{family.root(model)}.{block}.")


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
