"""The Pruner on a plain model against the textbook: a straight-through mask inside the forward, and autograd.

The reference shares only the schedule with the library. Its groups, the spread of a unit over its weights, the first
scores, the optimizer of the scores, the penalty's gradient, and the choice of the masks are written down here anew.
"""

from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finllm_prune.families import find_family
from finllm_prune.pruning import (
    BUDGETS,
    Block,
    Cubic,
    Head,
    Layer,
    Movement,
    Neuron,
    Pruner,
    Rule,
    ScoreMovement,
    SoftMovement,
    Structure,
    Unstructured,
)
from finllm_prune.pruning.criteria.movement import LearnedScores
from tests.conftest import tiny_model

STEPS, ACCUMULATE, CLIP, DECAY, LR = 30, 2, 0.5, 0.1, 1e-2
HIDDEN, NEURONS, HEADS, LAYERS, BLOCK = 32, 64, 4, 2, 8
SCHEDULE = Cubic(begin=0.1, end=0.7, freeze=0.9, updates=12)
SPARSITY = {"unstructured": 0.7, "block": 0.7, "neuron": 0.7, "head": 0.5, "layer": 0.5}
MATRICES = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (NEURONS, HIDDEN),
    "output.dense": (HIDDEN, NEURONS),
}

STRUCTURES: dict[str, tuple[str, Structure]] = {
    "unstructured": ("encoder", Unstructured()),
    "block": ("encoder", Block(BLOCK, BLOCK)),
    "neuron": ("mlp", Neuron()),
    "head": ("attention", Head()),
    "layer": ("mlp", Layer()),
}
CRITERIA: dict[str, LearnedScores] = {
    "movement": Movement(travel=1.0, initial=0.2),
    "movement as in the paper": Movement(travel=1.0, initial=0.2, sensitivity=0.0),
    "score_movement": ScoreMovement(travel=1.0, initial=0.2),
    "soft_movement": SoftMovement(travel=6.0, initial=0.2, threshold=0.3, penalty=0.004, gain=0.0),
}


class Gate(torch.autograd.Function):
    """Forward: the mask over units, as floats. Backward: straight through to the scores."""

    @staticmethod
    def forward(ctx, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.float()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass
class Unit:
    """One unit grid of the reference: for each parameter that it cuts, the number of the unit of every weight."""

    members: dict[str, Tensor]
    shape: tuple[int, ...]
    scores: nn.Parameter = field(init=False)
    mask: Tensor = field(init=False)

    def rank(self, latent: dict[str, nn.Parameter]) -> Tensor:
        """0 for the unit of the smallest norm, 1 for the next, ..."""
        squares = torch.zeros(self.shape).flatten()
        for name, index in self.members.items():
            squares.index_add_(0, index.flatten(), latent[name].detach().square().flatten())
        rank = torch.empty(squares.numel())
        rank[squares.argsort()] = torch.arange(squares.numel(), dtype=torch.float32)
        return rank.view(self.shape)


def reference_units(structure: str) -> dict[str, Unit]:
    units = {}
    for layer in range(LAYERS):
        prefix = f"bert.encoder.layer.{layer}"
        for path, (rows, columns) in MATRICES.items():
            every = torch.arange(rows * columns).view(rows, columns)
            row, column = every // columns, every % columns
            if structure == "unstructured":
                units[f"{prefix}.{path}"] = Unit({f"{prefix}.{path}.weight": every}, (rows, columns))
            if structure == "block":
                grid = (rows // BLOCK, columns // BLOCK)
                index = row // BLOCK * grid[1] + column // BLOCK
                units[f"{prefix}.{path}"] = Unit({f"{prefix}.{path}.weight": index}, grid)
        if structure == "neuron":
            up, down = f"{prefix}.intermediate.dense", f"{prefix}.output.dense"
            number = torch.arange(NEURONS)
            members = {
                f"{up}.weight": number[:, None].expand(NEURONS, HIDDEN),
                f"{up}.bias": number,
                f"{down}.weight": number[None, :].expand(HIDDEN, NEURONS),
            }
            units[f"{prefix}.mlp"] = Unit(members, (NEURONS,))
        if structure == "head":
            number = torch.arange(HIDDEN) // (HIDDEN // HEADS)
            members = {f"{prefix}.attention.output.dense.weight": number[None, :].expand(HIDDEN, HIDDEN)}
            for path in ("query", "key", "value"):
                members[f"{prefix}.attention.self.{path}.weight"] = number[:, None].expand(HIDDEN, HIDDEN)
                members[f"{prefix}.attention.self.{path}.bias"] = number
            units[f"{prefix}.attention"] = Unit(members, (HEADS,))
    if structure == "layer":
        members = {}
        for layer in range(LAYERS):
            for path in ("intermediate.dense", "output.dense"):
                prefix = f"bert.encoder.layer.{layer}.{path}"
                members[f"{prefix}.weight"] = torch.full(MATRICES[path], layer)
                members[f"{prefix}.bias"] = torch.full(MATRICES[path][:1], layer)
        units["bert.encoder.layer.mlp"] = Unit(members, (LAYERS,))
    return units


class Reference:
    """Movement pruning as the papers write it: latent weights, a mask in the forward, autograd for all gradients."""

    def __init__(
        self, model: PreTrainedModel, structure: str, criterion: LearnedScores, budget: str, sparsity: float, regrow: bool
    ):  # fmt: skip
        self.model, self.criterion, self.budget, self.sparsity = model, criterion, budget, sparsity
        self.regrow = regrow
        self.latent = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
        self.units = reference_units(structure)
        for unit in self.units.values():
            rank = unit.rank(self.latent)
            unit.scores = nn.Parameter(criterion.initial * criterion.travel * rank / rank.numel())
            unit.mask = torch.ones(unit.shape, dtype=torch.bool)
        targets = {name for unit in self.units.values() for name in unit.members}
        trained = [p for name, p in self.latent.items() if criterion.trains_weights or name not in targets]
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
        self.score_optimizer = torch.optim.Adam([u.scores for u in self.units.values()], betas=(0.9, 0.999), eps=1e-8)
        self.frozen = False

    def effective(self) -> dict[str, Tensor]:
        weights = dict(self.latent)
        for unit in self.units.values():
            gate = Gate.apply(unit.scores, unit.mask).flatten()
            for name, index in unit.members.items():
                weights[name] = gate[index] * self.latent[name]
        return weights

    def step(self, batches: list[dict[str, Tensor]], before: float, now: float) -> float:
        """One optimizer step; returns the factor by which the gradients were clipped."""
        weights = self.effective()
        for weight in weights.values():
            weight.retain_grad()
        losses = [torch.func.functional_call(self.model, weights, kwargs=batch).loss for batch in batches]
        (sum(losses) / len(losses)).backward()
        norm = torch.stack([weight.grad.norm() for weight in weights.values()]).norm()
        factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        scores = [unit.scores for unit in self.units.values()]
        for parameter in [*self.latent.values(), *scores]:
            parameter.grad.mul_(factor)
        if isinstance(self.criterion, SoftMovement):
            sum(self.criterion.penalty * torch.sigmoid(s).mean() for s in scores).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter in self.latent.values():
            parameter.grad = None
        if not self.frozen:
            self.score_optimizer.param_groups[0]["lr"] = self.criterion.travel * (now - before) * (1.0 - before)
            self.score_optimizer.step()
            if SCHEDULE.due(before, now):
                self.choose(now)
        self.score_optimizer.zero_grad()
        if not self.regrow:
            for unit in self.units.values():
                for name, index in unit.members.items():
                    self.latent[name].data *= unit.mask.flatten()[index]
        return float(factor)

    def ranked(self, unit: Unit) -> Tensor:
        """The scores, and for hard movement the logarithm of the rms of their gradient."""
        if not isinstance(self.criterion, Movement):
            return unit.scores
        return (
            unit.scores
            + self.criterion.sensitivity * (self.score_optimizer.state[unit.scores]["exp_avg_sq"] + 1e-30).sqrt().log()
        )

    @torch.no_grad()
    def choose(self, now: float) -> None:
        fraction, self.frozen = SCHEDULE.fraction(now), now >= SCHEDULE.freeze
        grids = [self.ranked(unit).flatten() for unit in self.units.values()]
        if not self.regrow:
            grids = [
                grid.masked_fill(~unit.mask.flatten(), -1e9)
                for grid, unit in zip(grids, self.units.values(), strict=True)
            ]
        if isinstance(self.criterion, SoftMovement) and not self.frozen:
            masks = [torch.sigmoid(grid) > self.criterion.threshold * fraction for grid in grids]
        elif self.budget == "uniform":
            masks = [top(grid, 1.0 - fraction * self.sparsity) for grid in grids]
        else:
            contest = torch.cat([grid.index_fill(0, grid.argmax(), torch.inf) for grid in grids])
            masks = top(contest, 1.0 - fraction * self.sparsity).split([grid.numel() for grid in grids])
        for unit, grid, mask in zip(self.units.values(), grids, masks, strict=True):
            mask[grid.argmax()] = True  # no grid is emptied
            unit.mask = mask.view(unit.shape)


def top(scores: Tensor, density: float) -> Tensor:
    order = scores.argsort(descending=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: round(density * scores.numel())]] = True
    return mask


def batches(seed: int = 6) -> list[list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            {
                "input_ids": torch.randint(4, 300, (4, 6), generator=generator),
                "labels": torch.randint(0, 3, (4,), generator=generator),
            }
            for _ in range(ACCUMULATE)
        ]
        for _ in range(STEPS)
    ]


# An Adam step is lr * g / (|g| + eps), so the last bit of a small g shows in the scores in proportion to their learning
# rate, which is travel / steps: their tolerance is given in units of travel. Weights get the tolerance itself.
def close(actual: Tensor, expected: Tensor, what: str, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


CASES = [(*case, True) for case in product(CRITERIA, STRUCTURES, ("uniform", "global"))]
CASES += [("movement", "unstructured", "global", False), ("movement", "neuron", "uniform", False)]


@pytest.mark.parametrize(("criterion", "structure", "budget", "regrow"), CASES)
def test_thirty_steps_equal_autograd_through_a_straight_through_mask(
    criterion: str, structure: str, budget: str, regrow: bool
):
    model = tiny_model("bert", layers=LAYERS, hidden=HIDDEN)
    reference = Reference(
        tiny_model("bert", layers=LAYERS, hidden=HIDDEN),
        structure,
        CRITERIA[criterion],
        budget,
        SPARSITY[structure],
        regrow,
    )
    target, cut = STRUCTURES[structure]
    rule = Rule(target, SPARSITY[structure], cut, CRITERIA[criterion], BUDGETS[budget](), regrow=regrow)
    pruner = Pruner(find_family("bert").groups(model, [rule]), SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    assert {group.name for group in pruner.groups} == set(reference.units)
    travel = CRITERIA[criterion].travel
    parameters = dict(model.named_parameters())
    sparsities, returned, factors = [], 0, []
    for step, batch in enumerate(batches()):
        for part in batch:
            (model(**part).loss / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        pruner.before_step((step + 1) / STEPS)
        optimizer.step()
        pruner.after_step()
        optimizer.zero_grad()

        old_masks = [unit.mask for unit in reference.units.values()]
        factors.append(reference.step(batch, step / STEPS, (step + 1) / STEPS))

        state = pruner.state_dict()
        for name, unit in reference.units.items():
            where = f"step {step + 1}, {name}"
            assert torch.equal(pruner.masks()[name], unit.mask), f"masks differ: {where}"
            if not pruner.frozen:
                close(state[f"{name}/state/scores"], unit.scores.detach(), f"scores, {where}", 1e-6 * travel)
        for name, weight in reference.effective().items():
            close(parameters[name].detach(), weight.detach(), f"weights, step {step + 1}, {name}")
        if not pruner.frozen:
            for group in pruner.groups:
                for slot in group.slots:
                    whole = slot.parameter.detach().clone()
                    if "parked" in (beside := slot.beside()):
                        whole += beside["parked"].view_as(whole)
                    close(whole, reference.latent[slot.name].detach(), f"latent weights, step {step + 1}, {slot.name}")
        assert pruner.frozen == reference.frozen
        returned += sum(
            int((unit.mask & ~old).sum()) for unit, old in zip(reference.units.values(), old_masks, strict=True)
        )
        sparsities.append(pruner.sparsity())
    # The run was one that could have shown a difference: it clipped, it cut long before the end, and units came back.
    assert min(factors) < 1.0
    assert 0.2 < sparsities[20] < 1.0
    assert sparsities[-1] == pytest.approx(SPARSITY[structure], abs=0.02)
    assert (returned > 0) == regrow or structure != "unstructured"
