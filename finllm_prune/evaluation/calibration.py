"""Do probabilities mean what they say?"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Of one model on one set of classes, or of labels of which each is given or not: then the mean of the labels' figures.

    Args:
        ece: the expected calibration error (Guo et al. 2017): |accuracy - confidence|, the mean over the rows of all bins.
        brier: the squared distance of the probabilities from the right answer, summed over classes, the mean over rows
            (Brier 1950): 0 is perfect, 2 the worst.
        bins: of equal width in the confidence; of each that holds rows its mean ``confidence``, its ``accuracy``, ``rows``. A
            row counts once for each label that may be given.
    """

    ece: float
    brier: float
    bins: list[dict[str, Any]]


def calibration(logits: Tensor, references: NDArray[np.int64], bins: int = 15) -> Calibration:
    """Args:
    logits: shape (rows, classes).
    references: the right class of each row, shape (rows,).
    bins: of the confidence, from 0 to 1.

    A row whose logits are no numbers counts as sure of a wrong class.
    """
    probabilities = logits.double().softmax(-1).numpy()
    broken = np.isnan(probabilities).any(-1)
    probabilities[broken] = np.eye(probabilities.shape[1])[(references[broken] + 1) % probabilities.shape[1]]
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == references
    # A bin holds its upper edge, as Guo et al. have it.
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    filled = [
        {"confidence": float(confidence[rows].mean()), "accuracy": float(right[rows].mean()), "rows": int(rows.sum())}
        for rows in (places == number for number in range(bins))
        if rows.any()
    ]
    gaps = [abs(each["accuracy"] - each["confidence"]) * each["rows"] for each in filled]
    truth = np.eye(probabilities.shape[1])[references]
    return Calibration(
        ece=float(sum(gaps) / len(references)),
        brier=float(((probabilities - truth) ** 2).sum(-1).mean()),
        bins=filled,
    )


def calibration_of_sets(logits: Tensor, references: NDArray[np.int64], bins: int = 15) -> Calibration:
    """Each label is a question of two answers, given or not, as sure as its sigmoid says.

    Args:
        logits: shape (rows, labels).
        references: 1 where a row has the label, else 0, shape (rows, labels).
        bins: of the confidence, which lies above 0.5.
    """
    pairs = torch.stack([torch.zeros_like(logits), logits], -1)
    labels = [calibration(pairs[:, i], references[:, i], bins) for i in range(logits.shape[1])]
    all_of_them = calibration(pairs.flatten(0, 1), references.reshape(-1), bins)
    return replace(all_of_them, ece=float(np.mean([label.ece for label in labels])))
