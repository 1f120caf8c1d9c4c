"""Who survives: a score per unit, high = keep. One idea, one class; a new one is listed at the foot."""

from finllm_prune.pruning.criteria.criterion import Criterion, State, Step
from finllm_prune.pruning.criteria.first_order import Gradient, Platon, Taylor, Variance
from finllm_prune.pruning.criteria.l0 import L0
from finllm_prune.pruning.criteria.magnitude import Magnitude, Random
from finllm_prune.pruning.criteria.movement import Movement, ScoreMovement, SoftMovement, SteeredScores
from finllm_prune.pruning.criteria.second_order import SecondOrder

__all__ = [
    "CRITERIA",
    "L0", "Criterion", "Gradient", "Magnitude", "Movement", "Platon", "Random", "ScoreMovement", "SecondOrder", "SoftMovement",
    "State", "SteeredScores", "Step", "Taylor", "Variance",
]  # fmt: skip

CRITERIA: dict[str, type[Criterion]] = {
    "movement": Movement,
    "soft_movement": SoftMovement,
    "score_movement": ScoreMovement,
    "l0": L0,
    "magnitude": Magnitude,
    "gradient": Gradient,
    "taylor": Taylor,
    "platon": Platon,
    "variance": Variance,
    "second_order": SecondOrder,
    "random": Random,
}
