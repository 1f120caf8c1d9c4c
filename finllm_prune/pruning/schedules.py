"""How fast: run progress (0..1) -> the part of the final sparsity that is due. No schedule counts absolute steps."""

import math
from dataclasses import dataclass

from finllm_prune.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """The spans of a pruning run, as fractions of its optimizer steps.

    Args:
        begin: nothing is cut before it: the scores warm up.
        end: from here on the sparsity is final, while the masks may still change.
        freeze: from here on the masks are fixed and the kept weights are tuned.
        updates: how often the masks are chosen anew between ``begin`` and ``freeze``, at most once a step.
        rewind: at ``freeze`` the kept weights of the targets go back to their values at ``begin``, and are tuned again from
            there (Renda et al. 2020, https://arxiv.org/abs/2003.02389); leave a long part of the run after ``freeze`` then.
            Norms, embeddings, the head and the optimizer's moments go on as they are.
    """

    begin: float = 0.05
    end: float = 0.5
    freeze: float = 0.7
    updates: int = 64
    rewind: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= self.freeze <= 1:
            raise InputError(
                "pruning.schedule: it must hold that 0 <= begin < end <= freeze <= 1, as fractions of the run; "
                f"got begin={self.begin}, end={self.end}, freeze={self.freeze}"
            )
        if self.rewind and self.freeze == 1:
            raise InputError(
                "pruning.schedule: rewind needs training after freeze, or the weights end as they began; set freeze below 1"
            )
        if self.updates < 1:
            raise InputError(f"pruning.schedule: updates must be at least 1, not {self.updates}")

    def ramp(self, x: float) -> float:
        """The shape between ``begin`` (x = 0) and ``end`` (x = 1); from 0 to 1."""
        raise NotImplementedError

    def fraction(self, progress: float) -> float:
        """The part of the final sparsity that is due at ``progress``."""
        if progress < self.begin:
            return 0.0
        return self.ramp(min(1.0, (progress - self.begin) / (self.end - self.begin)))

    def due(self, before: float, now: float) -> bool:
        """Whether the masks are chosen in the step that leads from progress ``before`` to ``now``."""
        if before >= self.freeze or now < self.begin:
            return False
        return now >= self.freeze or self._slot(before) != self._slot(now)

    def _slot(self, progress: float) -> int:
        return (
            int((progress - self.begin) / (self.freeze - self.begin) * self.updates) if progress >= self.begin else -1
        )


@dataclass(frozen=True)
class Cubic(Schedule):
    """``1 - (1 - x)^3`` (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878): fast at first, slow near the target."""

    def ramp(self, x: float) -> float:
        return 1.0 - (1.0 - x) ** 3


@dataclass(frozen=True)
class Linear(Schedule):
    """The same amount in each update."""

    def ramp(self, x: float) -> float:
        return x


@dataclass(frozen=True)
class Exponential(Schedule):
    """``(1 - e^(-rate x)) / (1 - e^-rate)``: the part that is still to be cut decays at a steady rate.

    Args:
        rate: how fast; above 0. Near 0 it is linear.
    """

    rate: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < math.inf:
            raise InputError(f"pruning.schedule: rate must be above 0, not {self.rate}")

    def ramp(self, x: float) -> float:
        return math.expm1(-self.rate * x) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Cyclic(Schedule):
    """Rounds of cutting and recovery: the cubic ramp, taken in stairs.

    Args:
        rounds: how many; at least 1.
        recover: the part of each round, after its cuts, in which the sparsity stands still; 0 <= recover < 1.
    """

    rounds: int = 4
    recover: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or not 0 <= self.recover < 1:
            raise InputError(
                "pruning.schedule: rounds must be at least 1 and recover at least 0 and below 1, not "
                f"{self.rounds} and {self.recover}"
            )

    def ramp(self, x: float) -> float:
        done, into = divmod(x * self.rounds, 1.0)
        stair = (done + min(1.0, into / (1.0 - self.recover))) / self.rounds
        return 1.0 - (1.0 - min(1.0, stair)) ** 3


@dataclass(frozen=True)
class Constant(Schedule):
    """The whole sparsity at ``begin``: one shot, then recovery. ``end`` only bounds ``freeze`` here."""

    def ramp(self, x: float) -> float:
        return 1.0


SCHEDULES: dict[str, type[Schedule]] = {
    "cubic": Cubic,
    "linear": Linear,
    "exponential": Exponential,
    "cyclic": Cyclic,
    "constant": Constant,
}
