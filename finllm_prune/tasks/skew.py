"""Losses for classes of unlike size: weights, and the focal loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from finllm_prune.errors import InputError


@dataclass(frozen=True)
class SkewLoss:
    """``mean over rows of w[label] * (1 - p)^gamma * -log p``, where p is the probability of the row's label.

    The mean is over rows, not over weights as ``torch.nn.CrossEntropyLoss(weight=...)`` takes it: so batches of equal size
    count alike, and accumulation steps and ranks add up to the large batch. Focal loss: Lin et al. 2017
    (https://arxiv.org/abs/1708.02002).

    Args:
        weights: per class, shape (classes,); None weighs all alike.
        gamma: how little what is predicted well counts; 0 is cross entropy.
        smoothing: the part of a row's label that all classes share alike, in ``-log p`` and not in ``(1 - p)^gamma``.
    """

    weights: Tensor | None
    gamma: float
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch: logits (rows, classes), labels (rows,)."""
        losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=self.smoothing)
        if self.gamma > 0:
            plain = losses if self.smoothing == 0 else F.cross_entropy(logits.float(), labels, reduction="none")
            # At p = 1 a power below 1 has an infinite slope.
            losses = (-torch.expm1(-plain)).clamp_min(1e-7) ** self.gamma * losses
        if self.weights is not None:
            losses = self.weights.to(losses.device)[labels] * losses
        return losses.mean()

    def smoothed(self, part: float) -> "SkewLoss":
        """The same with the Trainer's ``label_smoothing_factor``."""
        return replace(self, smoothing=part)


def class_weights(asked: str | dict[str, float], labels: Sequence[str], rows: Sequence[int]) -> Tensor:
    """``balanced``: rows / (classes * rows of the class), whose mean over the rows is 1; or weights by name.

    Raises:
        InputError: a class has no row, no weight, or is unknown.
    """
    if isinstance(asked, dict):
        if set(asked) != set(labels) or min(asked.values()) < 0 or max(asked.values()) == 0:
            raise InputError(
                f"task.class_weights: each of {', '.join(labels)} needs a weight, none below 0 and one above; given are "
                f"{', '.join(asked) or 'none'}"
            )
        return torch.tensor([asked[name] for name in labels], dtype=torch.float32)
    absent = [name for i, name in enumerate(labels) if i not in set(rows)]
    if absent:
        raise InputError(
            f"task.class_weights: no training row has the label {absent[0]}, so it cannot be balanced; give weights by name"
        )
    balanced = compute_class_weight("balanced", classes=np.arange(len(labels)), y=np.array(rows))
    return torch.tensor(balanced, dtype=torch.float32)
