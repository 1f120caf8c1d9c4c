"""Hard-concrete gates: their gradient is autograd's, whole weights come back to the bit, and the sparsity is reached."""

import math
import zlib
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from finllm_prune.pruning import L0, Cubic, Group, Neuron, Pruner, Rule, Site, Slot, Unstructured
from finllm_prune.pruning.criteria.criterion import State, Step
from tests.conftest import tiny_model
from tests.pruning.runs import make_batches, make_pruner, make_rule, train

SCHEDULE = Cubic(begin=0.1, end=0.6, freeze=0.8)


class Watched(L0):
    """Remembers what the scores are told."""

    told: ClassVar[dict[float, Tensor]] = {}

    def _descend(self, state: State, gradient: Tensor, step: Step) -> None:
        self.told[step.now] = gradient.clone()
        super()._descend(state, gradient, step)


@pytest.mark.parametrize("structure", ["neuron", "unstructured"])
def test_scores_and_weights_get_the_gradients_that_autograd_sends_through_a_gate(structure: str) -> None:
    model, batches = tiny_model(layers=1), make_batches(20)
    rule = make_rule(structure)
    group = make_pruner(model, rule).groups[-1]
    watched = Rule("mlp", 0.5, rule.structure, Watched(travel=1.0, open=0.0))
    pruner = Pruner([Group(group.name, watched, group.slots)], SCHEDULE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, pruner, optimizer, batches, range(8))

    group, state = pruner.groups[0], pruner.state_dict()
    scores = state[f"{group.name}/state/scores"].requires_grad_()
    generator = torch.Generator().manual_seed(zlib.crc32(f"{group.name} {8 / 20}".encode()))
    noise = torch.rand(scores.shape, generator=generator)
    log_alpha = scores + 2 / 3 * math.log(0.1 / 1.1)
    soft = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / (2 / 3))
    gates = (1.2 * soft - 0.1).clamp(0, 1)
    assert {float(gates.detach().min()), float(gates.detach().max())} == {0.0, 1.0}
    assert ((gates > 0) & (gates < 1)).any()

    whole = {
        slot.name: (slot.parameter.detach() + state[f"{slot.name}/parked"].view_as(slot.parameter)).requires_grad_()
        for slot in group.slots
    }
    gated = {
        slot.name: whole[slot.name] * group.rule.structure.expand(gates, slot.weight, slot.site).view_as(slot.parameter)
        for slot in group.slots
    }
    loss = functional_call(model, gated, kwargs=batches[8]).loss
    loss.backward()

    own = model(**batches[8]).loss
    torch.testing.assert_close(own, loss)
    own.backward()
    pruner.before_step(9 / 20)
    assert scores.grad is not None
    assert scores.grad.any()
    torch.testing.assert_close(Watched.told[9 / 20], scores.grad, rtol=1e-4, atol=1e-8)
    for slot in group.slots:
        assert torch.equal(slot.parameter, whole[slot.name]), "the optimizer moves whole weights"
        torch.testing.assert_close(slot.parameter.grad, whole[slot.name].grad, rtol=1e-4, atol=1e-8)


@given(
    st.lists(
        st.tuples(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), st.floats(0, 1, width=32)),
        min_size=1, max_size=20,
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_whole_weights_come_back_to_the_bit_whatever_the_gate(
    pairs: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    weight, gate = (torch.tensor([column]) for column in zip(*pairs, strict=True))
    parameter = nn.Parameter(weight.to(dtype))
    whole = parameter.detach().clone()
    group = Group("layer", Rule("mlp", 0.5, Unstructured()), [Slot("layer.weight", parameter, Site("layer"))])
    with torch.no_grad():
        for _ in range(2):
            group.set_mask(gate > 0, gate)
            group.park()
            held = whole * gate.to(dtype)
            rounding = torch.finfo(dtype).eps * whole.abs() + torch.finfo(dtype).tiny
            assert ((parameter - held).abs() <= rounding).all()
            assert not parameter[gate == 0].any()
            group.unpark()
            assert torch.equal(parameter, whole)


def expected(pruner: Pruner) -> float:
    scores: list[Any] = [tensor for key, tensor in pruner.state_dict().items() if key.endswith("/state/scores")]
    return 1.0 - float(torch.sigmoid(torch.cat(scores)).mean())


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_the_expected_sparsity_follows_the_schedule_and_the_budget_settles_the_rest(sparsity: float) -> None:
    model, batches = tiny_model(layers=1), make_batches(60)
    pruner = make_pruner(model, Rule("mlp", sparsity, Neuron(), L0()), schedule=SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, pruner, optimizer, batches, range(5))
    assert pruner.sparsity() == 0.0
    assert all(slot.parked is None for group in pruner.groups for slot in group.slots)
    train(model, pruner, optimizer, batches, range(5, 47))
    assert expected(pruner) == pytest.approx(sparsity, abs=0.06)
    assert not pruner.frozen
    assert pruner.holds()
    train(model, pruner, optimizer, batches, range(47, 60))
    assert pruner.sparsity() == sparsity
    assert all(group.gate is None and slot.parked is None for group in pruner.groups for slot in group.slots)
