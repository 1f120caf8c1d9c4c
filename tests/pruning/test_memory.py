"""What the Pruner holds beside plain AdamW, counted; that its steps wait for no number; moments in half the bytes."""

import copy
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import finllm_prune
from finllm_prune.errors import InputError
from finllm_prune.pruning import Cubic, Group, Movement, Pruner, Rule, Site, Slot, Unstructured
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


def one_layer(criterion: Movement) -> Pruner:
    weight = nn.Parameter(torch.ones(64, 64))
    rule = Rule("encoder", 0.5, Unstructured(), criterion)
    return Pruner(
        [Group("layer", rule, [Slot("layer.weight", weight, Site("layer"))])], Cubic(begin=0.9, end=1, freeze=1)
    )


def test_a_second_moment_in_bf16_is_that_of_fp32_in_the_mean() -> None:
    """It falls by 0.1 % a step where gradients get smaller; rounded to the nearest, it would stand still."""
    pruners = [one_layer(Movement(moments=kind)) for kind in ("float32", "bfloat16")]
    draw = torch.Generator().manual_seed(0)
    for step in range(800):
        gradient = torch.randn(64, 64, generator=draw) * (1.0 if step < 400 else 0.1)
        for pruner in pruners:
            pruner.groups[0].slots[0].parameter.grad = gradient.clone()
            pruner.before_step((step + 1) / 1600)
            pruner.after_step()
    exact, rounded = (pruner.state_dict()["layer/state/exp_avg_sq"].float() for pruner in pruners)
    assert float(rounded.mean() / exact.mean()) == pytest.approx(1, abs=0.01)
    assert float((rounded / exact).log2().abs().mean()) < 0.1
    assert float(exact.mean()) < 0.25 < 1 - 0.999**400


def test_moments_in_bf16_choose_nearly_the_same_masks_and_resume_exactly() -> None:
    def run(
        criterion: Movement, steps: range, start: tuple[nn.Module, Pruner] | None = None
    ) -> tuple[nn.Module, Pruner]:
        model = tiny_model(layers=1) if start is None else copy.deepcopy(start[0])
        pruner = make_pruner(model, Rule("encoder", 0.5, criterion=criterion))
        if start is not None:
            pruner.load_state_dict(start[1].state_dict())
        train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), batches, steps)
        return model, pruner

    batches, half = make_batches(12), Movement(moments="bfloat16")
    _, exact = run(Movement(), range(12))
    model, whole = run(half, range(12))
    again, resumed = run(half, range(6, 12), run(half, range(6)))
    same = sum(int((whole.masks()[name] == mask).sum()) for name, mask in exact.masks().items())
    assert same / sum(mask.numel() for mask in exact.masks().values()) > 0.98
    assert whole.mask_hash() != exact.mask_hash()
    assert resumed.mask_hash() == whole.mask_hash()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_other_moments_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="moments must be float32 or bfloat16, not float16"):
        Movement(moments="float16")  # type: ignore[arg-type]
