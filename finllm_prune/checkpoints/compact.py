"""compact: what has no effect is gone, and every block has the same widths. Loads with plain ``from_pretrained``.

Smaller files, and really faster on any hardware. What goes: FFN neurons; heads (kv groups) where the config has a
``head_dim`` of its own (Llama and its kin); blocks that add nothing to the residual stream, where the norms come first. A
width is that of the widest block, or the next one that the config can have; narrower ones keep some zero units, so a
uniform budget loses nothing. Not covered: heads of BERT-like models, zero blocks behind a post-norm, single zeros.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.proof import save_proved
from finllm_prune.checkpoints.quantizer import widths
from finllm_prune.families import Cut, Family, alive, expand, find_family, keep
from finllm_prune.families.shrinking import PARTS


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the smaller model; returns it."""
    smaller = compact(model)
    save_proved(model, tokenizer, folder, "compact", smaller=smaller)
    return smaller


def compact(model: PreTrainedModel) -> PreTrainedModel:
    """A new model of the same class without the blocks, heads and FFN neurons whose output weights are all zero."""
    family = find_family(model.config.model_type)
    model = without_idle_blocks(evened(model), family)
    config = copy.deepcopy(model.config)
    state = dict(model.state_dict())
    for part in ("attention", "mlp") if family.free_heads else ("mlp",):
        used = [alive(model, family, part, block) for block in range(len(family.layers(model)))]
        width = family.resize(config, part, max(int(units.sum()) for units in used))
        for block, units in enumerate(used):
            for name, cut in keep(model, family, part, block, fill_up(units, width)).items():
                state[name] = cut.take(state[name])
    smaller: PreTrainedModel = type(model)(config)
    _same_words(model, smaller)
    nn.Module.to(smaller, dtype=model.dtype)
    smaller.load_state_dict(state)
    nn.Module.to(smaller, device=model.device)
    smaller.train(model.training)
    return smaller


def fill_up(used: Tensor, width: int) -> Tensor:
    """The numbers of so many units, ascending: those that are used, and others to fill a narrow block up."""
    # A stable sort keeps the order, so the result is deterministic.
    return used.long().argsort(descending=True, stable=True)[:width].sort().values


def evened(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy of a ragged one: zeros fill its blocks up to the widths that its config tells."""
    if not widths(model):
        return model
    family = find_family(model.config.model_type)
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    even: PreTrainedModel = type(model)(config)
    _same_words(model, even)
    nn.Module.to(even, dtype=model.dtype)
    cuts: dict[str, Cut] = {}
    for block in range(len(family.layers(model))):
        for part in PARTS:
            count = len(alive(model, family, part, block))
            if count < len(alive(even, family, part, block)):
                cuts |= keep(even, family, part, block, torch.arange(count))
    for name in cuts:
        nn.init.zeros_(even.get_parameter(name))
    expand(model, even, cuts)
    nn.Module.to(even, device=model.device)
    even.train(model.training)
    return even


def _same_words(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """A language model that was built anew says and ends its texts as the old one."""
    if model.can_generate():
        other.generation_config = model.generation_config


def without_idle_blocks(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """The model itself, or a copy without the blocks that are identities; a block unlike the others stays."""
    layers = family.layers(model)
    busy = [block for block in range(len(layers)) if not family.idle(model, block)]
    if len(busy) == len(layers):
        return model
    smaller = copy.deepcopy(model)
    family.keep_layers(smaller, busy or [0])
    return smaller
