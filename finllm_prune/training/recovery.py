"""Recovery: once the masks are final, the rest of the training runs on the model without its dead heads and neurons.

The pruning phase leaves a checkpoint at the seam; the small model starts from it, whether the run was killed there or not.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.families import Cut
from finllm_prune.pruning import Pruner, Rule
from finllm_prune.staging import staged
from finllm_prune.training.beside import save_beside

MOMENTS_FILE = "moments.safetensors"


@dataclass(frozen=True)
class Recovery:
    """How the small model is trained on.

    Args:
        training: what differs from the recipe's ``training``. With ``num_train_epochs`` or ``max_steps`` it is a training of
            its own behind the whole of ``training``; without, it is the part of ``training`` from the schedule's ``freeze``
            on: the same steps, learning rates and batches, and (but for rounding and dropout) the same result, at less cost.
        keep_moments: whether such a training of its own goes on with the optimizer's moments of what is left, or without.
    """

    training: dict[str, Any] = field(default_factory=dict)
    keep_moments: bool = True

    def __post_init__(self) -> None:
        if self.training and not self.of_its_own:
            raise InputError(
                f"recovery.{next(iter(self.training))}: without num_train_epochs or max_steps it is a part of training and has "
                "no arguments of its own; set num_train_epochs, or remove the key"
            )

    @property
    def of_its_own(self) -> bool:
        """Whether it has steps and learning rates of its own."""
        return bool(self.training.keys() & {"num_train_epochs", "max_steps"})


class Seam(TrainerCallback):
    """Ends the pruning phase where recovery begins, with a checkpoint.

    It must come before the callback of the Pruner, whose file tells that a checkpoint is complete.
    """

    def __init__(self, pruner: Pruner, recovery: Recovery):
        self.pruner = pruner
        self.recovery = recovery

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._reached(state):
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.recovery.of_its_own and self.recovery.keep_moments and self._reached(state):
            save_beside(args, state, MOMENTS_FILE, lambda: _moments(kwargs["model"], kwargs["optimizer"]))

    def _reached(self, state: TrainerState) -> bool:
        return state.global_step >= state.max_steps or (self.pruner.frozen and not self.recovery.of_its_own)


class SmallerCallback(TrainerCallback):
    """The optimizer of the small model goes on with what is left of the moments, and cut weights stay exact zeros.

    Args:
        cuts: what stays of the full-size model's parameters.
        pruner: of the full-size model, frozen: what it cut inside the kept heads and neurons stays cut.
        seam: the checkpoint of the full-size model.
    """

    def __init__(self, cuts: dict[str, Cut], pruner: Pruner, seam: Path):
        self.cuts = cuts
        self.seam = seam
        cut = [(group, slot) for group in pruner.groups if group.cut for slot in group.slots]
        pruned = {slot.name: group.pruned(slot).view_as(slot.parameter) for group, slot in cut}
        left = {name: cuts[name].take(mask) if name in cuts else mask for name, mask in pruned.items()}
        self.pruned = {name: mask for name, mask in left.items() if bool(mask.any())}

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if optimizer is None:  # resumed at its end: nothing is trained
            return
        kept = load_file(self.seam / MOMENTS_FILE) if (self.seam / MOMENTS_FILE).is_file() else {}
        for name, parameter in model.named_parameters():
            if state.global_step == 0:
                prefix = f"{name}/"
                taken = {key.removeprefix(prefix): t for key, t in kept.items() if key.startswith(prefix)}
                if taken:
                    optimizer.state[parameter] = {
                        key: t.to(parameter.device) if t.ndim else t for key, t in taken.items()
                    }
            held = optimizer.state.get(parameter, {})
            for key, value in held.items():
                # The Trainer has read the full-size moments of the seam; those of a later checkpoint are small.
                if name in self.cuts and value.ndim == parameter.ndim and value.shape != parameter.shape:
                    held[key] = self.cuts[name].take(value)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, mask in self.pruned.items():
            parameter = kwargs["model"].get_parameter(name)
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._mask(name, mask, parameter), 0)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, mask in self.pruned.items():
            parameter = kwargs["model"].get_parameter(name)
            parameter.masked_fill_(self._mask(name, mask, parameter), 0)

    def _mask(self, name: str, mask: Tensor, parameter: Tensor) -> Tensor:
        """Where the model is, which a Trainer puts on its device."""
        if mask.device != parameter.device:
            self.pruned[name] = mask = mask.to(parameter.device)
        return mask


def hand_over(seam: Path, small: PreTrainedModel, folder: Path) -> None:
    """Make a checkpoint of the small model from one of the full-size model, in ``folder``, whole or not at all.

    The optimizer's state in it is still full-size; ``SmallerCallback`` takes what is left of it.
    """
    with staged(folder) as partial:
        first = partial / seam.name
        shutil.copytree(seam, first, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
        for beside in seam.glob("projection.safetensors"):
            shutil.copy(beside, first)
        save_model(small, str(first / "model.safetensors"), metadata={"format": "pt"})
        file = first / "trainer_state.json"
        state = json.loads(file.read_text())
        if state["best_model_checkpoint"] is not None:  # since the freeze, so it is this one
            state["best_model_checkpoint"] = str(folder / seam.name)
        file.write_text(json.dumps(state, indent=2) + "\n")


def refuse_unrecoverable(rules: Iterable[Rule], recovery: Recovery, fill: bool, oneshot: bool, freeze: float) -> None:
    """What leaves recovery nothing to do, or nothing smaller to do it on."""
    rules = list(rules)
    if oneshot:
        raise InputError(
            "recovery: masks that are chosen in one shot cut single weights, so no head or neuron goes and nothing gets "
            "smaller; remove recovery or oneshot"
        )
    if not fill and not any(rule.structure.couples for rule in rules):
        raise InputError(
            "recovery: no rule removes whole neurons, heads or layers, so the model gets no smaller; add a rule with "
            "structure: neuron, or remove recovery"
        )
    if not all(rule.criterion.trains_weights for rule in rules):
        raise InputError(
            "recovery: score_movement does not train weights, and recovery would; set another criterion, or remove recovery"
        )
    if freeze == 1 and not recovery.of_its_own:
        raise InputError(
            "recovery: nothing of training is left after the masks freeze; set pruning.schedule.freeze below 1, or "
            "recovery.num_train_epochs"
        )


def _moments(model: torch.nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """``parameter/moment`` -> tensor, for safetensors."""
    return {
        f"{name}/{key}": value.detach().clone().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
