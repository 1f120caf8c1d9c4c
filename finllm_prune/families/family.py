"""What an architecture is, as data, and what follows from it: its prunable groups, its widths, its depth."""

import contextlib
import importlib
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.families.architecture import Architecture, as_slot, missing, structure_name
from finllm_prune.pruning import Group, Head, Magnitude, Neuron, Rule, Site, Slot, Structure

TARGETS = {"attention": ("attention",), "mlp": ("mlp",), "encoder": ("attention", "mlp")}
_WHOLE: dict[str, Structure] = {"attention": Head(), "mlp": Neuron()}


@dataclass(frozen=True)
class Part:
    """The attention or the MLP of a block: linear layers cut along their rows, then one cut along its columns.

    Args:
        inputs: the paths of the former, from the block.
        output: that of the latter.
        fused: how many equal matrices are stacked in each input.
        optional: further inputs that only some configs have.
    """

    inputs: tuple[str, ...]
    output: str
    fused: int = 1
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family(Architecture):
    """An architecture.

    Args:
        model_type: as in the config; the file that declares it has this name, with underscores.
        blocks: the path of the list of transformer blocks, from the base model.
        attention: its matrices, by their paths from a block.
        mlp: likewise.
        heads, width, depth: the names that the config gives to the number of attention heads (of kv groups under GQA), the
            FFN width and the number of blocks.
        free_heads: whether a config with ``head_dim`` may have fewer heads than fill the hidden width.
        pre_norm: whether a block whose output matrices are zero is an identity.
        shared: whether several blocks share one set of weights.
        counts_heads: the module of a block that reads the number of its heads from its own ``num_attention_heads``, where
            there is one; the others take it from the shape of their weights.
    """

    model_type: str
    blocks: str
    attention: Part
    mlp: Part
    heads: str = "num_attention_heads"
    width: str = "intermediate_size"
    depth: str = "num_hidden_layers"
    free_heads: bool = False
    pre_norm: bool = False
    shared: bool = False
    counts_heads: str | None = None

    def root(self, model: PreTrainedModel) -> str:
        """The path of the list of blocks, from the model's root."""
        prefix = model.base_model_prefix
        return f"{prefix}.{self.blocks}" if hasattr(model, prefix) else self.blocks

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        layers = model.get_submodule(self.root(model))
        assert isinstance(layers, nn.ModuleList)
        return layers

    def sites(self, model: PreTrainedModel, part: str, block: int) -> list[Site]:
        """The matrices of one part ("attention" or "mlp") of one block; the last one is cut along its columns."""
        declared: Part = getattr(self, part)
        layers, prefix = self.layers(model), f"{self.root(model)}.{block}"
        heads = 1
        if part == "attention":
            heads = _linear(model, f"{prefix}.{declared.output}").in_features // self.head_width(model.config)
        names = {name for name, _ in layers[block].named_modules()} if declared.optional else set()
        inputs = (*declared.inputs, *(path for path in declared.optional if path in names))
        output = Site(f"{prefix}.{declared.output}", 1, 1, heads, block, len(layers))
        return [*(replace(output, path=f"{prefix}.{path}", axis=0, fused=declared.fused) for path in inputs), output]

    def head_width(self, config: PreTrainedConfig) -> int:
        """How many columns of the attention's output matrix belong to a head (to a kv group under GQA)."""
        head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_group: int = config.num_attention_heads // getattr(config, self.heads)
        return head_dim * per_group

    def whole_units(self, model: PreTrainedModel, rules: list[Rule]) -> list[Group]:  # type: ignore[override]
        groups = []
        for rule in rules:
            if rule.structure.couples:
                continue
            if rule.target not in TARGETS:
                raise InputError(
                    f"pruning.fill: target '{rule.target}' is a pattern, which may match half a head or neuron; "
                    "use attention, mlp or encoder, or remove the key"
                )
            for part in TARGETS[rule.target]:
                # The masks of the rule choose, so its criterion is asked nothing any more.
                groups += self._resolve(model, Rule(part, rule.sparsity, _WHOLE[part], Magnitude()))
        return groups

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:  # type: ignore[override]
        sites = [
            site
            for block in range(len(self.layers(model)))
            for part in TARGETS["encoder"]
            for site in self.sites(model, part, block)
        ]
        return {site.path: _linear(model, site.path) for site in sites}

    def keep_layers(self, model: PreTrainedModel, keep: list[int]) -> None:  # type: ignore[override]
        layers = self.layers(model)
        if self.shared:
            raise InputError(
                f"model.keep_layers: the blocks of {self.model_type} share one set of weights, so none can be dropped; "
                "leave the key out"
            )
        if not keep or sorted(set(keep)) != keep or keep[0] < 0 or keep[-1] >= len(layers):
            raise InputError(
                f"model.keep_layers: {keep} must name blocks of this model, ascending and without repeats: "
                f"0 to {len(layers) - 1}"
            )
        for new, old in enumerate(keep):
            if parameter_names(layers[new]) != parameter_names(layers[old]):
                raise InputError(
                    f"model.keep_layers: block {new} of this model is built unlike block {old}, which cannot take its "
                    f"place; keep block {new} too"
                )
        parent, _, name = self.root(model).rpartition(".")
        kept = nn.ModuleList(layers[i] for i in keep)
        setattr(model.get_submodule(parent), name, kept)
        setattr(model.config, self.depth, len(keep))
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[i] for i in keep]
        for index, layer in enumerate(kept):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index  # type: ignore[assignment]  # the place of its keys and values in a cache

    def idle(self, model: PreTrainedModel, block: int) -> bool:
        """Whether a block is an identity, and another one can take its place."""
        layers = self.layers(model)
        outputs = [_linear(model, self.sites(model, part, block)[-1].path) for part in TARGETS["encoder"]]
        return (
            self.pre_norm
            and parameter_names(layers[block]) == parameter_names(layers[-1])
            and not any(bool(parameter.any()) for output in outputs for parameter in output.parameters())
        )

    def depth_of(self, config: PreTrainedConfig) -> int:
        depth: int = getattr(config, self.depth)
        return depth

    def can_shrink(self, rule: Rule, ragged: bool = False) -> bool:
        return {
            "mlp": True,
            "attention": self.free_heads or ragged,
            "encoder": self.pre_norm and rule.target == "encoder",
        }.get(rule.structure.couples or "", False)

    def resize(self, config: PreTrainedConfig, part: str, units: int) -> int:
        """Give a config that many neurons ("mlp") or heads or kv groups ("attention"), or the next number that it can have.

        Returns:
            The number that it has now.
        """
        if part == "mlp":
            setattr(config, self.width, max(1, units))
            return max(1, units)
        groups: int = getattr(config, self.heads)
        per_group = config.num_attention_heads // groups
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for count in range(max(1, units), groups + 1):
            config.num_attention_heads = count * per_group
            setattr(config, self.heads, count)
            # Some configs ask that the number of heads divides the hidden width, though no weight depends on it.
            with contextlib.suppress(ValueError):
                config.validate_architecture()
                return count
        return groups

    def _resolve(self, model: PreTrainedModel, rule: Rule) -> list[Group]:  # type: ignore[override]
        couples, root = rule.structure.couples, self.root(model)
        self._refuse_unnamed(model)
        self._refuse_misfit(rule)
        if rule.target not in TARGETS:
            return self._by_pattern(model, rule, "use attention, mlp or encoder, or")
        groups, whole = [], []
        for block in range(len(self.layers(model))):
            for part in TARGETS[rule.target]:
                sites = self.sites(model, part, block)
                if couples is None:
                    groups += [Group(site.path, rule, _slots(model, site)) for site in sites]
                    continue
                slots = [
                    slot for site in sites for slot in _slots(model, site, biases=couples == "encoder" or not site.axis)
                ]
                if couples == part:
                    groups.append(Group(f"{root}.{block}.{part}", rule, slots))
                whole += slots
        if couples == "encoder":
            groups = [Group(root if rule.target == "encoder" else f"{root}.{rule.target}", rule, whole)]
        for group in groups:
            if group.mask.numel() < 2:
                raise InputError(
                    f"pruning.rules: {group.name} is a single unit of structure {structure_name(rule)}, and one always "
                    "stays; use another structure there"
                )
        return groups

    def _refuse_unnamed(self, model: PreTrainedModel) -> None:
        """A linear layer of the blocks that is not declared would stay dense, and be missing from every figure."""
        root, named = self.root(model), self.linears(model).keys()
        for path, module in self.layers(model).named_modules(prefix=root):
            if isinstance(module, nn.Linear) and path not in named:
                raise InputError(
                    f"model: {path} is a linear layer that the family {self.model_type} does not name, so it would never be "
                    "cut; use a model without it (an ALBERT with inner_group_num: 1), or name it in the family's file"
                )

    def _refuse_misfit(self, rule: Rule) -> None:
        couples = rule.structure.couples
        admitted = {None: [rule.target], "encoder": list(TARGETS)}.get(couples, [str(couples)])
        if rule.target not in admitted:
            raise InputError(
                f"pruning.rules: structure {structure_name(rule)} exists in target {', '.join(admitted)} only, not in "
                f"{rule.target}; set target: {admitted[0]}, or use unstructured, n:m or block"
            )
        if couples == "encoder" and self.shared:
            raise InputError(
                f"pruning.rules: the blocks of {self.model_type} share one set of weights, so structure layer cannot cut "
                "one of them; use neuron, head or unstructured"
            )


def find_family(model_type: str) -> Family:
    """The family of a ``config.model_type``; an unknown one is an error that names the file to write."""
    family = find_architecture(model_type)
    if not isinstance(family, Family):
        raise InputError(f"model: {missing(model_type)}")
    return family


def find_architecture(model_type: str) -> Architecture:
    """The family of a ``config.model_type``, or what any model admits where none is declared."""
    try:
        module = importlib.import_module(f"finllm_prune.families.{model_type.replace('-', '_')}")
    except ModuleNotFoundError:
        return Architecture()
    family: Architecture = getattr(module, "FAMILY", Architecture())
    return family


def parameter_names(block: nn.Module) -> set[str]:
    """What a block consists of."""
    return {name for name, _ in block.named_parameters()}


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    module: Any = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise InputError(f"model: {path} is a {type(module).__name__}, not a linear layer")
    return module


def _slots(model: PreTrainedModel, site: Site, biases: bool = False) -> list[Slot]:
    linear = _linear(model, site.path)
    slots = [as_slot(linear.weight, f"{site.path}.weight", site)]
    if biases and linear.bias is not None:
        slots.append(as_slot(linear.bias, f"{site.path}.bias", site))
    return slots
