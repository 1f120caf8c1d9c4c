"""One shot with calibration data: one matrix and statistics of its inputs -> its final mask and the weights that stay.

Written for ``y = W x`` with W of shape (out, in). A method sees one matrix at a time, so that nothing larger than one layer's
statistics is ever held; ``finllm_prune.training.oneshot`` walks a model with it. Heads and neurons are chosen by what the
matrix behind them gets (``Activations``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.pruning.budgets import Uniform
from finllm_prune.pruning.criteria import Criterion, Magnitude
from finllm_prune.pruning.groups import Group, Rule
from finllm_prune.pruning.structures import NM, Head, Layer, Neuron, Structure, Unstructured, best

Pattern = tuple[int, int]
"""(n, m): n of every m consecutive weights along the input axis stay."""


@dataclass(frozen=True)
class Calibrated:
    """The base of the methods that look at the inputs of matrices.

    Args:
        rows: how many training rows (their texts only) the inputs are taken from; all, where there are fewer.
    """

    rows: int = 128

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise InputError(
                f"pruning.oneshot.rows: wanda, sparsegpt and activations need calibration data, so at least 1 row, "
                f"not {self.rows}; without data there is oneshot: magnitude"
            )

    def statistics(self, inputs: Tensor) -> Tensor:
        """Inputs of shape (tokens, in) -> what is remembered of them (fp32); it adds up over batches."""
        raise NotImplementedError


class ByMatrix(Calibrated):
    """The base of those that cut single weights of the matrix whose inputs they look at."""

    def prune(
        self, weight: Tensor, statistics: Tensor, sparsity: float, pattern: Pattern | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mask (bool, True where kept) and the new weight (fp32, zero where cut), both (out, in).

        Args:
            weight: (out, in), whole.
            statistics: the sum over all batches.
            sparsity: the part that is cut; a ``pattern`` goes before it.
            pattern: (n, m), where m divides ``in``; None cuts single weights.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Wanda(ByMatrix):
    """``|W| * ||X||_2``, compared within each output row (Sun et al. 2023, https://arxiv.org/abs/2306.11695)."""

    def statistics(self, inputs: Tensor) -> Tensor:
        return inputs.float().square().sum(0)

    def prune(
        self, weight: Tensor, statistics: Tensor, sparsity: float, pattern: Pattern | None = None
    ) -> tuple[Tensor, Tensor]:
        inn = weight.shape[1]
        n, m = pattern or (max(1, round((1.0 - sparsity) * inn)), inn)
        mask = best(weight.float().abs() * statistics.sqrt(), n, m)
        return mask, weight.float() * mask


@dataclass(frozen=True)
class SparseGPT(ByMatrix):
    """Optimal brain surgeon, column by column (Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774).

    With ``H = X^T X`` and U the upper Cholesky factor of its inverse, a cut of ``w_j`` costs ``w_j^2 / U_jj^2``, and the
    columns behind j make up for it by ``-w_j / U_jj * U_j``. Each block of columns takes the sparsity on its own.

    Args:
        block: columns whose masks are chosen together, before the first of them is cut; whole patterns under n:m.
        damp: added to the diagonal of H, as a part of its mean.
    """

    block: int = 128
    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or not 0 < self.damp < 1:
            raise InputError(
                "pruning.oneshot: the block of sparsegpt must be at least 1 and its damp lie between 0 and 1 "
                f"(exclusive), not {self.block} and {self.damp}"
            )

    def statistics(self, inputs: Tensor) -> Tensor:
        return inputs.float().T @ inputs.float()

    def prune(
        self, weight: Tensor, statistics: Tensor, sparsity: float, pattern: Pattern | None = None
    ) -> tuple[Tensor, Tensor]:
        weight, factor = weight.float().clone(), self._factor(statistics)
        scale = (statistics.diagonal() > 0) / factor.diagonal()  # a weight whose input was always zero costs nothing
        mask = torch.ones_like(weight, dtype=torch.bool)
        n, m = pattern or (1, 1)
        width = max(1, self.block // m) * m
        for start in range(0, weight.shape[1], width):
            part = slice(start, start + width)
            block, kept, upper = weight[:, part], mask[:, part], factor[part, part]  # views: written in place
            if pattern is None:
                cost = (block * scale[part]).square()
                kept.copy_(Uniform().share([cost], 1.0 - sparsity)[0])
            errors = torch.zeros_like(block)
            for j in range(block.shape[1]):
                if pattern is not None and j % m == 0:
                    kept[:, j : j + m] = best((block * scale[part]).square()[:, j : j + m], n, m)
                errors[:, j] = block[:, j].masked_fill(kept[:, j], 0) / upper[j, j]
                block[:, j:] -= torch.outer(errors[:, j], upper[j, j:])
            weight[:, start + width :] -= errors @ factor[part, start + width :]
        return mask, weight * mask

    def _factor(self, hessian: Tensor) -> Tensor:
        """U: inputs that were always zero, and more inputs than tokens, are no trouble, for the diagonal is damped."""
        scaled = hessian / hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny)
        scaled.diagonal().add_(self.damp)
        lower, failed = torch.linalg.cholesky_ex(scaled)
        upper: Tensor
        upper, again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if bool(failed) or bool(again) or not bool(upper.isfinite().all()):
            raise InputError(
                "pruning.oneshot: the Hessian of a matrix has no inverse, because its inputs are infinite or depend on "
                f"each other; raise damp ({self.damp}) or rows ({self.rows})"
            )
        return upper


@dataclass(frozen=True)
class Activations(Calibrated):
    """What a unit says on the calibration data (Minitron: Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679).

    A neuron counts by the mean of its absolute activation, behind the activation function; a head (kv group under GQA) by the
    L2 norm of its output over all tokens; a block by how much it changes or is missed (``finllm_prune.oneshot``).

    Args:
        blocks: ``influence``: 1 - the mean cosine of a block's input and output (ShortGPT: Men et al. 2024,
            https://arxiv.org/abs/2403.03853); ``perplexity`` of the calibration texts without it, for which the hidden states
            of all these models are held at once.
    """

    blocks: Literal["influence", "perplexity"] = "influence"

    def statistics(self, inputs: Tensor) -> Tensor:
        """(2, in): the sums of absolute values and of squares."""
        inputs = inputs.float()
        return torch.stack([inputs.abs().sum(0), inputs.square().sum(0)])

    def choose(self, group: Group, statistics: Tensor) -> Tensor:
        """The mask of the heads or neurons whose last matrix got such inputs."""
        assert group.rule.sparsity is not None
        heads = isinstance(group.rule.structure, Head)
        score = statistics[1].view(group.units, -1).sum(1).sqrt() if heads else statistics[0]
        return Uniform().share([score], 1.0 - group.rule.sparsity)[0]


OneShot = Criterion | Calibrated


def pattern_of(structure: Structure) -> Pattern | None:
    """The (n, m) of an n:m structure, None for any other."""
    return (structure.n, structure.m) if isinstance(structure, NM) else None


def refuse_unfit(method: OneShot, rules: Sequence[Rule]) -> None:
    """A one-shot method cuts single weights, or heads, neurons and layers; a calibrated one sees one matrix at a time."""
    for i, rule in enumerate(rules):
        if isinstance(method, Activations):
            if not isinstance(rule.structure, Neuron | Head | Layer):
                raise InputError(
                    f"pruning.rules.{i}.structure: oneshot activations cuts neurons, heads and layers; set one of these here, "
                    "or use wanda or sparsegpt"
                )
        elif not isinstance(rule.structure, Unstructured):
            raise InputError(
                f"pruning.rules.{i}.structure: pruning.oneshot cuts single weights; set unstructured or n:m here, "
                "use oneshot: activations, or remove pruning.oneshot"
            )
        if isinstance(method, Calibrated) and rule.budget != Uniform():
            raise InputError(
                f"pruning.rules.{i}.budget: oneshot {type(method).__name__.lower()} shares its sparsity within each "
                "matrix; set budget: uniform, or oneshot: magnitude"
            )


ONESHOT: dict[str, type[OneShot]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "activations": Activations,
}
