"""What a decision rests on beside the metrics: the headline test, calibration, who pays, where, and for how firm a model."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.evaluation.calibration import Calibration, calibration, calibration_of_sets
from finllm_prune.evaluation.non_inferiority import NonInferiority, Outcome, Verdict, not_worse
from finllm_prune.evaluation.perturbations import PERTURBATIONS, Perturbation
from finllm_prune.evaluation.quality import Quality
from finllm_prune.evaluation.slices import SLICES, slices
from finllm_prune.evaluation.tax import tax
from finllm_prune.judges import Answers, ClassJudge, Indices, Judge, LabelSetJudge
from finllm_prune.tasks.asking import TURNS

FLIPS = "flips.json"  # holds texts of the data, so it is neither pushed nor part of report and card
KINDS = ("dense", "pruned")
_SHOWN = 25  # flips with their texts
Ask = Callable[[str, datasets.Dataset], Tensor]


@dataclass(frozen=True)
class Questions:
    """What is asked of two models on one set.

    Args:
        margin: how much worse is still good enough, in a unit's worth: 0.01 is a point of accuracy or nDCG@10.
        alpha: how often a pruned model that is worse by the margin may pass.
        slices: ``length``, ``numbers``, ``negation``, or columns of the data.
        perturbations: small changes of texts, after which both models are asked again.
        sample: units whose texts are changed, drawn at random where there are more; None takes all.
        bins: of the calibration error.
        texts: whether some texts whose worth has changed are told.
    """

    margin: float = 0.01
    alpha: float = 0.05
    slices: list[str] = field(default_factory=lambda: list(SLICES))
    perturbations: list[Perturbation] = field(default_factory=lambda: [change() for change in PERTURBATIONS.values()])
    sample: int | None = 200
    bins: int = 15
    texts: bool = True

    def __post_init__(self) -> None:
        try:
            self.test  # noqa: B018
        except InputError as error:
            raise InputError(str(error).replace("non_inferiority", "evidence")) from None
        for key in ("sample", "bins"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise InputError(f"evidence.{key}: at least one is needed, not {getattr(self, key)}")

    @property
    def test(self) -> NonInferiority:
        return NonInferiority(self.margin, self.alpha)

    def columns(self) -> list[str]:
        """Columns of the data that are needed beside the texts."""
        named = [name for name in self.slices if name not in SLICES]
        return list(dict.fromkeys([*named, *(column for each in self.perturbations for column in each.columns())]))


@dataclass(frozen=True)
class Evidence:
    """What was found.

    Args:
        headline: what the test and the slices look at, the mean worth of the units: a metric's name, or words.
        unit: what one is called: row, query.
        units: how many were judged.
        alpha: of the test.
        tested: whether pruned is not worse than dense by more than the margin.
        verdict: of this test alone.
        calibration: of ``dense`` and ``pruned``; None where there are no classes or labels.
        tax: what each class pays, that which pays most first.
        slices: ``by``, ``part``, ``units``, ``dense``, ``pruned``, ``difference``, ``interval``.
        robustness: ``change``, ``of`` how many units the texts were to be changed, ``rows`` that it changed, on what part of
            these ``dense`` and ``pruned`` changed their mind.
        confusion: ``labels``, and how many rows of each class (down) were told to be of each (across) by ``dense`` and
            ``pruned``; None where there are no classes.
        changed: texts whose worth has changed, where they are to be told.
    """

    headline: str
    unit: str
    units: int
    alpha: float
    tested: Outcome
    verdict: Verdict
    calibration: dict[str, Calibration] | None
    tax: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    robustness: list[dict[str, Any]]
    confusion: dict[str, list[Any]] | None
    changed: list[dict[str, Any]] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data without texts."""
        return {key: value for key, value in asdict(self).items() if key != "changed"}


def collect(
    judge: Judge, rows: datasets.Dataset, logits: Mapping[str, Tensor], quality: Quality, ask: Ask, questions: Questions,
    seed: int = 0, resamples: int = 999,
) -> Evidence:  # fmt: skip
    """Args:
    judge: of the rows.
    rows: with ``text``, as a task reads them.
    logits: of ``dense`` and ``pruned`` on these rows.
    quality: of these logits.
    ask: (``dense`` or ``pruned``, other rows) -> logits.
    questions: what is asked.
    seed: of the bootstrap, the perturbations and the sample.
    resamples: of the bootstrap.
    """
    both = _Both(judge, rows, {kind: logits[kind] for kind in KINDS}, questions)
    tested = not_worse(both.worth["dense"], both.worth["pruned"], questions.test, judge.bounded)
    told = "text" in rows.column_names
    return Evidence(
        headline=judge.headline,
        unit=judge.unit,
        units=len(judge),
        alpha=questions.alpha,
        tested=tested,
        verdict=tested.verdict(tested.p, questions.alpha),
        calibration=both.calibration(),
        tax=tax(quality, judge, **both.answers, seed=seed, resamples=resamples),
        slices=both.slices() if told else [],
        robustness=both.robustness(ask, seed) if told else [],
        confusion=both.confusion(),
        changed=both.changed() if told and questions.texts else None,
    )


@dataclass(frozen=True)
class _Both:
    """Two models' answers to the same rows."""

    judge: Judge
    rows: datasets.Dataset
    logits: dict[str, Tensor]
    questions: Questions

    @cached_property
    def answers(self) -> dict[str, Answers]:
        return {kind: self.judge.answers(each) for kind, each in self.logits.items()}

    @cached_property
    def worth(self) -> dict[str, NDArray[np.float64]]:
        return {kind: self.judge.worth(given) for kind, given in self.answers.items()}

    @cached_property
    def unit_of(self) -> Indices:
        """The unit of each row, shape (rows,): a query has a row with each candidate."""
        return self.judge.units()

    @cached_property
    def there(self) -> Indices:
        """The units that have rows: a query may have no candidate."""
        return np.unique(self.unit_of)

    @cached_property
    def first_rows(self) -> datasets.Dataset:
        """One row of each unit that has any, in their order; a query is there without its passages."""
        rows = self.rows.select(np.searchsorted(self.unit_of, self.there))
        return rows.remove_columns("pair") if self.judge.unit == "query" else rows

    def calibration(self) -> dict[str, Calibration] | None:
        if not isinstance(self.judge, ClassJudge | LabelSetJudge):
            return None
        of = calibration if isinstance(self.judge, ClassJudge) else calibration_of_sets
        return {kind: of(each, self.judge.references, self.questions.bins) for kind, each in self.logits.items()}

    def confusion(self) -> dict[str, list[Any]] | None:
        if not isinstance(self.judge, ClassJudge):
            return None
        right, every = self.judge.references, list(range(len(self.judge.labels)))
        counts = {kind: confusion_matrix(right, given[:, 0], labels=every) for kind, given in self.answers.items()}
        return {"labels": list(self.judge.labels), **{kind: table.tolist() for kind, table in counts.items()}}

    def slices(self) -> list[dict[str, Any]]:
        return [
            {"by": by, "part": part, "units": len(units)}
            | self._beside(*(worth[units] for worth in self.worth.values()), bounded=self.judge.bounded)
            for by, parts in slices(self.questions.slices, self.first_rows).items()
            for part, places in parts.items()
            for units in [self.there[places]]
            if self.judge.bounded or len(units) > 1  # one error alone tells nothing of others
        ]  # fmt: skip

    def robustness(self, ask: Ask, seed: int) -> list[dict[str, Any]]:
        """How often each model changes its mind when texts change a little; only those that do change are asked again.

        Prompts of several turns stay as they are: no change knows which of the turns it is about.
        """
        names = {cls: name for name, cls in PERTURBATIONS.items()}
        units, most = self.there, self.questions.sample
        if most is not None and most < len(units):
            units = np.sort(np.random.default_rng(seed).choice(units, most, replace=False))
        places = np.flatnonzero(np.isin(self.unit_of, units))
        drawn = self.rows.select(places)
        found = []
        for change in self.questions.perturbations:
            texts = change(drawn, seed)
            before, after = (zip(*(source[name] for name in texts), strict=True) for source in (drawn, texts))
            pairs = enumerate(zip(before, after, strict=True))
            moved = [place for place, (old, new) in pairs if old != new and not old[0].startswith(TURNS)]
            figures: dict[str, Any] = {"change": names[type(change)], "of": len(units), "rows": 0}
            if moved:
                content = drawn[moved] | {name: [column[place] for place in moved] for name, column in texts.items()}
                changed = datasets.Dataset.from_dict(content, features=drawn.features)
                figures |= self._changed_minds(places[moved], changed, ask)
            found.append(figures)
        return found

    def _changed_minds(self, rows: Indices, changed: datasets.Dataset, ask: Ask) -> dict[str, Any]:
        units, minds = np.unique(self.unit_of[rows]), []
        for kind in KINDS:
            new = self.logits[kind].clone()
            new[rows] = ask(kind, changed)
            same = self.judge.same(self.answers[kind], self.judge.answers(new))
            minds.append(1.0 - same[units].astype(np.float64))
        return {"rows": len(units), **self._beside(*minds, bounded=True)}

    def _beside(self, dense: NDArray[np.float64], pruned: NDArray[np.float64], *, bounded: bool) -> dict[str, Any]:
        # The margin of scores is none of the part of minds that have changed.
        asked = self.questions.test if bounded is self.judge.bounded else NonInferiority(alpha=self.questions.alpha)
        tested = not_worse(dense, pruned, asked, bounded)
        means = {"dense": float(dense.mean()), "pruned": float(pruned.mean())}
        return {**means, "difference": tested.difference, "interval": tested.interval}

    def changed(self) -> list[dict[str, Any]]:
        """Texts of units whose worth has changed, what lost first."""
        judge, lost = self.judge, self.worth["pruned"] - self.worth["dense"]
        found = []
        for unit in [int(unit) for unit in np.argsort(lost, kind="stable") if lost[unit] != 0][:_SHOWN]:
            if isinstance(judge, ClassJudge):
                labels = [*judge.labels, "no number"]
                told = {kind: labels[given[unit, 0]] for kind, given in self.answers.items()}
                told["truth"] = judge.labels[judge.references[unit]]
            else:
                told = {kind: f"{values[unit]:.3f}" for kind, values in self.worth.items()} | {"truth": ""}
            place = int(np.searchsorted(self.there, unit))
            found.append({"text": self.first_rows[place]["text"], **told, "lost": bool(lost[unit] < 0)})
        return found
