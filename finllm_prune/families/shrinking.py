"""Heads and neurons without effect, and a model without them: each block as narrow as it can be."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finllm_prune.families.family import Family, find_family

PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class Cut:
    """What stays of a parameter: ``index`` (int64, ascending) along ``axis``."""

    axis: int
    index: Tensor

    def take(self, tensor: Tensor) -> Tensor:
        """What stays of a tensor of the parameter's shape: itself, its gradient, or one of its moments."""
        return tensor.index_select(self.axis, self.index.to(tensor.device))

    def put(self, part: Tensor, tensor: Tensor) -> None:
        """The inverse: write what stayed into its place in a tensor of the whole shape; the rest of it is left alone."""
        tensor.index_copy_(self.axis, self.index.to(tensor.device), part.to(tensor.device))


def alive(model: PreTrainedModel, family: Family, part: str, block: int) -> Tensor:
    """The units of a part ("attention": heads or kv groups, "mlp": neurons) with an effect, as bools.

    These have an output weight that is not zero.
    """
    output = family.sites(model, part, block)[-1]
    weight = model.get_parameter(f"{output.path}.weight")
    used = (weight != 0).any(dim=0)
    return used.view(output.heads, -1).any(dim=1) if part == "attention" else used


def keep(model: PreTrainedModel, family: Family, part: str, block: int, units: Tensor) -> dict[str, Cut]:
    """Parameter name -> what stays of it where only these units of a part stay.

    Args:
        units: their numbers, int64, ascending.
    """
    cuts: dict[str, Cut] = {}
    *inputs, output = family.sites(model, part, block)
    count = len(alive(model, family, part, block))
    for site in (*inputs, output):
        linear = model.get_submodule(site.path)
        assert isinstance(linear, nn.Linear)
        entries = torch.arange(linear.weight.shape[site.axis]).unflatten(0, (site.fused, count, -1))
        cut = Cut(site.axis, entries.index_select(1, units.cpu()).flatten())
        cuts[f"{site.path}.weight"] = cut
        if site.axis == 0 and linear.bias is not None:
            cuts[f"{site.path}.bias"] = cut
    return cuts


def without_effect(model: PreTrainedModel) -> dict[str, Cut]:
    """Parameter name -> what stays of it without the heads and neurons that have no effect; one of each block stays.

    Parameters that stay whole are not named.
    """
    family = find_family(model.config.model_type)
    cuts: dict[str, Cut] = {}
    for block in range(len(family.layers(model))):
        for part in PARTS:
            used = alive(model, family, part, block)
            if not bool(used.all()):
                units = used.nonzero().squeeze(1) if bool(used.any()) else torch.zeros(1, dtype=torch.int64)
                cuts |= keep(model, family, part, block, units)
    return cuts


def shrink(model: PreTrainedModel, cuts: dict[str, Cut]) -> PreTrainedModel:
    """A copy with smaller linear layers. Its config is the old one: such a model needs a format that knows its widths."""
    smaller = copy.deepcopy(model)
    cut_in_place(smaller, cuts)
    return smaller


def cut_in_place(model: PreTrainedModel, cuts: dict[str, Cut]) -> None:
    """The same in place, as for a model that has no weights yet."""
    for name, cut in cuts.items():
        path, _, kind = name.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        old = getattr(linear, kind)
        setattr(linear, kind, nn.Parameter(cut.take(old.detach()), requires_grad=old.requires_grad))
        linear.out_features, linear.in_features = linear.weight.shape
    tell_heads(model)


def narrow(model: PreTrainedModel, widths: Mapping[str, Sequence[int]]) -> PreTrainedModel:
    """A copy with the first so many units of each part ("attention", "mlp"), block by block."""
    family = find_family(model.config.model_type)
    cuts: dict[str, Cut] = {}
    for part, counts in widths.items():
        for block, count in enumerate(counts):
            cuts |= keep(model, family, part, block, torch.arange(count))
    return shrink(model, cuts)


@torch.no_grad()
def expand(small: PreTrainedModel, model: PreTrainedModel, cuts: dict[str, Cut]) -> None:
    """The inverse of ``shrink``: write the weights of the small model into the full-size one that it came from."""
    parts = small.state_dict()
    for name, whole in model.state_dict().items():
        if name in cuts:
            cuts[name].put(parts[name], whole)
        else:
            whole.copy_(parts[name])


def tell_heads(model: PreTrainedModel) -> None:
    """Correct the number of heads of the modules that do not take it from the shape of their weights."""
    family = find_family(model.config.model_type)
    if family.counts_heads is not None:
        for block, layer in enumerate(family.layers(model)):
            attention: Any = layer.get_submodule(family.counts_heads)
            attention.num_attention_heads = family.sites(model, "attention", block)[-1].heads
