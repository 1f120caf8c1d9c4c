"""Two models on every set of a suite."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.evaluation import Latency, compare, measure
from finllm_prune.evaluation.evidence import Questions, collect
from finllm_prune.evaluation.kept import Kept
from finllm_prune.evaluation.perturbations import refuse_unusable
from finllm_prune.evaluation.quality import refuse_one_unit
from finllm_prune.judges import Judge
from finllm_prune.loading import OtherLabels
from finllm_prune.provenance import surroundings
from finllm_prune.saved import Saved
from finllm_prune.suite.report import SetResult, SuiteReport
from finllm_prune.suite.suite import Entry, Suite
from finllm_prune.tasks import Examples

logger = logging.getLogger(__name__)

Ask = Callable[[Saved, datasets.Dataset], Tensor]


@dataclass(frozen=True)
class Match:
    """Two models that can answer the questions of a set."""

    entry: Entry
    examples: Examples
    judge: Judge
    dense: Saved
    pruned: Saved


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
    if keep is not None and keep.exists() and not keep.is_dir():
        raise InputError(f"--keep: {keep} is a file; name a folder")
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
    judge = entry.task.judge(examples)
    refuse_one_unit(judge)
    refuse_unusable(entry.perturbations, examples.splits["test"])
    return Match(entry, examples, judge, dense, pruned)


def _measured(match: Match, suite: Suite, ask: Ask, show_texts: bool) -> SetResult:
    entry, judge, rows = match.entry, match.judge, match.examples.splits["test"]
    models = {"dense": match.dense, "pruned": match.pruned}
    logits = {kind: ask(saved, rows) for kind, saved in models.items()}
    quality = compare(judge, **logits, seed=suite.seed, resamples=suite.resamples)
    asked = suite.non_inferiority if entry.margin is None else replace(suite.non_inferiority, margin=entry.margin)
    evidence = collect(
        judge, rows, logits, quality, lambda kind, rows: ask(models[kind], rows),
        Questions(asked.margin, asked.alpha, entry.slices, entry.perturbations, None, suite.bins, show_texts),
        suite.seed, suite.resamples,
    )  # fmt: skip
    return SetResult(
        name=entry.name,
        task=type(entry.task).__module__.rpartition(".")[2],
        model=match.pruned.name,
        baseline=match.dense.name,
        source=match.examples.source,
        fingerprint=match.examples.fingerprint(),
        data=match.examples.facts,
        units=evidence.units,
        unit=evidence.unit,
        headline=evidence.headline,
        quality=quality,
        tested=evidence.tested,
        calibration=evidence.calibration,
        tax=evidence.tax,
        slices=evidence.slices,
        robustness=evidence.robustness,
        latency=_latency(match, suite),
        published=[asdict(each) for each in entry.published],
        changed=evidence.changed,
    )


def _latency(match: Match, suite: Suite) -> Latency | None:
    if suite.speed is None:
        return None
    ids = match.entry.task.tokenize(match.examples.splits["test"], match.dense.tokenizer)["input_ids"]
    lengths = [len(part) for row in ids for part in (row if row and isinstance(row[0], list) else [row])]
    models = (match.dense, match.pruned)
    return measure(
        match.dense.model, match.pruned.model, suite.speed.batch, int(np.median(lengths)), suite.speed.rounds,
        vocabulary=min(saved.config.vocab_size for saved in models),
    )  # fmt: skip
