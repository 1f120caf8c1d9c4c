"""Judges: what a model's answers are worth; one kind of answer a file."""

from finllm_prune.judges.classes import ClassJudge
from finllm_prune.judges.completions import CompletionJudge
from finllm_prune.judges.judge import Answers, Indices, Judge
from finllm_prune.judges.label_sets import LabelSetJudge
from finllm_prune.judges.rankings import RankingJudge
from finllm_prune.judges.scores import ScoreJudge

__all__ = [
    "Answers",
    "ClassJudge",
    "CompletionJudge",
    "Indices",
    "Judge",
    "LabelSetJudge",
    "RankingJudge",
    "ScoreJudge",
]
