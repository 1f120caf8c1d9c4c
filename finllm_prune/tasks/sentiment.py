"""Sentiment: what a short text, or a text about an aspect, says to an investor: positive, hawkish, and the like."""

from dataclasses import dataclass
from typing import ClassVar

from finllm_prune.tasks.classification import Classification


@dataclass(frozen=True)
class Sentiment(Classification):
    """Classification of headlines and sentences."""

    builtin: ClassVar[str] = "sentiment"


TASK = Sentiment
