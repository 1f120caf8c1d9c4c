"""How far a student's logits are from its teacher's: one function for each kind of answer."""

import torch.nn.functional as F
from torch import Tensor


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` between classes, logits (rows, classes) (Hinton et al. 2015)."""
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, -1), F.log_softmax(teacher.float() / temperature, -1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return temperature * temperature * divergence


def set_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` between the two sides of each label, mean over labels, logits (rows, labels)."""
    own, other = (each.float() / temperature for each in (student, teacher))
    right = other.sigmoid()
    # Cross entropy less the teacher's own, so that a perfect student has 0.
    losses = [F.binary_cross_entropy_with_logits(each, right) for each in (own, other)]
    return temperature * temperature * (losses[0] - losses[1])


def mse(student: Tensor, teacher: Tensor, relevance: Tensor | None = None) -> Tensor:
    """The mean squared difference, whatever the shape: of one output the softmax is 1 and teaches nothing.

    Args:
        relevance: of the passages, where rows are lists of them; below 0 there is none, and nothing to compare.
    """
    squares = F.mse_loss(student.float(), teacher.float(), reduction="none")
    return squares.mean() if relevance is None else squares[relevance >= 0].mean()


def margin_mse(student: Tensor, teacher: Tensor, relevance: Tensor) -> Tensor:
    """The mean squared difference of margins ``s_i - s_j``, i being more relevant than j (Hofstätter et al. 2020).

    https://arxiv.org/abs/2010.02666. Whatever is added to all scores of a query does not matter.

    Args:
        student, teacher: scores (rows, passages).
        relevance: of the passages; below 0 there is none.
    """
    pairs = (relevance[:, :, None] > relevance[:, None, :]) & (relevance >= 0)[:, None, :]
    off = student.float() - teacher.float()
    squares = (off[:, :, None] - off[:, None, :]).square()
    total: Tensor = squares.where(pairs, 0.0).sum() / pairs.sum().clamp_min(1)
    return total


def centred_mse(student: Tensor, teacher: Tensor, relevance: Tensor) -> Tensor:
    """The mean squared difference of scores less their mean in the list, mean over lists.

    That is half of the mean squared difference of margins over all pairs of a list, equally relevant ones too.

    Args:
        student, teacher: scores (rows, passages).
        relevance: of the passages; below 0 there is none.
    """
    there = relevance >= 0
    count = there.sum(1, keepdim=True).clamp_min(1)
    off = (student.float() - teacher.float()).where(there, 0.0)
    squares = (off - off.sum(1, keepdim=True) / count).square().where(there, 0.0)
    return (squares.sum(1, keepdim=True) / count).mean()
