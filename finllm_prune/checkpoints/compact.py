"""compact: FFN neurons without effect are gone, every block has the same width. Loads with plain ``from_pretrained``.

Smaller files, and really faster on any hardware. The width is that of the widest block; narrower ones keep some zero
neurons, so a uniform budget loses nothing. Not covered: heads (BERT-like configs have no ``head_dim``) and single zeros.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.proof import save_proved
from finllm_prune.families import Family, find_family


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the smaller model; returns it."""
    smaller = compact(model)
    save_proved(model, tokenizer, folder, "compact", smaller=smaller)
    return smaller


def compact(model: PreTrainedModel) -> PreTrainedModel:
    """A new model of the same class without the FFN neurons whose output weights are all zero."""
    family = find_family(model.config.model_type)
    kept = [_alive(model, family, block) for block in range(len(family.layers(model)))]
    width = max(1, max(int(alive.sum()) for alive in kept))
    config = copy.deepcopy(model.config)
    setattr(config, family.width, width)
    smaller: PreTrainedModel = type(model)(config)
    nn.Module.to(smaller, dtype=model.dtype)
    state = dict(model.state_dict())
    for block, alive in enumerate(kept):
        # Neurons without effect fill narrow blocks up; a stable sort keeps the order, so the result is deterministic.
        index = alive.long().argsort(descending=True, stable=True)[:width].sort().values
        for site in family.sites(model, "mlp", block):
            linear = model.get_submodule(site.path)
            assert isinstance(linear, nn.Linear)
            state[f"{site.path}.weight"] = _take(linear.weight, site.axis, index, site.fused)
            if site.axis == 0 and linear.bias is not None:
                state[f"{site.path}.bias"] = _take(linear.bias, 0, index, site.fused)
    smaller.load_state_dict(state)
    nn.Module.to(smaller, device=model.device)
    smaller.train(model.training)
    return smaller


def _alive(model: PreTrainedModel, family: Family, block: int) -> Tensor:
    down = model.get_submodule(family.sites(model, "mlp", block)[-1].path)
    assert isinstance(down, nn.Linear)
    return (down.weight != 0).any(dim=0)


def _take(tensor: Tensor, axis: int, index: Tensor, fused: int) -> Tensor:
    parts = tensor.detach().chunk(fused, axis)
    return torch.cat([part.index_select(axis, index) for part in parts], axis).clone()
