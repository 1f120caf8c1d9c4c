"""The flight recorder: what pruning did to each layer over a run, as a table, in the Trainer's log, and watched.

A *moment* is one row per layer (a group of the Pruner) and holds what happened since the moment before. Between the moments
nothing is computed and nothing waits for the device. What describes many values (scores, weights) comes from a strided
sample of about 4,096 per matrix; what is counted (masks) is counted exactly.
"""

import itertools
import logging
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.pruning import Group, Pruner, here, mesh_of, sampled, split_mesh, total
from finllm_prune.training.beside import load_beside, save_beside
from finllm_prune.training.watch import Moment, watch

logger = logging.getLogger(__name__)

RECORD_FILE = "recorder.parquet"
_STATE_FILE = "recorder.safetensors"
_SAMPLE = 4096
_QUANTILES = {"score_q05": 0.05, "score_q25": 0.25, "score_q50": 0.5, "score_q75": 0.75, "score_q95": 0.95}
_COLUMNS: list[tuple[str, pa.DataType, str]] = [
    ("layer", pa.string(), "name of the group of weights that share one mask"),
    ("step", pa.int64(), "optimizer steps done; twice the same only where a run ended before its masks were frozen"),
    ("progress", pa.float64(), "part of the run that is done, 0 to 1"),
    ("frozen", pa.bool_(), "whether the masks are final"),
    ("units", pa.int64(), "units (weights, blocks, neurons, heads) of the layer"),
    ("kept", pa.int64(), "units that are kept now"),
    ("density", pa.float64(), "kept / units"),
    ("cut", pa.int64(), "units that are cut now and were kept at the moment before"),
    ("regrown", pa.int64(), "units that are kept now and were cut at the moment before"),
    ("churn", pa.float64(), "(cut + regrown) / units"),
    ("movement", pa.float64(), "mean |w - w at the moment before| of the weights that are kept at both (sample)"),
    ("score_movement", pa.float64(), "mean |score - score at the moment before| (sample); null once frozen"),
    ("learning", pa.float64(), "change of what gradients have taught, by its spread (sample); null where they teach nothing"),
    *((name, pa.float64(), f"{q:.0%} quantile of the scores (sample); null once frozen") for name, q in _QUANTILES.items()),
]  # fmt: skip
SCHEMA = pa.schema([pa.field(name, kind, metadata={"description": text}) for name, kind, text in _COLUMNS])
_NUMBERS = SCHEMA.names[1:]
_MEASURED = ["movement", "learning", "score_movement", *_QUANTILES]


@dataclass(frozen=True)
class Recording:
    """What the flight recorder is asked for.

    Args:
        every: a moment is recorded every this part of the run (and at its end), as the Trainer's ``logging_steps``.
        layers: whether the Trainer's loggers are told of each layer too, as ``pruning/<layer>/density`` and so on; the table
            has them anyway.
    """

    every: float = 0.02
    layers: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.every <= 1:
            raise InputError(f"recording: every must be a part of the run, above 0 and at most 1, not {self.every}")


class Recorder(TrainerCallback):
    """Records a Pruner on the first rank (on all, where the model is split among them).

    The state beside each checkpoint makes the table of a resumed run gapless. The recorder must come before the callback that
    carries the Pruner's steps: that a checkpoint is complete is told by the Pruner's file, so this one has to lie there first.

    What recovery does on the small model is not recorded: no mask changes there.

    Attributes:
        moments: per moment, one row of numbers per group of the Pruner, in its order; NaN where nothing can be measured.
            Where the masks are filled, the groups are others from the freeze on, and so are the rows.
        warnings: kind -> sentence, each said once.
    """

    def __init__(self, pruner: Pruner, settings: Recording):
        self.pruner = pruner
        self.settings = settings
        self.moments: list[Moment] = []
        self.warnings: dict[str, str] = {}
        self._split = False
        self._before: dict[str, Tensor] = {}
        self._news: dict[str, float] = {}

    def table(self) -> pa.Table:
        """All moments, with ``SCHEMA``, whose fields carry a description."""
        rows = [
            {**row, "layer": group.name}
            for moment in self.moments
            for group, row in zip(self._groups(moment), moment, strict=True)
        ]
        columns = [pa.array([row[field.name] for row in rows], from_pandas=True).cast(field.type) for field in SCHEMA]
        return pa.Table.from_arrays(columns, schema=SCHEMA)

    def save(self, path: Path) -> None:
        """Write the table as Parquet."""
        pq.write_table(self.table(), path)

    def news(self) -> dict[str, float]:
        """The last moment in a few numbers, for the log; empty if they were asked for already."""
        news, self._news = self._news, {}
        return news

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.moments, self.warnings = [], {}
        model = kwargs.get("model")
        self._split = model is not None and split_mesh(model) is not None
        if model is not None and self._split:
            self.pruner.follow(model)
        if state.global_step == 0:
            self._before = self._look()
            return
        saved = load_beside(args, state, _STATE_FILE, model)
        rows = [dict(zip(_NUMBERS, row, strict=True)) for row in saved.pop("rows").tolist()]
        for _, moment in itertools.groupby(rows, lambda row: (row["step"], row["frozen"])):
            self.moments.append(list(moment))
            self.warnings = self._watch() | self.warnings
        self._before = saved

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        interval = max(1, math.ceil(self.settings.every * state.max_steps))
        looks = state.is_world_process_zero or self._split
        if looks and (state.global_step % interval == 0 or state.global_step == state.max_steps):
            self._record(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        save_beside(args, state, _STATE_FILE, self._saved, self._split)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run that ends before `freeze` makes its last cut here, which belongs to the record.
        self.pruner.finish(replaced=args.load_best_model_at_end)
        if not (state.is_world_process_zero or self._split):
            return
        last = self.moments[-1][0] if self.moments else {"step": 0, "frozen": False}
        if (last["step"], last["frozen"]) != (state.global_step, self.pruner.frozen):
            self._record(state)

    def _saved(self) -> dict[str, Tensor]:
        rows = [[row[name] for name in _NUMBERS] for moment in self.moments for row in moment]
        return self._before | {"rows": torch.tensor(rows, dtype=torch.float64)}

    @torch.no_grad()
    def _look(self) -> dict[str, Tensor]:
        """Masks and samples as they are now, under the group's name; they are copies."""
        grids = {"scores": self.pruner.scores(), "learned": self.pruner.learned()}
        seen: dict[str, Tensor] = {}
        for group in self.pruner.groups:
            for kind, found in grids.items():
                if group.name in found:
                    grid = found[group.name]
                    split = group.split if grid.shape == group.mask.shape else None
                    seen[f"{group.name}/{kind}"] = sampled(grid, split, _SAMPLE)
            seen[f"{group.name}/mask"] = group.spread(group.mask.clone())
            parts = [sampled(slot.effective, slot.split, _SAMPLE) for slot in group.matrices]
            seen[f"{group.name}/weights"] = torch.cat(parts)
        return seen

    def _record(self, state: TrainerState) -> None:
        step = state.global_step
        before, now = self._before, self._look()
        pairs = [_compare(group.name, before, now) for group in self.pruner.groups]
        counts, values = (torch.stack(parts).tolist() for parts in zip(*pairs, strict=True))
        moment: Moment = []
        for group, (kept, cut, regrown), measured in zip(self.pruner.groups, counts, values, strict=True):
            units = group.units
            row = {
                "step": step, "progress": self.pruner.progress, "frozen": self.pruner.frozen, "units": units, "kept": kept,
                "density": kept / units, "cut": cut, "regrown": regrown, "churn": (cut + regrown) / units,
                **dict(zip(_MEASURED, measured, strict=True)),
            }  # fmt: skip
            moment.append({name: float(value) for name, value in row.items()})
        self.moments.append(moment)
        self._before, self._news = now, _summary(moment)
        for group, row in zip(self.pruner.groups, moment, strict=True) if self.settings.layers else ():
            logged = {
                name: row[name] for name in ("density", "churn", "regrown", *_MEASURED) if not math.isnan(row[name])
            }
            self._news |= {f"pruning/{group.name}/{name}": value for name, value in logged.items()}
        for kind, sentence in self._watch().items():
            if kind not in self.warnings:
                self.warnings[kind] = sentence
                if state.is_world_process_zero:
                    logger.warning("%s", sentence)

    def _watch(self) -> dict[str, str]:
        groups = self._groups(self.moments[-1])
        alike = [moment for moment in self.moments if self._groups(moment) is groups]
        return watch(alike, groups, self.pruner.schedule)

    def _groups(self, moment: Moment) -> list[Group]:
        """What the rows of a moment stand for."""
        return self.pruner.stages[bool(moment[0]["frozen"])]


def _compare(name: str, before: dict[str, Tensor], now: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What one layer did: (kept, cut, regrown), and the measured columns of a row; both stay on the device."""
    found = now[f"{name}/mask"]
    mask = here(found)
    device = mask.device
    # A layer of filled heads or neurons begins whole, when the masks freeze; how it moved until then is not known.
    was = here(before.get(f"{name}/mask", torch.ones_like(mask))).to(device)
    counts = torch.stack([grid.count_nonzero() for grid in (mask, was & ~mask, mask & ~was)])
    counts = total(counts, mesh_of([found]))
    weights = now[f"{name}/weights"].to(device)
    old = before.get(f"{name}/weights", torch.full_like(weights, math.nan)).to(device)
    kept = (weights != 0) & (old != 0)  # a cut weight is an exact zero
    movement = ((weights - old).abs() * kept).sum() / kept.sum()
    moved = torch.stack([movement, _learning(name, before, now)])
    scores = now.get(f"{name}/scores")
    if scores is None:
        return counts, torch.cat([moved, weights.new_full((1 + len(_QUANTILES),), math.nan)])
    score_movement = (scores - before[f"{name}/scores"].to(device)).abs().mean()
    quantiles = scores.quantile(scores.new_tensor(list(_QUANTILES.values())))
    return counts, torch.cat([moved, score_movement.view(1), quantiles])


def _learning(name: str, before: dict[str, Tensor], now: dict[str, Tensor]) -> Tensor:
    """The change of what a criterion has learned, by its spread; where all of it has only faded alike, nothing has changed."""
    learned, was = now.get(f"{name}/learned"), before.get(f"{name}/learned")
    if learned is None or was is None:
        return now[f"{name}/weights"].new_tensor(math.nan)
    learned, was = ((values / values.abs().mean()).nan_to_num(0.0) for values in (learned, was.to(learned.device)))
    low, high = learned.quantile(learned.new_tensor([0.05, 0.95]))
    change: Tensor = ((learned - was).abs().mean() / (high - low)).nan_to_num(0.0)
    return change


def _summary(moment: Moment) -> dict[str, float]:
    """A moment in the keys of the log: means over layers, whose units may be weights here and heads there."""
    news = {
        "pruning/density_min": [min(row["density"] for row in moment)],
        "pruning/churn": [row["churn"] for row in moment],
        "pruning/regrown": [row["regrown"] / row["units"] for row in moment],
        "pruning/movement": [row["movement"] for row in moment],
        "pruning/score_median": [row["score_q50"] for row in moment],
    }
    measured = {key: [value for value in values if not math.isnan(value)] for key, values in news.items()}
    return {key: statistics.fmean(values) for key, values in measured.items() if values}
