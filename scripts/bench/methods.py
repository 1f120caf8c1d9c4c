"""What is compared: our methods as fragments of a recipe, the peers, and dense fine-tuning as the ceiling."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from bench.peers import Peer, TorchGradual, TorchPruning
from finllm_prune.pruning import CRITERIA

_QUIET = {"save_strategy": "no", "disable_tqdm": True, "report_to": "none"}


@dataclass(frozen=True)
class Method:
    """What is done to a model while it is trained; without rules and without a peer it stays dense.

    Args:
        recipe: what differs from the protocol's recipe; the rules in it get their sparsity from the command line.
        peer: makes the callback of another pruner for a sparsity.
        unlabelled: the other training rows are learned from too, without their labels; as many steps.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    peer: Callable[[float], Peer] | None = None
    unlabelled: bool = False

    @property
    def dense(self) -> bool:
        return self.peer is None and "pruning" not in self.recipe


def rules(*given: dict[str, Any]) -> Method:
    """Ours: a recipe with these rules."""
    return Method({"pruning": {"rules": list(given)}})


def unstructured(criterion: str | dict[str, str]) -> Method:
    """Single weights, one threshold over the encoder."""
    return rules({"target": "encoder", "structure": "unstructured", "criterion": criterion, "budget": "global"})


def structured(criterion: str) -> Method:
    """Neurons and heads, the same part of each layer, so that the model gets smaller and faster."""
    return rules(
        {"target": "mlp", "structure": "neuron", "criterion": criterion, "budget": "uniform"},
        {"target": "attention", "structure": "head", "criterion": criterion, "budget": "uniform"},
    )


def for_good(method: Method) -> Method:
    """The same, but no weight comes back: nothing waits beside the model."""
    return rules(*({**rule, "regrow": False} for rule in method.recipe["pruning"]["rules"]))


def uneven(method: Method) -> Method:
    """As many FLOPs as the same part of each layer would leave, but heads and neurons go wherever they are worth least."""
    rules = [
        {key: value for key, value in rule.items() if key != "budget"} for rule in method.recipe["pruning"]["rules"]
    ]
    return Method({"pruning": {"rules": rules, "target": {"tokens": 64}}})


def on_labels(method: Method) -> Method:
    """The same without a teacher: as most users would run it."""
    return replace(method, recipe=method.recipe | {"distillation": None})


def without_dropout(method: Method) -> Method:
    """The same with a student that hears its teacher without noise."""
    return replace(method, recipe=method.recipe | {"distillation": {"dropout": 0.0}})


def recovered(method: Method) -> Method:
    """The same with the training after the freeze, which comes at half of the run, on the small model."""
    pruning = method.recipe["pruning"] | {"schedule": {"name": "cubic", "end": 0.4, "freeze": 0.5}}
    return replace(method, recipe=method.recipe | {"pruning": pruning, "recovery": {}, "training": _QUIET})


def recovered_apart(method: Method, epochs: int = 4, keep_moments: bool = True) -> Method:
    """The same with half of the run as a training of its own on the small model, whose learning rate rises and falls again."""
    pruning = method.recipe["pruning"] | {"schedule": {"name": "cubic", "end": 0.8, "freeze": 0.9}}
    recovery = {"num_train_epochs": epochs, "keep_moments": keep_moments}
    training = _QUIET | {"num_train_epochs": epochs}
    return replace(method, recipe=method.recipe | {"pruning": pruning, "recovery": recovery, "training": training})


def at_full_size(method: Method) -> Method:
    """What recovery is compared with: the same schedule on the masked model to the end."""
    return replace(method, recipe={key: value for key, value in method.recipe.items() if key != "recovery"})


OTHERS = {
    "dense": Method(),
    "torch_gradual": Method(peer=TorchGradual),
    "torch_pruning_taylor": Method(peer=partial(TorchPruning, importance="taylor")),
    "torch_pruning_magnitude": Method(peer=partial(TorchPruning, importance="magnitude")),
}

METHODS = {
    **OTHERS,
    **{f"{name}_labels": on_labels(method) for name, method in OTHERS.items()},
    **{name: unstructured(name) for name in CRITERIA},
    **{f"structured_{name}": structured(name) for name in CRITERIA},
    "structured_taylor_uneven": uneven(structured("taylor")),
    "structured_taylor_no_dropout": without_dropout(structured("taylor")),
    "structured_taylor_recovery": recovered(structured("taylor")),
    "structured_taylor_recovery_apart": recovered_apart(structured("taylor")),
    "structured_taylor_recovery_no_moments": recovered_apart(structured("taylor"), keep_moments=False),
    "structured_taylor_early": at_full_size(recovered(structured("taylor"))),
    "dense_unlabelled": Method(unlabelled=True),
    "movement_unlabelled": replace(unstructured("movement"), unlabelled=True),
    "structured_taylor_unlabelled": replace(structured("taylor"), unlabelled=True),
    "structured_taylor_recovery_apart_unlabelled": replace(recovered_apart(structured("taylor")), unlabelled=True),
    "torch_pruning_taylor_unlabelled": replace(OTHERS["torch_pruning_taylor"], unlabelled=True),
    "movement_factored": unstructured({"name": "movement", "moments": "factored"}),
    "movement_for_good": for_good(unstructured({"name": "movement", "moments": "factored"})),
    "neurons": rules({"target": "mlp", "structure": "neuron", "criterion": "movement", "budget": "uniform"}),
}

DEFAULT = [
    "dense", "movement", "soft_movement", "magnitude", "taylor", "platon", "torch_gradual", "torch_gradual_labels",
    "structured_movement", "structured_taylor", "structured_magnitude", "torch_pruning_taylor", "torch_pruning_magnitude",
]  # fmt: skip
