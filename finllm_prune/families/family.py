"""What an architecture is, as data, and what follows from it: its prunable groups, its widths, its depth."""

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.pruning import Group, Rule, Site, Slot


@dataclass(frozen=True)
class Part:
    """The attention or the MLP of a block: linear layers cut along their rows, then one cut along its columns."""

    inputs: tuple[str, ...]
    output: str
    fused: int = 1


@dataclass(frozen=True)
class Family:
    """An architecture.

    Args:
        model_type: as in the config; the file that declares it has this name, with underscores.
        blocks: the path of the list of transformer blocks, from the base model.
        attention: its matrices, by their paths from a block.
        mlp: likewise.
        heads, width, depth: the names that the config gives to the number of attention heads, the FFN width and the
            number of blocks.
    """

    model_type: str
    blocks: str
    attention: Part
    mlp: Part
    heads: str = "num_attention_heads"
    width: str = "intermediate_size"
    depth: str = "num_hidden_layers"

    def root(self, model: PreTrainedModel) -> str:
        """The path of the list of blocks, from the model's root."""
        prefix = model.base_model_prefix
        return f"{prefix}.{self.blocks}" if hasattr(model, prefix) else self.blocks

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        layers = model.get_submodule(self.root(model))
        assert isinstance(layers, nn.ModuleList)
        return layers

    def sites(self, model: PreTrainedModel, part: str, block: int) -> list[Site]:
        """The matrices of one part ("attention" or "mlp") of one block."""
        declared: Part = getattr(self, part)
        heads = getattr(model.config, self.heads) if part == "attention" else 1
        prefix = f"{self.root(model)}.{block}"
        cut_rows = [Site(f"{prefix}.{path}", 0, declared.fused, heads) for path in declared.inputs]
        return [*cut_rows, Site(f"{prefix}.{declared.output}", 1, 1, heads)]

    def groups(self, model: PreTrainedModel, rules: list[Rule]) -> list[Group]:
        """The rules, resolved on a model."""
        return [group for rule in rules for group in self._groups(model, rule)]

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Path -> every prunable linear layer: the denominator "encoder"."""
        sites = [
            site
            for block in range(len(self.layers(model)))
            for part in ("attention", "mlp")
            for site in self.sites(model, part, block)
        ]
        return {site.path: _linear(model, site.path) for site in sites}

    def keep_layers(self, model: PreTrainedModel, keep: list[int]) -> None:
        """Drop whole blocks, so that a plain smaller model of the same class is left."""
        layers = self.layers(model)
        if not keep or sorted(set(keep)) != keep or keep[0] < 0 or keep[-1] >= len(layers):
            raise InputError(
                f"model.keep_layers: {keep} must name blocks of this model, ascending and without repeats: "
                f"0 to {len(layers) - 1}"
            )
        parent, _, name = self.root(model).rpartition(".")
        setattr(model.get_submodule(parent), name, nn.ModuleList(layers[i] for i in keep))
        setattr(model.config, self.depth, len(keep))

    def _groups(self, model: PreTrainedModel, rule: Rule) -> list[Group]:
        parts = {"attention": ["attention"], "mlp": ["mlp"], "encoder": ["attention", "mlp"]}.get(rule.target)
        name, couples = type(rule.structure).__name__.lower(), rule.structure.couples
        if parts is None:
            raise InputError(f"pruning.rules: unknown target '{rule.target}'; use attention, mlp or encoder")
        if couples and parts != [couples]:
            raise InputError(
                f"pruning.rules: structure {name} exists in target {couples} only, not in {rule.target}; "
                f"set target: {couples}, or use unstructured or block"
            )
        groups = []
        for block in range(len(self.layers(model))):
            for part in parts:
                sites = self.sites(model, part, block)
                if couples:
                    slots = [slot for site in sites for slot in _slots(model, site, with_bias=True)]
                    groups.append(Group(f"{self.root(model)}.{block}.{part}", rule, slots))
                else:
                    groups += [Group(site.path, rule, _slots(model, site, with_bias=False)) for site in sites]
        return groups


def find_family(model_type: str) -> Family:
    """The family of a ``config.model_type``; an unknown one is an error that names the file to write."""
    name = model_type.replace("-", "_")
    try:
        module = importlib.import_module(f"finllm_prune.families.{name}")
        family = module.FAMILY
    except (ModuleNotFoundError, AttributeError):
        raise InputError(
            f"model: no family is known for model_type '{model_type}'; declare its layer names in "
            f"finllm_prune/families/{name}.py (bert.py there is a model to follow)"
        ) from None
    assert isinstance(family, Family)
    return family


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    module: Any = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise InputError(f"model: {path} is a {type(module).__name__}, not a linear layer")
    return module


def _slots(model: PreTrainedModel, site: Site, with_bias: bool) -> list[Slot]:
    linear = _linear(model, site.path)
    slots = [_slot(linear.weight, f"{site.path}.weight", site)]
    if with_bias and site.axis == 0 and linear.bias is not None:
        slots.append(_slot(linear.bias, f"{site.path}.bias", site))
    return slots


def _slot(parameter: Tensor, name: str, site: Site) -> Slot:
    assert isinstance(parameter, nn.Parameter)
    return Slot(name, parameter, site)
