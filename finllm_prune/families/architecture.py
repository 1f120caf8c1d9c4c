"""What can be pruned in any model: its linear layers, by patterns of their module paths."""

import re
from typing import Any

from torch import Tensor, nn

from finllm_prune.errors import InputError
from finllm_prune.pruning import Group, Rule, Site, Slot


class Architecture:
    """A model of which nothing is declared; ``Family`` is one whose layer names are.

    Its linear layers take every structure that cuts each matrix alone. A rule's ``target`` is a regular expression for
    the end of a module path, from the start of one of its names: ``encoder.*.linear\\d`` matches
    ``model.encoder.layers.0.linear1``, and ``query|key`` each layer of these names. Any ``nn.Module`` will do.
    """

    def groups(self, model: nn.Module, rules: list[Rule]) -> list[Group]:
        """The rules, resolved on a model.

        Raises:
            InputError: a rule that the model cannot take.
        """
        return [group for rule in rules for group in self._resolve(model, rule)]

    def whole_units(self, model: nn.Module, rules: list[Rule]) -> list[Group]:
        """The heads and neurons of what the rules cut matrix by matrix: what ``pruning.fill`` makes dense or takes out.

        Raises:
            InputError: they are not known.
        """
        raise InputError(f"pruning.fill: {undeclared(model)}, so its heads and neurons are not known; remove the key")

    def linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Path -> every prunable linear layer: the denominator "encoder". A weight that layers share is there once."""
        return _base_linears(model)

    def keep_layers(self, model: nn.Module, keep: list[int]) -> None:
        """Drop whole blocks, so that a plain smaller model of the same class is left."""
        raise InputError(f"model.keep_layers: {undeclared(model)}; leave the key out")

    def depth_of(self, config: Any) -> int:
        """How many blocks, and hidden states behind the embeddings, a model of this config has; 0 if that is unknown."""
        depth: int = 0 if getattr(config, "is_encoder_decoder", False) else getattr(config, "num_hidden_layers", 0)
        return depth

    def can_shrink(self, rule: Rule, ragged: bool = False) -> bool:
        """Whether ``compact``, or ``ragged``, can leave out what the rule cuts."""
        return False

    def _resolve(self, model: nn.Module, rule: Rule) -> list[Group]:
        if rule.structure.couples:
            raise InputError(
                f"pruning.rules: structure {structure_name(rule)} cuts several matrices together, and {undeclared(model)}; "
                "use unstructured, n:m or block"
            )
        return self._by_pattern(model, rule, f"{undeclared(model)}, so use")

    def _by_pattern(self, model: nn.Module, rule: Rule, otherwise: str) -> list[Group]:
        try:
            pattern = re.compile(rf"(?:^|\.)(?:{rule.target})$")
        except re.error as error:
            raise InputError(f"pruning.rules: target '{rule.target}' is no regular expression: {error}") from None
        linears = _base_linears(model)
        groups = [
            Group(path, rule, [as_slot(linear.weight, f"{path}.weight", Site(path))])
            for path, linear in linears.items()
            if pattern.search(path)
        ]
        if not groups:
            heads = [path for path, linear in _linears(model) if path not in linears and pattern.search(path)]
            found = f"is {heads[0]}, an output layer, which is never cut" if heads else "matches no linear layer"
            raise InputError(
                f"pruning.rules: target '{rule.target}' {found}; {otherwise} a pattern of module paths, which here are as "
                f"{', '.join(list(linears)[:: max(1, len(linears) // 3)][:3]) or '(there is no nn.Linear)'}"
            )
        return groups


def as_slot(parameter: Tensor, name: str, site: Site) -> Slot:
    """A parameter at its site; torch's types call it a tensor."""
    assert isinstance(parameter, nn.Parameter)
    return Slot(name, parameter, site)


def structure_name(rule: Rule) -> str:
    """The name of a rule's structure, as a recipe writes it."""
    return type(rule.structure).__name__.lower()


def undeclared(model: nn.Module) -> str:
    """Half a sentence that says which file is missing."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__.lower())
    return missing(model_type)


def missing(model_type: str) -> str:
    """The same, for a ``config.model_type``."""
    return (
        f"no family is known for model_type '{model_type}' (declare its layer names in "
        f"finllm_prune/families/{model_type.replace('-', '_')}.py; bert.py there is a model to follow)"
    )


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def _base_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Without heads, which lie outside the base model, and without output layers that are tied to an embedding."""
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    seen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = {}
    for path, linear in _linears(model):
        if id(linear) in inside and id(linear.weight) not in seen:
            seen.add(id(linear.weight))
            found[path] = linear
    return found
