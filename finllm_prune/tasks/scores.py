"""A number for each text instead of a class, as the sentiment scores of FiQA: regression."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch.nn.functional as F
from torch import Tensor

from finllm_prune.errors import InputError


@dataclass(frozen=True)
class Scores:
    """The label column holds numbers, and the model's one output comes near them.

    Args:
        huber: an error above this counts by its size instead of its square (Huber 1964), so that a few wrong labels pull less;
            None squares all.
        tolerance: two predictions that are this near to each other agree.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    metrics: ClassVar[tuple[str, ...]] = ("mse", "mae", "pearson", "spearman", "r2")

    huber: float | None = None
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.huber is not None and self.huber <= 0:
            raise InputError(f"task.scores.huber: errors are larger than {self.huber:g} anyway; set it above 0")
        if self.tolerance < 0:
            raise InputError(
                f"task.scores.tolerance: two predictions are never nearer than 0, as {self.tolerance:g} asks"
            )

    def read(self, values: Sequence[Any]) -> list[float | None]:
        """Numbers, or texts of numbers; None for what is neither, or not finite."""
        given = [None if isinstance(value, bool | list | dict) else value for value in values]
        numbers = pd.to_numeric(pd.Series(given, dtype=object), errors="coerce").astype(float)
        return [float(number) if np.isfinite(number) else None for number in numbers]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the rows: logits (rows, 1), labels (rows,)."""
        found, right = logits[:, 0].float(), labels.float()
        return F.mse_loss(found, right) if self.huber is None else F.huber_loss(found, right, delta=self.huber)
