"""Layers of a student against layers of a teacher: which with which, and how far they are apart.

Hidden states have the shape (batch, tokens, width), masks (batch, tokens); what the mask leaves out counts nowhere.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Finite, because 0 * (-inf - -inf) would be NaN in the divergence; its exponential is 0 all the same.
_NEVER = -1e9


def uniform_layers(kept: Sequence[int], depth: int, teacher_depth: int) -> list[int]:
    """For each kept block of a student that had ``depth`` blocks, the teacher's block at the same relative height.

    The last one imitates the teacher's last: the head reads its state, which pre-norm models put through one more norm.
    """
    *rest, _ = [max(round((block + 1) * teacher_depth / depth), 1) - 1 for block in kept] or [0]
    return [*rest, teacher_depth - 1] if kept else []


def ordered_matches(cost: Tensor) -> list[int]:
    """For each row of ``cost`` its column, ascending and without repeats, at the smallest sum of all such choices.

    Args:
        cost: shape (rows, columns), no more rows than columns.
    """
    first, *rest = cost.cpu()
    total, came_from = first, []
    for row in rest:
        best, where = total.cummin(0)
        came_from.append(where)
        total = row + torch.cat([best.new_full((1,), math.inf), best[:-1]])
    matches = [int(total.argmin())]
    for where in reversed(came_from):
        matches.insert(0, int(where[matches[0] - 1]))
    return matches


def real_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """The mask of a batch; packed sequences have no padding and none."""
    return inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])


def hidden_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The mean squared error over the tokens of each text, then over texts; both of one width.

    So a batch has the same loss in one piece as in several or on several ranks, however these are padded.
    """
    errors = (student.float() - teacher.float()).square().mean(-1) * mask
    return (errors.sum(-1) / mask.sum(-1)).mean()


def relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """``KL(teacher || student)`` of how each token relates to the others; the two may have different widths.

    A token's relations are ``softmax(h_i . h_j / sqrt(width))`` over the other tokens j of its text, as the self-attention
    relations of MiniLMv2 (Wang et al. 2021, https://arxiv.org/abs/2012.15828), but of whole hidden states, so that no
    model needs hooks. The token itself is left out: its squared length would take nearly all of the probability. The mean
    over the tokens of each text, then over texts, is the same in one batch or in several.
    """
    p, q = _relations(teacher, mask), _relations(student, mask)
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * mask
    return (divergence.sum(-1) / mask.sum(-1)).mean()


def _relations(states: Tensor, mask: Tensor) -> Tensor:
    scores = states.float() @ states.float().mT / math.sqrt(states.shape[-1])
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return F.log_softmax(scores.masked_fill(itself | (mask == 0).unsqueeze(1), _NEVER), -1)
