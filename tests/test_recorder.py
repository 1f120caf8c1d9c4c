"""The flight recorder: exact counts, a gapless table, the log, the plots, and warnings that come when they should."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir

from finllm_prune.errors import InputError
from finllm_prune.evaluation.plots import draw_record
from finllm_prune.families import find_family
from finllm_prune.pruning import (
    CRITERIA,
    Block,
    Criterion,
    Cubic,
    Global,
    Group,
    Magnitude,
    Movement,
    Neuron,
    Pruner,
    Rule,
    Site,
    Slot,
    Unstructured,
)
from finllm_prune.pruning.criteria import State, Step
from finllm_prune.recipe import parse
from finllm_prune.training import PruningTrainer, Recorder, Recording
from finllm_prune.training.recorder import SCHEMA
from finllm_prune.workfolder import close_work
from tests.conftest import tiny_model
from tests.pruning.runs import make_batches, make_optimizer, make_pruner, make_rule, train
from tests.test_trainer import RULES, rows, trainer

SPANS = Cubic(begin=0.1, end=0.7, freeze=0.9)
EACH_STEP = Recording(every=1 / 12)


def recorded(
    folder: Path, rules: list[Rule], settings: Recording = EACH_STEP, model: PreTrainedModel | None = None,
    callbacks: list[TrainerCallback] | None = None, fill: bool = False, **arguments: Any,
) -> tuple[PruningTrainer, Recorder]:  # fmt: skip
    model = model or tiny_model()
    plain = trainer(folder, None, model=model, **arguments)
    family = find_family("bert")
    pruner = Pruner(family.groups(model, rules), SPANS, family.whole_units(model, rules) if fill else [])
    run = PruningTrainer(
        model, plain.args, pruner=pruner, recording=settings, train_dataset=rows(), callbacks=callbacks
    )
    assert run.recorder is not None
    return run, run.recorder


class Stop(TrainerCallback):
    """Ends a run after its first step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = True


class Save(TrainerCallback):
    """Writes a checkpoint after the given steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


class Restless(Criterion):
    """A criterion whose order is another one at every step."""

    def start(self, group: Group) -> State:
        return {"scores": torch.rand(group.mask.shape)}

    def observe(self, group: Group, state: State, step: Step) -> None:
        state["scores"].uniform_()

    def score(self, group: Group, state: State) -> torch.Tensor:
        return state["scores"]


class Masks(TrainerCallback):
    """Counts the kept units of each layer after each step, by its own way."""

    def __init__(self) -> None:
        self.kept: list[list[int]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        layers = kwargs["model"].bert.encoder.layer
        self.kept.append([int(layer.intermediate.dense.weight.any(dim=1).sum()) for layer in layers])


def test_the_table_holds_the_densities_of_the_model_at_every_step(tmp_path: Path) -> None:
    masks = Masks()
    run, recorder = recorded(tmp_path, RULES["neuron"], callbacks=[masks])
    run.train()
    table = recorder.table().to_pandas()
    assert table.pivot(index="step", columns="layer", values="kept").to_numpy().tolist() == masks.kept
    assert (table["density"] == table["kept"] / 64).all()
    assert table["step"].tolist() == [step for step in range(1, 13) for _ in range(2)]
    assert table["frozen"].tolist() == [step / 12 >= 0.9 for step in table["step"]]
    assert (table["movement"] > 0).all()
    measured = table[~table["frozen"]]
    quantiles = measured[[name for name in table if name.startswith("score_q")]].to_numpy()
    assert (quantiles[:, 1:] > quantiles[:, :-1]).all()
    assert (measured["score_movement"] > 0).all()
    assert table[table["frozen"]]["score_q50"].isna().all(), "there are no scores any more"


def grid(pruned: list[bool]) -> torch.Tensor:
    return ~torch.tensor(pruned).view(3, 4)


@settings(max_examples=25)
@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=5))
def test_flips_are_counted_exactly(masks: list[list[bool]]) -> None:
    linear = nn.Linear(4, 3, bias=False)
    group = Group("layer", Rule("encoder", 0.5, criterion=Magnitude()), [Slot("w", linear.weight, Site("layer"))])
    recorder = Recorder(Pruner([group], Cubic(0.1, 0.7, 0.9)), Recording(every=1.0))
    args, control = TrainingArguments(), TrainerControl()
    recorder.on_train_begin(args, TrainerState(), control)
    before = [False] * 12
    for mask in masks:
        group.set_mask(grid(mask))
        recorder.on_step_end(args, TrainerState(global_step=7, max_steps=7), control)
        row = recorder.table().to_pylist()[-1]
        assert row["cut"] == sum(now and not was for was, now in zip(before, mask, strict=True))
        assert row["regrown"] == sum(was and not now for was, now in zip(before, mask, strict=True))
        assert row["churn"] == pytest.approx((row["cut"] + row["regrown"]) / 12)
        assert row["kept"] == 12 - sum(mask)
        before = mask


def test_movement_is_the_mean_over_the_weights_that_are_kept_at_both_ends() -> None:
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    group = Group("layer", Rule("encoder", 0.5, Unstructured(), Magnitude()), [Slot("w", linear.weight, Site("layer"))])
    recorder = Recorder(Pruner([group], Cubic(0.1, 0.7, 0.9)), Recording())
    recorder.on_train_begin(TrainingArguments(), TrainerState(), TrainerControl())
    linear.weight.data = torch.tensor([[0.0, 2.5, 2.0, 4.0]])  # the first one is cut
    recorder.on_step_end(TrainingArguments(), TrainerState(global_step=1, max_steps=1), TrainerControl())
    [row] = recorder.table().to_pylist()
    assert row["movement"] == pytest.approx(1.5 / 3)
    assert row["score_movement"] == pytest.approx((1.0 + 0.5 + 1.0 + 0.0) / 4)
    assert row["score_q50"] == 2.25


@pytest.mark.parametrize("fill", [False, True])
def test_a_resumed_run_has_the_table_of_an_undisturbed_one(tmp_path: Path, fill: bool) -> None:
    """Moments lie at 3, 6, 9 and 12, so that the checkpoints 4 and 11 fall between two of them."""
    every = Recording(every=0.25)
    whole, one = recorded(tmp_path / "whole", RULES["block"], every, callbacks=[Save([4, 11, 12])], fill=fill)
    whole.train()
    assert one.table().column("step").unique().to_pylist() == [3, 6, 9, 12]
    for step in (4, 11, 12):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed, other = recorded(
            tmp_path / "resumed", RULES["block"], every, fill=fill, resume_from_checkpoint=checkpoint
        )
        resumed.train(resume_from_checkpoint=checkpoint)
        assert other.table().equals(one.table())
        assert other.warnings == one.warnings


def test_filled_heads_and_neurons_take_the_place_of_their_matrices_in_the_table(tmp_path: Path) -> None:
    model = tiny_model()
    for block in model.bert.encoder.layer:
        block.output.dense.weight.data[:, :16] = 0.0
    rules = [Rule("mlp", 0.5, Block(8, 8), Magnitude())]
    run, recorder = recorded(tmp_path, rules, model=model, fill=True, learning_rate=1e-6, weight_decay=0.0)
    run.train()
    table = recorder.table().to_pandas()
    fine, whole = table[~table["frozen"]], table[table["frozen"]]
    assert fine["step"].unique().tolist() == list(range(1, 11))
    assert whole["step"].tolist() == [11, 11, 12, 12]
    assert fine["layer"].nunique() == 4
    assert whole["layer"].tolist() == ["bert.encoder.layer.0.mlp", "bert.encoder.layer.1.mlp"] * 2
    gone = 64 - whole["kept"].to_numpy()
    assert (gone >= 16).all(), "those that write nothing"
    assert whole["cut"].tolist() == [*gone[:2], 0, 0]
    assert whole["movement"].isna().tolist() == [True, True, False, False]
    assert whole["score_q50"].isna().all()
    assert [round(row["sparsity"], 6) for row in run.state.log_history if "sparsity" in row][-1] == gone[:2].mean() / 64
    recorder.save(tmp_path / "record.parquet")
    draw_record(tmp_path / "record.parquet", tmp_path / "plots")
    assert (tmp_path / "plots" / "scores.png").stat().st_size > 0


def test_the_parquet_file_says_what_its_columns_are(tmp_path: Path) -> None:
    run, recorder = recorded(tmp_path, RULES["neuron"], Recording(every=0.5))
    run.train()
    recorder.save(tmp_path / "recorder.parquet")
    table = pq.read_table(tmp_path / "recorder.parquet")
    assert table.equals(recorder.table())
    assert table.schema.equals(SCHEMA)
    assert all(len(field.metadata[b"description"]) > 10 for field in table.schema)
    assert pd.read_parquet(tmp_path / "recorder.parquet")["layer"].nunique() == 2


def test_the_log_holds_each_moment_once_in_five_numbers(tmp_path: Path) -> None:
    run, recorder = recorded(tmp_path, RULES["unstructured"], Recording(every=0.25), logging_steps=1)
    run.train()
    logged = {entry["step"]: entry for entry in run.state.log_history if "pruning/churn" in entry}
    assert list(logged) == [3, 6, 9, 12]
    table = recorder.table().to_pandas()
    for step, part in table.groupby("step"):
        ours = {key: value for key, value in logged[step].items() if key.startswith("pruning/")}
        assert len(ours) == (4 if step == 12 else 5), "no scores are left at the end"
        assert ours["pruning/density_min"] == part["density"].min()
        assert ours["pruning/churn"] == pytest.approx(part["churn"].mean())
        assert ours["pruning/regrown"] == pytest.approx((part["regrown"] / part["units"]).mean())


class Board(TensorBoardCallback):
    """transformers' own integration, which drops what is no number, with a writer that keeps what it is given."""

    def __init__(self) -> None:
        self.tb_writer: Any = self  # its own __init__ only asks for the tensorboard package
        self.logging_dir = ""
        self.scalars: dict[int, dict[str, float]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(step, {})[name] = value

    def add_text(self, *args: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_the_numbers_of_the_recorder_reach_a_logger_of_report_to(tmp_path: Path) -> None:
    board = Board()
    run, recorder = recorded(tmp_path, RULES["unstructured"], Recording(0.25, True), callbacks=[board], logging_steps=1)
    run.train()
    for row in recorder.table().to_pylist()[: 3 * len(recorder.pruner.groups)]:
        layer = {name: row[name] for name in ("density", "churn", "regrown", "movement", "score_movement", "score_q50")}
        told = {name: board.scalars[row["step"]].get(f"train/pruning/{row['layer']}/{name}") for name in layer}
        assert told == layer
    names = ["density_min", "churn", "regrown", "movement", "score_median"]
    for step in (3, 6, 9):
        ours = {name: board.scalars[step][f"train/pruning/{name}"] for name in names}
        ours["sparsity"] = board.scalars[step]["train/sparsity"]
        assert all(type(value) is float and math.isfinite(value) for value in ours.values()), ours
    for entry in run.state.log_history:
        logged = {f"train/{name}" for name in entry if name != "step"}
        assert logged <= board.scalars[entry["step"]].keys(), "none was dropped"


def test_what_tensorboard_wrote_outlives_the_checkpoints(tmp_path: Path) -> None:
    for phase in ("dense", "prune"):
        written = tmp_path / "checkpoints" / phase / default_logdir()
        written.mkdir(parents=True)
        (written.parents[1] / "checkpoint-3").mkdir()
        (written / "events").write_text(phase)
    close_work(tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.read_text() for path in sorted(tmp_path.glob("runs/*/*/events"))] == ["dense", "prune"]


def test_the_last_cut_of_a_run_that_ends_early_is_recorded(tmp_path: Path) -> None:
    run, recorder = recorded(tmp_path, RULES["neuron"], callbacks=[Stop()])
    run.train()
    table = recorder.table().to_pandas()
    assert table["step"].tolist() == [1, 1, 1, 1]
    assert table["frozen"].tolist() == [False, False, True, True]
    assert table["density"].tolist() == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("criterion", [Magnitude(), Movement()])
def test_scores_are_those_of_the_whole_weights_and_reading_them_changes_nothing(criterion: Any) -> None:
    model = tiny_model(layers=1)
    pruner = make_pruner(model, Rule("encoder", 0.6, criterion=criterion), schedule=SPANS)
    train(model, pruner, make_optimizer(model), make_batches(12), range(9))
    before, scores = pruner.state_dict(), pruner.scores()
    for group in pruner.groups:
        assert group.mask.float().mean() < 0.5
        assert scores[group.name].shape == group.mask.shape
        assert (scores[group.name] != 0).all(), "cut weights have a score too"
    assert before.keys() == pruner.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in pruner.state_dict().items())
    assert pruner.holds()
    pruner.finish()
    assert pruner.scores() == {}


class StopLate(TrainerCallback):
    """Ends a run after its eighth step, before the masks freeze."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 8


@pytest.mark.parametrize("settings", [None, EACH_STEP])
def test_the_best_weights_of_a_run_that_ends_early_get_no_values_of_its_last_step(
    tmp_path: Path, settings: Recording | None
) -> None:
    worse = itertools.count()
    plain = trainer(
        tmp_path, None, parts={"eval_dataset": rows(8)}, load_best_model_at_end=True,
        metric_for_best_model="worse", greater_is_better=False, eval_strategy="steps", eval_steps=4,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    model = plain.model
    pruner = Pruner(find_family("bert").groups(model, RULES["unstructured"]), SPANS)
    run = PruningTrainer(
        model, plain.args, pruner=pruner, recording=settings, train_dataset=rows(), eval_dataset=rows(8),
        compute_metrics=lambda _: {"worse": float(next(worse))}, callbacks=[StopLate()],
    )  # fmt: skip
    run.train()
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for group in pruner.groups:
        for slot in group.slots:
            assert torch.equal(slot.parameter.detach(), best[slot.name] * group.mask)


# Warnings


def without_gradient() -> PreTrainedModel:
    """A model whose head is frozen at zero: its encoder has gradients, all of them zero."""
    model = tiny_model()
    nn.init.zeros_(model.classifier.weight).requires_grad_(False)
    return model


@pytest.mark.parametrize("structure", ["neuron", "unstructured"])
def test_a_healthy_run_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture, structure: str) -> None:
    run, recorder = recorded(tmp_path, [make_rule(structure, "movement", "uniform")])
    run.train()
    assert recorder.warnings == {}
    assert [record for record in caplog.records if record.name.startswith("finllm_prune")] == []


def test_a_cut_that_does_not_start_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = [Rule("encoder", 0.5, criterion=Movement(initial=0.0))]
    run, recorder = recorded(tmp_path, rules, model=without_gradient())
    with pytest.raises(InputError, match="still equal at the end"):
        run.train()
    assert set(recorder.warnings) == {"start", "stall"}
    assert "58% of the sparsity of target encoder is due at 25% of the run" in recorder.warnings["start"]
    assert [caplog.messages.count(sentence) for sentence in recorder.warnings.values()] == [1, 1]


def test_a_run_that_ends_before_its_schedule_begins_is_told(tmp_path: Path) -> None:
    run, recorder = recorded(tmp_path, RULES["neuron"], callbacks=[Stop()])
    run.train()
    assert set(recorder.warnings) == {"start"}
    assert "the run ended at 8%, cutting begins at 10%" in recorder.warnings["start"]


def test_a_layer_that_collapses_is_told_once_even_over_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = [Rule("mlp", 0.5, criterion=Magnitude(), budget=Global())]

    def lopsided() -> PreTrainedModel:
        model = tiny_model()
        model.bert.encoder.layer[1].intermediate.dense.weight.data *= 1e-3
        return model

    quiet = {"learning_rate": 1e-6, "save_strategy": "steps", "save_steps": 6}
    run, recorder = recorded(tmp_path, rules, model=lopsided(), **quiet)
    run.train()
    assert set(recorder.warnings) == {"collapse"}
    assert "1 of 4 layers collapsed" in recorder.warnings["collapse"]
    assert "bert.encoder.layer.1.intermediate.dense keeps" in recorder.warnings["collapse"]
    checkpoint = str(tmp_path / "checkpoint-6")
    again, other = recorded(tmp_path, rules, model=lopsided(), **quiet, resume_from_checkpoint=checkpoint)
    again.train(resume_from_checkpoint=checkpoint)
    assert other.warnings == recorder.warnings
    assert caplog.messages.count(recorder.warnings["collapse"]) == 1


@pytest.mark.parametrize(("sparsity", "warned"), [(0.999, True), (0.75, False)])
def test_the_one_unit_left_is_told_where_the_rule_asked_for_something_else(
    tmp_path: Path, sparsity: float, warned: bool
) -> None:
    """0.75 asks for one of four heads; 0.999 asks for none."""
    run, recorder = recorded(tmp_path, [make_rule("head", "magnitude", "uniform", sparsity)])
    run.train()
    table = recorder.table().to_pandas()
    assert table["kept"].tolist()[-2:] == [1, 1]
    assert ("collapse" in recorder.warnings) == warned


def test_masks_that_still_churn_when_they_freeze_are_told(tmp_path: Path) -> None:
    run, recorder = recorded(tmp_path, [Rule("encoder", 0.75, criterion=Restless())])
    run.train()
    assert set(recorder.warnings) == {"churn"}
    table = recorder.table().to_pandas()
    frozen = table[table["step"] == table[table["frozen"]]["step"].min()]
    share = frozen["regrown"].sum() / frozen["kept"].sum()
    assert f"{share:.0%} of the kept units came back since 83% of the run" in recorder.warnings["churn"]


def test_scores_that_stand_still_are_told(tmp_path: Path) -> None:
    run, recorder = recorded(tmp_path, [Rule("mlp", 0.5, structure=Neuron())], model=without_gradient())
    run.train()
    assert set(recorder.warnings) == {"stall"}
    assert "2 of 2 layers" in recorder.warnings["stall"]
    assert "in 3 records up to step 3" in recorder.warnings["stall"]


def watched(criterion: Criterion, alive: float, steps: int = 400) -> dict[str, str]:
    """The warnings of a run of one layer whose gradients are zero from a part of it on."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 30, generator=generator))
    group = Group("layer", Rule("encoder", 0.5, criterion=criterion), [Slot("layer.weight", weight, Site("layer"))])
    pruner = Pruner([group], Cubic(begin=0.1))
    recorder = Recorder(pruner, Recording())
    args, control, state = TrainingArguments(), TrainerControl(), TrainerState(max_steps=steps)
    recorder.on_train_begin(args, state, control)
    for step in range(1, steps + 1):
        weight.grad = torch.randn(20, 30, generator=generator) * float(step <= alive * steps)
        pruner.before_step(step / steps)
        pruner.after_step()
        state.global_step = step
        recorder.on_step_end(args, state, control)
    return recorder.warnings


LEARN = [name for name in CRITERIA if name not in ("magnitude", "random")]


@pytest.mark.parametrize("criterion", LEARN)
def test_gradients_that_die_in_mid_run_are_told_though_the_scores_may_drift_on(criterion: str) -> None:
    assert "in 3 records up to step" in watched(CRITERIA[criterion](), alive=0.2)["stall"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_that_learns_to_the_end_or_never_does_not_stall(criterion: str) -> None:
    assert "stall" not in watched(CRITERIA[criterion](), alive=1.0)


# What is made of it


@pytest.mark.parametrize(("every", "callbacks"), [(1.0, []), (0.01, [Stop()])], ids=["no scores", "one step twice"])
def test_the_plots_are_drawn_from_the_file_however_short_the_run(
    tmp_path: Path, every: float, callbacks: list[TrainerCallback]
) -> None:
    run, recorder = recorded(tmp_path, RULES["neuron"], Recording(every=every), callbacks=callbacks)
    run.train()
    recorder.save(tmp_path / "recorder.parquet")
    draw_record(tmp_path / "recorder.parquet", tmp_path / "plots")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "plots").iterdir()}
    assert set(sizes) == {"density_over_steps.png", "churn.png", "scores.png"}
    assert min(sizes.values()) > 5000


RECIPE: dict[str, Any] = {
    "model": "some/model", "task": "sentiment", "output": "outputs/some",
    "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"), [({}, Recording()), ({"every": 0.1}, Recording(every=0.1)), (False, None), (None, None)]
)
def test_a_recipe_says_how_often_is_recorded(given: Any, expected: Recording | None) -> None:
    recipe = parse({**RECIPE, "recording": given})
    assert recipe.recording == expected
    assert parse(recipe.resolved).recording == expected
    assert parse(RECIPE).recording == Recording()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"every": 0.0}, "recording: every must be a part of the run, above 0 and at most 1, not 0.0"),
        ({"every": 1.5}, "recording: every must be a part of the run, above 0 and at most 1, not 1.5"),
        ({"evry": 0.1}, "recording.evry: unknown key; did you mean 'every'?"),
        (0.1, "recording: keys and values are expected here, not 0.1"),
    ],
)
def test_a_recipe_that_asks_for_no_interval_is_refused(given: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        parse({**RECIPE, "recording": given})
