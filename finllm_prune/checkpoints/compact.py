"""compact: what has no effect is gone, and every block has the same widths. Loads with plain ``from_pretrained``.

Smaller files, and really faster on any hardware. What goes: FFN neurons; heads (kv groups) where the config has a
``head_dim`` of its own (Llama and its kin); blocks that add nothing to the residual stream, where the norms come first. A
width is that of the widest block, or the next one that the config can have; narrower ones keep some zero units, so a
uniform budget loses nothing. Not covered: heads of BERT-like models, zero blocks behind a post-norm, single zeros.
"""

import copy
from pathlib import Path

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
    """A new model of the same class without the blocks, heads and FFN neurons whose output weights are all zero."""
    family = find_family(model.config.model_type)
    model = _without_idle_blocks(model, family)
    config = copy.deepcopy(model.config)
    state = dict(model.state_dict())
    for part in ("attention", "mlp") if family.free_heads else ("mlp",):
        kept = [_alive(model, family, part, block) for block in range(len(family.layers(model)))]
        units = family.resize(config, part, max(int(alive.sum()) for alive in kept))
        for block, alive in enumerate(kept):
            # Units without effect fill narrow blocks up; a stable sort keeps the order, so the result is deterministic.
            index = alive.long().argsort(descending=True, stable=True)[:units].sort().values
            for site in family.sites(model, part, block):
                linear = _linear(model, site.path)
                state[f"{site.path}.weight"] = _take(linear.weight, site.axis, index, site.fused, alive.numel())
                if site.axis == 0 and linear.bias is not None:
                    state[f"{site.path}.bias"] = _take(linear.bias, 0, index, site.fused, alive.numel())
    smaller: PreTrainedModel = type(model)(config)
    nn.Module.to(smaller, dtype=model.dtype)
    smaller.load_state_dict(state)
    nn.Module.to(smaller, device=model.device)
    smaller.train(model.training)
    return smaller


def _without_idle_blocks(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """The model itself, or a copy without the blocks that are identities; a block unlike the others stays."""
    layers = family.layers(model)
    keep = [block for block in range(len(layers)) if not family.idle(model, block)]
    if len(keep) == len(layers):
        return model
    smaller = copy.deepcopy(model)
    family.keep_layers(smaller, keep or [0])
    return smaller


def _alive(model: PreTrainedModel, family: Family, part: str, block: int) -> Tensor:
    """The units of a part that have an effect: those with an output weight that is not zero."""
    output = family.sites(model, part, block)[-1]
    used = (_linear(model, output.path).weight != 0).any(dim=0)
    return used.view(output.heads, -1).any(dim=1) if part == "attention" else used


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _take(tensor: Tensor, axis: int, index: Tensor, fused: int, units: int) -> Tensor:
    """The units of that index, of each of the fused matrices."""
    parts: Tensor = tensor.detach().unflatten(axis, (fused, units, -1))
    return parts.index_select(axis + 1, index).flatten(axis, axis + 2)
