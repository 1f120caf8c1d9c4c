"""Other projects' pruning inside the same training: callbacks that cut on our schedule, with their own package's calls."""

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.families import find_family
from finllm_prune.pruning import Cubic, Schedule


@dataclass(eq=False)
class Peer(TrainerCallback):
    """A pruner that is told how much of the encoder has to be gone, whenever our schedule says that it is time."""

    sparsity: float
    schedule: Schedule = field(default_factory=Cubic)

    def cut(self, model: PreTrainedModel, optimizer: Optimizer, sparsity: float) -> None:
        """Bring the encoder's linear layers to this sparsity. The gradients of the step are still there."""
        raise NotImplementedError

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before, now = state.global_step / state.max_steps, (state.global_step + 1) / state.max_steps
        if self.schedule.due(before, now):
            self.cut(kwargs["model"], kwargs["optimizer"], self.sparsity * self.schedule.fraction(now))


class TorchGradual(Peer):
    """`torch.nn.utils.prune`: the lowest magnitudes of all layers together, as often as we do."""

    def cut(self, model: PreTrainedModel, optimizer: Optimizer, sparsity: float) -> None:
        linears = _linears(model)
        cut = sum(int((linear.weight == 0).sum()) for linear in linears)
        wanted = round(sparsity * sum(linear.weight.numel() for linear in linears))
        if wanted > cut:
            parameters = [(linear, "weight") for linear in linears]
            prune.global_unstructured(parameters, prune.L1Unstructured, amount=wanted - cut)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for linear in _linears(kwargs["model"]):
            if prune.is_pruned(linear):
                prune.remove(linear, "weight")


@dataclass(eq=False)
class TorchPruning(Peer):
    """Torch-Pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900): heads and neurons go, the same number per layer.

    In rounds over our schedule. The package replaces the parameters, so the optimizer's moments are cut along with them
    here: a round costs the peer nothing but its weights.

    Args:
        importance: "taylor", from the gradients summed since the last round, or "magnitude".
    """

    schedule: Schedule = field(default_factory=lambda: Cubic(updates=16))
    importance: str = "taylor"

    def __post_init__(self) -> None:
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.importance == "taylor":
            for parameter in kwargs["model"].parameters():
                if parameter.grad is not None:
                    self.gradients[parameter] = self.gradients.get(parameter, 0) + parameter.grad

    def cut(self, model: PreTrainedModel, optimizer: Optimizer, sparsity: float) -> None:
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        self.gradients = {}
        groups = list(self._pruner(model, sparsity).step(interactive=True))
        old = _parameters(model)
        for parameter in old.values():
            # The package cuts a gradient as it cuts its parameter: entries that count tell which ones were kept.
            parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter).to(parameter)
        for group in groups:
            group.prune()
        _follow(optimizer, old, _parameters(model))
        _count_heads(model)

    def _pruner(self, model: PreTrainedModel, sparsity: float) -> Any:
        """The package's pruner for one round; half a unit is added where it rounds, so that no fraction tips it over."""
        package = torch_pruning()
        family, config = find_family(model.config.model_type), model.config
        heads, width = getattr(config, family.heads), getattr(config, family.width)
        ratios: dict[nn.Module, float] = {}
        attention: dict[nn.Module, int] = {}
        head_ratio = 0.0
        for block in range(len(family.layers(model))):
            *inputs, _ = (_linear(model, site.path) for site in family.sites(model, "attention", block))
            *up, _ = (_linear(model, site.path) for site in family.sites(model, "mlp", block))
            here = inputs[0].out_features // (config.hidden_size // heads)
            head_ratio = max(0.0, 1.0 - (_kept(heads, sparsity) + 0.5) / here)
            attention |= dict.fromkeys(inputs, here)
            ratios |= dict.fromkeys(inputs, head_ratio)
            ratios |= {layer: max(0.0, 1.0 - (_kept(width, sparsity) + 0.5) / layer.out_features) for layer in up}
        importances = {"taylor": "GroupTaylorImportance", "magnitude": "GroupMagnitudeImportance"}
        ids = torch.full((1, 8), 5, device=model.device)
        was_training = model.training
        model.eval()
        pruner = package.pruner.BasePruner(
            model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            getattr(package.importance, importances[self.importance])(), pruning_ratio=0.0, pruning_ratio_dict=ratios,
            num_heads=attention, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=head_ratio,
        )  # fmt: skip
        model.train(was_training)
        return pruner


def torch_pruning() -> ModuleType:
    """The package, which only its own methods need."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        raise InputError(
            "--methods: the torch_pruning methods need the package torch-pruning: pip install 'finllm-prune[bench]'"
        ) from None


def _kept(units: int, sparsity: float) -> int:
    return max(1, round(units * (1.0 - sparsity)))


def _follow(optimizer: Optimizer, old: dict[str, nn.Parameter], new: dict[str, nn.Parameter]) -> None:
    """The optimizer goes on with the parameters that took the place of others, and with what is left of their moments."""
    taken = {old[name]: new[name] for name in old if old[name] is not new[name]}
    for group in optimizer.param_groups:
        group["params"] = [taken.get(parameter, parameter) for parameter in group["params"]]
    for before, after in taken.items():
        assert after.grad is not None
        kept = after.grad.long()
        optimizer.state[after] = {
            key: value.view(-1)[kept].clone() if value.shape == before.shape else value
            for key, value in optimizer.state.pop(before).items()
        }


def _count_heads(model: PreTrainedModel) -> None:
    """transformers 5 has no `prune_heads` any more: its attention modules are told by hand."""
    family, config = find_family(model.config.model_type), model.config
    size = config.hidden_size // getattr(config, family.heads)
    for block in range(len(family.layers(model))):
        path = family.sites(model, "attention", block)[0].path
        width = _linear(model, path).out_features
        attention: Any = model.get_submodule(path.rpartition(".")[0])
        attention.num_attention_heads, attention.all_head_size = width // size, width


def _linears(model: PreTrainedModel) -> list[nn.Linear]:
    return list(find_family(model.config.model_type).linears(model).values())


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    linears = find_family(model.config.model_type).linears(model)
    return {f"{path}.{name}": p for path, linear in linears.items() for name, p in linear.named_parameters()}
