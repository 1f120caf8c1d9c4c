"""Two models on every set of a suite."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.evaluation import Latency, compare, measure
from finllm_prune.evaluation.calibration import Calibration, calibration
from finllm_prune.evaluation.kept import Kept
from finllm_prune.evaluation.non_inferiority import NonInferiority, not_worse
from finllm_prune.evaluation.tax import tax
from finllm_prune.judges import Answers, ClassJudge, Indices, Judge
from finllm_prune.loading import OtherLabels
from finllm_prune.provenance import surroundings
from finllm_prune.saved import Saved
from finllm_prune.suite.perturbations import PERTURBATIONS
from finllm_prune.suite.report import SetResult, SuiteReport
from finllm_prune.suite.slices import slices
from finllm_prune.suite.suite import Entry, Suite
from finllm_prune.tasks import Examples

logger = logging.getLogger(__name__)

_SHOWN = 25  # flips with their texts
Ask = Callable[[Saved, datasets.Dataset], Tensor]


@dataclass(frozen=True)
class Match:
    """Two models that can answer the questions of a set."""

    entry: Entry
    examples: Examples
    judge: Judge
    dense: Saved
    pruned: Saved

    @property
    def rows(self) -> datasets.Dataset:
        return self.examples.splits["test"]

    @cached_property
    def unit_of(self) -> Indices:
        """The unit of each row, shape (rows,): a query has a row with each candidate; empty where it cannot be told."""
        texts = list(self.rows["text"]) if "text" in self.rows.column_names else []
        if len(texts) == len(self.judge):
            return np.arange(len(texts))
        unit = np.cumsum([row > 0 and text != texts[row - 1] for row, text in enumerate(texts)])
        return unit if len(texts) and unit[-1] + 1 == len(self.judge) else np.array([], dtype=np.int64)

    @property
    def first_rows(self) -> datasets.Dataset:
        """One row of each unit, in their order."""
        return self.rows.select(np.unique(self.unit_of, return_index=True)[1])


def evaluate_suite(
    suite: Suite, model: str, baseline: str, keep: Path | None = None, show_texts: bool = False
) -> SuiteReport:
    """Compare a pruned model with its dense one on all sets of a suite.

    Sets whose classes the baseline does not know are left out and named, unless the suite itself names models for them.

    Args:
        suite: what is asked.
        model, baseline: pruned and dense: folders of any format, or Hub ids.
        keep: where logits are kept, and taken from; None keeps none.
        show_texts: whether the result holds texts of the data, of units whose worth has changed.

    Raises:
        InputError: data or a model cannot be read, or no set is left; before anything is measured.
    """
    left_out: dict[str, str] = {}
    matches = []
    for number, entry in enumerate(suite.sets):
        try:
            matches.append(_match(entry, entry.model or model, entry.baseline or baseline))
        except OtherLabels as error:
            if entry.model is not None or entry.baseline is not None:
                raise InputError(f"sets.{number} ({entry.name}): {error}") from error
            left_out[entry.name] = str(error)
            logger.warning("%s is left out: %s.", entry.name, error)
        except InputError as error:
            raise InputError(f"sets.{number} ({entry.name}): {error}") from error
    if not matches:
        raise InputError(f"sets: none is left to measure; {next(iter(left_out.values()))}")
    measured = {
        "non_inferiority",
        "agreement",
        "latency_ratio",
        *(name for each in matches for name in each.judge.metrics),
    }
    for gate in suite.gates:
        if gate.removesuffix("_retention") not in measured:
            raise InputError(f"gates.{gate}: none of these sets measures it; remove the gate")
    kept = Kept(keep)

    def ask(saved: Saved, rows: datasets.Dataset) -> Tensor:
        return kept.logits(lambda: [saved.fingerprint(), rows.to_dict()], lambda: saved.logits(rows))

    results = []
    for match in matches:
        logger.info("%s: %s.", match.entry.name, match.examples.source)
        results.append(_measured(match, suite, ask, show_texts))
    return SuiteReport(
        sets=results,
        left_out=left_out,
        model=model,
        baseline=baseline,
        asked=suite.non_inferiority,
        gates=suite.gates,
        suite=suite.resolved,
        surroundings=surroundings("cpu"),
    )


def _match(entry: Entry, model: str, baseline: str) -> Match:
    examples = entry.task.load()
    dense = Saved(baseline, entry.task, examples)
    try:
        pruned = Saved(model, entry.task, examples)
    except OtherLabels as error:  # the baseline knows them: these two do not belong together
        raise InputError(str(error)) from error
    return Match(entry, examples, entry.task.judge(examples), dense, pruned)


def _measured(match: Match, suite: Suite, ask: Ask, show_texts: bool) -> SetResult:
    entry, judge = match.entry, match.judge
    logits = {kind: ask(saved, match.rows) for kind, saved in (("dense", match.dense), ("pruned", match.pruned))}
    answers = {kind: judge.answers(each) for kind, each in logits.items()}
    quality = compare(judge, **logits, seed=suite.seed, resamples=suite.resamples)
    asked = suite.non_inferiority if entry.margin is None else replace(suite.non_inferiority, margin=entry.margin)
    return SetResult(
        name=entry.name,
        task=type(entry.task).__module__.rpartition(".")[2],
        model=match.pruned.name,
        baseline=match.dense.name,
        source=match.examples.source,
        fingerprint=match.examples.fingerprint(),
        units=len(judge),
        unit=judge.unit,
        headline=_headline(judge, answers),
        quality=quality,
        tested=not_worse(judge.worth(answers["dense"]), judge.worth(answers["pruned"]), asked),
        calibration=_calibration(judge, logits, suite.bins),
        tax=tax(quality, judge, **answers, seed=suite.seed, resamples=suite.resamples),
        slices=_slices(match, answers, asked) if len(match.unit_of) else [],
        robustness=_robustness(match, logits, answers, ask, asked, suite.seed) if len(match.unit_of) else [],
        latency=_latency(match, suite),
        published=[asdict(each) for each in entry.published],
        changed=_changed(match, answers) if show_texts and len(match.unit_of) else None,
    )


def _headline(judge: Judge, answers: dict[str, Answers]) -> str:
    """The metric that is the mean worth of the units, by its name."""
    means = {kind: judge.worth(given).mean() for kind, given in answers.items()}
    for name in judge.metrics:
        if all(abs(judge.value(name, given) - means[kind]) < 1e-9 for kind, given in answers.items()):
            return name
    return "worth"


def _calibration(judge: Judge, logits: dict[str, Tensor], bins: int) -> dict[str, Calibration] | None:
    if not isinstance(judge, ClassJudge):
        return None
    return {kind: calibration(each, judge.references, bins) for kind, each in logits.items()}


def _slices(match: Match, answers: dict[str, Answers], asked: NonInferiority) -> list[dict[str, Any]]:
    dense, pruned = (match.judge.worth(given) for given in answers.values())
    return [
        {"by": by, "part": part, "units": len(units), **_beside(dense[units], pruned[units], asked)}
        for by, parts in slices(match.entry.slices, match.first_rows).items()
        for part, units in parts.items()
    ]


def _robustness(
    match: Match, logits: dict[str, Tensor], answers: dict[str, Answers], ask: Ask, asked: NonInferiority, seed: int
) -> list[dict[str, Any]]:
    """How often each model changes its mind when texts change a little; only those that do change are asked again."""
    names = {cls: name for name, cls in PERTURBATIONS.items()}
    found: list[dict[str, Any]] = []
    for change in match.entry.perturbations:
        texts = change(match.rows, seed)
        rows = np.array([row for row, text in enumerate(match.rows["text"]) if text != texts[row]], dtype=int)
        units = np.unique(match.unit_of[rows])
        figures: dict[str, Any] = {"change": names[type(change)], "rows": len(units)}
        if len(rows):
            changed = match.rows.select(rows).remove_columns("text").add_column("text", [texts[row] for row in rows])
            moved: list[NDArray[np.float64]] = []
            for kind, saved in (("dense", match.dense), ("pruned", match.pruned)):
                new = logits[kind].clone()
                new[rows] = ask(saved, changed)
                same = match.judge.same(answers[kind], match.judge.answers(new))
                moved.append(1.0 - same[units].astype(np.float64))
            figures |= _beside(moved[0], moved[1], asked)
        found.append(figures)
    return found


def _beside(dense: NDArray[np.float64], pruned: NDArray[np.float64], asked: NonInferiority) -> dict[str, Any]:
    tested = not_worse(dense, pruned, asked)
    means = {"dense": float(dense.mean()), "pruned": float(pruned.mean())}
    return {**means, "difference": tested.difference, "interval": tested.interval}


def _latency(match: Match, suite: Suite) -> Latency | None:
    if suite.speed is None:
        return None
    ids = match.entry.task.tokenize(match.rows, match.dense.tokenizer)["input_ids"]
    lengths = [len(part) for row in ids for part in (row if row and isinstance(row[0], list) else [row])]
    models = (match.dense, match.pruned)
    return measure(
        match.dense.model, match.pruned.model, suite.speed.batch, int(np.median(lengths)), suite.speed.rounds,
        vocabulary=min(saved.config.vocab_size for saved in models),
    )  # fmt: skip


def _changed(match: Match, answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """Texts of units whose worth has changed, what lost first."""
    judge, rows = match.judge, match.first_rows
    worth = {kind: judge.worth(given) for kind, given in answers.items()}
    lost = worth["pruned"] - worth["dense"]
    found = []
    for unit in [int(unit) for unit in np.argsort(lost, kind="stable") if lost[unit] != 0][:_SHOWN]:
        if isinstance(judge, ClassJudge):
            told = {kind: judge.labels[given[unit, 0]] for kind, given in answers.items()}
            told["truth"] = judge.labels[judge.references[unit]]
        else:
            told = {kind: f"{values[unit]:.3f}" for kind, values in worth.items()} | {"truth": ""}
        found.append({"text": rows[unit]["text"], **told, "lost": bool(lost[unit] < 0)})
    return found
