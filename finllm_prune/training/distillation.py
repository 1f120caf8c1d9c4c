"""What the pruned student learns from a dense teacher: its logits, and its hidden states layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from finllm_prune.errors import InputError


@dataclass(frozen=True)
class Distillation:
    """``alpha * T^2 * KL(teacher || student) + (1 - alpha) * task loss + hidden * sum of layer losses``.

    Logits after Hinton et al. 2015 (https://arxiv.org/abs/1503.02531), hidden states by a mean squared error over the
    tokens that are not padding. At 90 % sparsity the hidden states are what keeps movement pruning from collapsing.

    Args:
        teacher: ``dense``, the baseline of this run, or a local path or Hub id of another fine-tuned model.
        alpha: the weight of the teacher's logits against the labels, 0..1.
        temperature: softens both distributions; above 0.
        hidden: the weight of the hidden states; 0 leaves them out.
    """

    teacher: str = "dense"
    alpha: float = 0.9
    temperature: float = 2.0
    hidden: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.temperature <= 0 or self.hidden < 0:
            raise InputError(
                "distillation: alpha must lie in 0..1, temperature above 0 and hidden must not be negative"
            )


class Teacher:
    """A dense model that a student is compared with.

    Args:
        model: the fine-tuned dense model; put into eval mode.
        settings: the weights of the parts.
        layers: for each block of the student, the block of the teacher that it imitates.
    """

    def __init__(self, model: PreTrainedModel, settings: Distillation, layers: Sequence[int]):
        self.model = model.eval().requires_grad_(False)
        self.settings = settings
        self.layers = list(layers)

    def loss(self, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """The whole training loss.

        Args:
            outputs: of the student: ``loss`` (of the task), ``logits`` (batch, classes), and ``hidden_states`` (a tuple
                of (batch, tokens, width), embeddings first) if ``settings.hidden`` is above 0.
            inputs: the batch, on the student's device, labels included.
        """
        settings, logits = self.settings, outputs["logits"]
        self.model.to(logits.device)
        with torch.no_grad():
            batch = {key: value for key, value in inputs.items() if key != "labels"}
            target = self.model(**batch, output_hidden_states=settings.hidden > 0)
        t = settings.temperature
        divergence = F.kl_div(
            F.log_softmax(logits.float() / t, -1), F.log_softmax(target["logits"].float() / t, -1),
            reduction="batchmean", log_target=True,
        )  # fmt: skip
        loss = settings.alpha * t * t * divergence + (1.0 - settings.alpha) * outputs["loss"]
        if settings.hidden > 0:
            loss = loss + settings.hidden * self._hidden(outputs, target, inputs["attention_mask"])
        return loss

    def _hidden(self, outputs: dict[str, Tensor], target: dict[str, Tensor], mask: Tensor) -> Tensor:
        student, teacher = outputs["hidden_states"], target["hidden_states"]
        weights = mask.unsqueeze(-1).float()
        scale = weights.sum() * student[0].shape[-1]
        total = torch.zeros((), device=mask.device)
        for own, other in enumerate(self.layers):
            difference = (student[own + 1].float() - teacher[other + 1].float()) * weights
            total = total + difference.square().sum() / scale
        return total
