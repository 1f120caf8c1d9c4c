"""What the Pruner holds beside plain AdamW, counted; that its steps wait for no number; pruning that holds less."""

import copy
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import finllm_prune
from finllm_prune.errors import InputError
from finllm_prune.pruning import (
    Cubic,
    Movement,
    Neuron,
    Pruner,
    Rule,
    Sensitivity,
    SoftMovement,
    refuse_unfillable,
)
from tests.conftest import tiny_model
from tests.pruning.runs import make_batches, make_optimizer, make_pruner, make_rule, train

# Multiples of the targeted weights' bytes at a sparsity of 0.5: scores and two moments, parked values, masks of one byte.
MOST = {
    ("unstructured", "movement"): 3 + 1 + 0.25, ("unstructured", "magnitude"): 1 + 0.25, ("block", "movement"): 1,
    ("neuron", "movement"): 0.5, ("neuron", "platon"): 0.5, ("head", "taylor"): 0.5, ("layer", "taylor"): 0.5,
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The room of the benchmark that counts bytes."""
    monkeypatch.syspath_prepend(f"{finllm_prune.__path__[0]}/../scripts")
    yield importlib.import_module("scale.memory")
    for name in [name for name in sys.modules if name.split(".")[0] == "scale"]:
        del sys.modules[name]


@pytest.mark.parametrize(("structure", "criterion"), MOST)
def test_a_pruner_holds_what_its_units_need(memory: ModuleType, structure: str, criterion: str) -> None:
    model = tiny_model(hidden=64, intermediate_size=256)
    pruner, batches = make_pruner(model, make_rule(structure, criterion)), make_batches(10)
    train(model, pruner, make_optimizer(model), batches, range(8))
    assert pruner.sparsity() == 0.5
    weights = sum(slot.parameter.nbytes for group in pruner.groups for slot in group.slots)
    held = memory.held_bytes(pruner, model) / weights
    most = MOST[structure, criterion]
    assert most - 0.01 < held < most + 0.06, "group-sized state is small, even beside tiny matrices"
    train(model, pruner, make_optimizer(model), batches, range(8, 10))
    assert pruner.frozen
    assert memory.held_bytes(pruner, model) / weights < (0.26 if structure == "unstructured" else 0.03)


class Calls(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("criterion", ["movement", "platon"])
@pytest.mark.parametrize("structure", ["unstructured", "block", "neuron", "head"])
def test_a_step_that_chooses_no_mask_waits_for_no_number(structure: str, criterion: str) -> None:
    """On a GPU each of these calls would make the host wait for the device."""
    model, batches = tiny_model(layers=1), make_batches(20)
    pruner = make_pruner(model, make_rule(structure, criterion), schedule=Cubic(0.1, 0.7, 0.9, updates=4))
    optimizer = make_optimizer(model)
    waited = {True: 0, False: 0}
    for step, batch in enumerate(batches):
        model(**batch).loss.backward()
        with Calls() as calls:
            pruner.before_step((step + 1) / len(batches))
        optimizer.step()
        with calls:
            pruner.after_step()
        optimizer.zero_grad()
        waited[pruner.schedule.due(step / len(batches), (step + 1) / len(batches))] += not calls.names.isdisjoint(WAITS)
    assert waited == {True: 5, False: 0}, "four choices and that of the freeze"


LIGHT = Rule("encoder", 0.5, criterion=Movement(moments="factored"), regrow=False)


@pytest.mark.parametrize(
    ("rule", "most"),
    [(replace(LIGHT, regrow=True), 1 + 1 + 0.25), (LIGHT, 1 + 0.25), (Rule("mlp", 0.5, Neuron(), regrow=False), 0)],
)
def test_factored_moments_and_cuts_for_good_hold_less(memory: ModuleType, rule: Rule, most: float) -> None:
    model = tiny_model(hidden=64, intermediate_size=256)
    pruner = make_pruner(model, rule)
    train(model, pruner, make_optimizer(model), make_batches(10), range(8))
    assert pruner.sparsity() == pytest.approx(0.5, abs=0.001)
    weights = sum(slot.parameter.nbytes for group in pruner.groups for slot in group.slots)
    assert most <= memory.held_bytes(pruner, model) / weights < most + 0.06


def test_light_pruning_resumes_exactly_and_its_cuts_stay() -> None:
    def run(steps: range, start: tuple[nn.Module, Pruner] | None = None) -> tuple[nn.Module, Pruner]:
        model = tiny_model(layers=1) if start is None else copy.deepcopy(start[0])
        pruner = make_pruner(model, LIGHT)
        if start is not None:
            pruner.load_state_dict(start[1].state_dict())
        train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), batches, steps)
        return model, pruner

    batches = make_batches(12)
    model, whole = run(range(12))
    early = run(range(6))
    cut = {name: ~mask for name, mask in early[1].masks().items()}
    again, resumed = run(range(6, 12), early)
    assert resumed.mask_hash() == whole.mask_hash()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert sum(int(mask.sum()) for mask in cut.values()) > 0
    assert not any(bool((cut[name] & mask).any()) for name, mask in whole.masks().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": SoftMovement()}, "lets units go and come back"),
        ({"budget": Sensitivity()}, "without regrow the rule for encoder can only cut more and more"),
    ],
)
def test_what_needs_cut_units_again_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(LIGHT, **changes)


def test_filling_needs_what_waits_and_moments_have_two_names() -> None:
    with pytest.raises(InputError, match=r"pruning\.rules\.0\.regrow: pruning\.fill brings back"):
        refuse_unfillable([LIGHT])
    with pytest.raises(InputError, match="moments must be whole or factored, not bfloat16"):
        Movement(moments="bfloat16")  # type: ignore[arg-type]
