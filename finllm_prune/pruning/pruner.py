"""The two steps of pruning, between a plain model's gradient and its weight; usable with any training loop.

::

    pruner = Pruner(groups, Cubic())
    for step, batch in enumerate(batches):
        loss(model, batch).backward()
        pruner.before_step((step + 1) / steps)
        optimizer.step()
        pruner.after_step()
        optimizer.zero_grad()
    pruner.finish()

Under DDP the gradients are equal on all ranks when ``before_step`` runs, and so are the masks. Under FSDP2 the groups are
resolved on the model that ``fully_shard`` has split, or follow it there (``Pruner.follow``); then all ranks make each call
together. Not covered: DeepSpeed ZeRO, FSDP1, tensor parallelism and replicas in threads (DataParallel).
"""

import hashlib
import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finllm_prune.errors import InputError
from finllm_prune.pruning.budgets import Sensitivity
from finllm_prune.pruning.choosing import cut, ordered, worth
from finllm_prune.pruning.criteria import State, Step
from finllm_prune.pruning.filling import survivors
from finllm_prune.pruning.groups import Group, Rule, give_densities
from finllm_prune.pruning.refusals import refuse_overlap
from finllm_prune.pruning.schedules import Schedule
from finllm_prune.pruning.sharding import Split, here, mesh_of, total
from finllm_prune.pruning.targets import Costs

logger = logging.getLogger(__name__)


class Pruner:
    """Carries rules out on a plain model.

    Args:
        groups: what is cut, resolved on the model that is trained (``Family.groups``).
        schedule: how fast.
        fill: the heads and neurons that are made dense or taken out when the masks freeze (``Family.whole_units``); they
            take the place of the groups that cut the same matrices.
        costs: of the groups whose rules have no sparsity of their own, which share its limit.

    Attributes:
        stages: the groups until the masks freeze, and those from then on; without ``fill`` the same list.
    """

    def __init__(self, groups: list[Group], schedule: Schedule, fill: Sequence[Group] = (), costs: Costs | None = None):
        refuse_overlap(groups)
        if {group.name for group in groups if group.rule.sparsity is None} != (set(costs.tables) if costs else set()):
            raise InputError("pruning.rules: give each rule a sparsity, or the Pruner the costs of its groups")
        filled = {slot.name for group in fill for slot in group.slots}
        rest = [group for group in groups if not any(slot.name in filled for slot in group.slots)]
        self.stages = (groups, [*rest, *fill] if fill else groups)
        self.schedule = schedule
        self.costs = costs
        self.progress = 0.0
        self.frozen = False
        self.skipped = torch.zeros((), device=groups[0].mask.device)
        self._states: dict[str, State] = {}
        self._step = Step(0.0, 0.0, torch.zeros_like(self.skipped))

    @property
    def groups(self) -> list[Group]:
        """What is cut now."""
        return self.stages[self.frozen]

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Go on with a model of the same parameters, by name: that which ``fully_shard`` has split, or a whole one again.

        Masks, scores and parked values are then split as their weights are. All ranks have to join in.
        """
        parameters = dict(model.named_parameters())
        if all(parameters[slot.name] is slot.parameter for group in self._all_groups() for slot in group.slots):
            return
        for group in self._all_groups():
            group.follow(parameters, self._states.get(group.name, {}))
        self._follow()

    @torch.no_grad()
    def before_step(self, progress: float, skip: Tensor | None = None) -> None:
        """After backward (and accumulation, all-reduce and clipping), before ``optimizer.step()``.

        Args:
            progress: the part of the run that is done once this step is: ``(step + 1) / steps``.
            skip: a 0-dim tensor, above 0 where ``optimizer.step()`` will be skipped because a gradient of any weight is
                infinite or NaN. None: those of the targets are looked at here, and only the scores stay as they are.
        """
        self._follow()
        self._step = Step(self.progress, progress, self._bad_gradients(skip))
        self.skipped += self._step.skip
        self._uncover()
        for group in self.groups:
            if not self.frozen:
                group.unpark()
                group.rule.criterion.observe(group, self._state(group), self._step)
            group.clear_gradients()

    @torch.no_grad()
    def after_step(self) -> None:
        """After ``optimizer.step()``: new masks if they are due, and exact zeros where the masks say so."""
        before, self.progress = self._step.before, self._step.now
        if not self.frozen:
            self._regularize(self.progress - before)
            if self.schedule.rewind and self.progress >= self.schedule.begin:
                for group in self.groups:
                    group.remember()
            if self.schedule.due(before, self.progress):
                self._choose(final=self.progress >= self.schedule.freeze)
        for group in self.groups:
            if self.frozen:
                group.zero()
                continue
            if self.progress > self.schedule.begin:
                gate = group.rule.criterion.gate(group, self._state(group), self.progress)
                if gate is not None:
                    group.set_mask(gate > 0, gate)
            group.park()
        self._cover()

    @torch.no_grad()
    def finish(self, replaced: bool = False) -> None:
        """The masks are final: a run that ended before ``freeze`` gets its last cut, and the parked values are dropped.

        Args:
            replaced: the model holds weights of another step, as after ``load_best_model_at_end``, to which the parked values
                do not belong.
        """
        self._uncover()
        for group in self.groups:
            if not (self.frozen or replaced):
                group.unpark()
        if not self.frozen:
            self._choose(final=True, rewind=False)
        for group in self.groups:
            group.zero()

    @torch.no_grad()
    def fix(self, masks: dict[str, Tensor]) -> None:
        """Take final masks that were chosen elsewhere, by group name: what they cut is zero from now on."""
        for group in self.groups:
            group.set_mask(masks[group.name])
        self._freeze()
        for group in self.groups:
            group.zero()

    def masks(self) -> dict[str, Tensor]:
        """Group name -> boolean unit grid, True where kept."""
        return {group.name: group.mask for group in self.groups}

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Group name -> the scores (fp32, unit grid) of the whole weights as they are after a step; empty once frozen.

        Of a model that is split, the part on this rank; ``learned`` likewise.
        """
        self._follow()
        self._uncover()
        scores: dict[str, Tensor] = {}
        for group in [] if self.frozen else self.groups:
            group.unpark()
            scores[group.name] = group.rule.criterion.score(group, self._state(group))
            group.park()
        self._cover()
        return scores

    def learned(self) -> dict[str, Tensor]:
        """Group name -> what the gradients have taught its criterion, for the groups where they do; empty once frozen."""
        found = {} if self.frozen else {g.name: g.rule.criterion.learned(self._state(g)) for g in self.groups}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def mask_hash(self) -> str:
        """sha256 of all masks: equal on all ranks and on a resumed run, or something is wrong."""
        digest = hashlib.sha256()
        for group in self.groups:
            digest.update(group.name.encode())
            digest.update(group.whole(group.mask).cpu().numpy().tobytes())
        return digest.hexdigest()

    def sparsity(self) -> float:
        """The part of all targeted weights (biases not counted) that is cut now."""
        cut = total = 0.0
        for group in self.groups:
            size = sum(slot.parameter.numel() for slot in group.matrices)
            total += size
            if group.cut:
                cut += size * (1.0 - group.kept / group.units)
        return cut / total

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs, as flat tensors: safetensors can hold it, nothing is pickled.

        Of a model that is split, what is split with its weights comes as DTensors, for ``torch.distributed.checkpoint``.
        """
        state = {
            "progress": torch.tensor(self.progress, dtype=torch.float64),
            "frozen": torch.tensor(self.frozen),
            "skipped": self.skipped,
        }
        if self.costs is not None:
            state |= self.costs.state()
        for group in self.groups:
            state[f"{group.name}/mask"] = group.spread(group.mask)
            if group.gate is not None:
                state[f"{group.name}/gate"] = group.spread(group.gate)
            for key, tensor in self._state(group).items():
                state[f"{group.name}/state/{key}"] = _spread(group, tensor)
            for slot in group.slots:
                for key, tensor in slot.beside().items() if not slot.frozen else ():
                    state[f"{slot.name}/{key}"] = slot.split.spread(tensor) if slot.split else tensor
        for groups, budget in self._measured():
            for group, density in zip(groups, budget.densities, strict=False):  # none before the dry pass
                state[f"{group.name}/density"] = torch.tensor(density, dtype=torch.float64)
        return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state_dict``, on the model whose weights were saved with it."""
        frozen = bool(state.get("frozen", False))
        expected = {f"{group.name}/mask": group.shape for group in self.stages[frozen]}
        expected |= {
            f"{group.name}/density": torch.Size()
            for group in self.stages[frozen]
            if isinstance(group.rule.budget, Sensitivity)
        }
        if not frozen:
            expected |= {
                f"{group.name}/state/{key}": group.shape if tensor.shape == group.mask.shape else tensor.shape
                for group in self.stages[frozen]
                for key, tensor in self._state(group).items()
            }
        found = {
            key: tensor.shape
            for key, tensor in state.items()
            if key.endswith(("/mask", "/density")) or "/state/" in key
        }
        if found != expected:
            other = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))[0]
            raise InputError(
                f"the saved pruning state belongs to other rules than this run's (see {other}); "
                "resume with the recipe that the run was started with"
            )
        device = self.groups[0].slots[0].parameter.device
        self.progress = float(state["progress"])
        self.skipped = state["skipped"].to(device, copy=True)
        self.frozen, self._states = frozen, {}
        if self.costs is not None:
            self.costs = self.costs.restored(state)
        for groups, _ in self._measured():
            give_densities(groups, [float(state[f"{group.name}/density"]) for group in groups])
        for group in self.groups:
            gate = state.get(f"{group.name}/gate")
            mask = _part(group.split, state[f"{group.name}/mask"], group.shape).to(device)
            group.set_mask(mask, None if gate is None else _part(group.split, gate, group.shape).to(device, copy=True))
            prefix = f"{group.name}/state/"
            self._states[group.name] = {
                key.removeprefix(prefix): _part(group.split, tensor, group.shape).to(device, copy=True)
                for key, tensor in state.items()
                if key.startswith(prefix)
            }
            for slot in group.slots:
                prefix = f"{slot.name}/"
                held = {key: state[prefix + key] for key in ("parked", "origin") if prefix + key in state}
                parts = {key: _part(slot.split, tensor, slot.outline.shape) for key, tensor in held.items()}
                slot.hold({key: part.to(device, copy=True) for key, part in parts.items()})
                if slot.frozen and group.cut:
                    slot.hold({"parked": slot.weight * group.pruned(slot)} if group.rule.regrow else {})
                    slot.weight.masked_fill_(group.pruned(slot), 0)
        self._cover()

    def holds(self) -> bool:
        """Whether every cut weight of the model is an exact zero."""
        return all(
            not bool(slot.weight[group.pruned(slot)].any())
            for group in self.groups
            if group.cut
            for slot in group.slots
        )

    def _cover(self) -> None:
        for group in self.groups:
            for slot in group.slots if group.cut else []:
                slot.cover(group.pruned(slot))

    def _uncover(self) -> None:
        for group in self.groups:
            for slot in group.slots:
                slot.uncover()

    def _follow(self) -> None:
        """Go where the model is, which a Trainer puts on its device after the Pruner was built."""
        device = self.groups[0].slots[0].parameter.device
        if self.skipped.device == device:
            return
        self.skipped = self.skipped.to(device)
        self._states = {name: {key: t.to(device) for key, t in state.items()} for name, state in self._states.items()}
        for group in self._all_groups():
            group.set_mask(group.mask.to(device), None if group.gate is None else group.gate.to(device))
            for slot in group.slots:
                slot.parked = None if slot.parked is None else slot.parked.to(device)
                slot.origin = None if slot.origin is None else slot.origin.to(device)

    def _all_groups(self) -> list[Group]:
        first, later = self.stages
        return [*first, *(group for group in later if group not in first)]

    def _state(self, group: Group) -> State:
        """What a criterion remembers of a group, from its first use on: by then the model is where it is trained."""
        if group.name not in self._states:
            self._states[group.name] = {} if self.frozen else group.rule.criterion.start(group)
        return self._states[group.name]

    def _bad_gradients(self, skip: Tensor | None) -> Tensor:
        """1.0 where the step is to be skipped, without a host sync."""
        gradients = [group.heard for group in self.groups if group.heard is not None]
        if skip is None:
            gradients += [
                slot.parameter.grad for group in self.groups for slot in group.slots if slot.parameter.grad is not None
            ]
        known = torch.zeros_like(self.skipped) if skip is None else skip.to(self.skipped)
        return known if self.frozen or not gradients else torch.maximum(known, not_finite(gradients))

    def _rules(self) -> dict[int, tuple[Rule, list[Group]]]:
        rules: dict[int, tuple[Rule, list[Group]]] = {}
        for group in self.groups:
            rules.setdefault(id(group.rule), (group.rule, []))[1].append(group)
        return rules

    def _measured(self) -> list[tuple[list[Group], Sensitivity]]:
        """The groups of each rule whose densities come from a dry pass, and where they are kept."""
        return [
            (groups, rule.budget) for rule, groups in self._rules().values() if isinstance(rule.budget, Sensitivity)
        ]

    def _regularize(self, part: float) -> None:
        """The proximal step of a rule's penalty on whole weights, over the given part of the run."""
        pull = (1.0 - self._step.skip) * part * self.schedule.fraction(self.progress)
        for group in self.groups:
            if (regularizer := group.rule.regularizer) is not None:
                regularizer.shrink(group, pull * regularizer.strength)

    def _choose(self, final: bool, rewind: bool = True) -> None:
        fraction = 1.0 if final else self.schedule.fraction(self.progress)
        shared: dict[str, Tensor] = {}
        for rule, groups in self._rules().values():
            states = [self._state(group) for group in groups]
            scores = ordered(rule, groups, states, self.progress, final)
            if scores is None:
                continue
            if rule.sparsity is None:
                shared |= worth(rule, groups, scores)
            else:
                cut(rule, groups, states, scores, fraction, final)
        self._share_costs(shared, fraction)
        if final:
            for group in self.groups if rewind else []:
                group.rewind()
            self._freeze()

    def _share_costs(self, worth: dict[str, Tensor], fraction: float) -> None:
        """One choice over all groups without a sparsity of their own, once each of them has an order."""
        if self.costs is None or worth.keys() != self.costs.tables.keys():
            return
        masks = self.costs.share(worth, fraction)
        for group in self.groups:
            if group.name in masks:
                group.set_mask(masks[group.name].to(group.mask.device))

    def _freeze(self) -> None:
        """The masks are final. Where they are filled, the groups of heads and neurons go on from here, on whole weights."""
        before, after = self.stages
        fine = self.sparsity()
        pruned = {slot.name: group.pruned(slot) for group in before if after is not before for slot in group.slots}
        for group in after:
            if group not in before:
                group.set_mask(survivors(group, pruned))
        for group in before:
            if group not in after:
                group.set_mask(torch.ones_like(group.mask))
                group.park()
        self.frozen = True
        self._states = {}
        if after is not before:
            logger.info(
                "Filled: %.1f%% of the targeted weights were cut; whole heads and neurons with %.1f%% of them are gone, "
                "and the others are dense again.", 100 * fine, 100 * self.sparsity(),
            )  # fmt: skip


def not_finite(gradients: Sequence[Tensor]) -> Tensor:
    """1.0 (fp32) where a gradient is infinite or NaN, on any rank; no host waits for it."""
    sums = torch.stack([here(gradient).sum(dtype=torch.float32) for gradient in gradients])
    return total((~torch.isfinite(sums)).any().float(), mesh_of(gradients), dist.ReduceOp.MAX)


def _spread(group: Group, tensor: Tensor) -> Tensor:
    """A tensor of a criterion's state: a grid, or what has no units."""
    return group.spread(tensor) if tensor.shape == group.mask.shape else tensor


def _part(split: Split | None, tensor: Tensor, shape: torch.Size) -> Tensor:
    """What lies here of a saved tensor, which comes split in the same way, or whole."""
    if split is None or tensor.shape != shape or isinstance(tensor, DTensor):
        return here(tensor)
    return split.part(tensor)
