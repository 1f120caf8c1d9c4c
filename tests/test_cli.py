"""The command line: exit codes, one line for every error, and what lies on disk afterwards."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import finllm_prune
from finllm_prune.checkpoints import FORMATS
from finllm_prune.cli import main
from finllm_prune.training.trainer import STATE_FILE
from tests import small
from tests.conftest import LABELS, Call, tiny_model


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    small.few_resamples(monkeypatch)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a model, data and a recipe that trains them in two seconds; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model(layers=1, seed=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    small.write_folder(folder / "data")
    recipe = {
        "model": str(folder / "model"),
        "task": {"name": "sentiment", "dataset": str(folder / "data"), "max_length": 32},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "movement", "sparsity": 0.5}]},
        "dense": {"training": {"max_steps": 12, "learning_rate": 1e-2}},
        "training": {
            "max_steps": 6, "learning_rate": 2e-3, "per_device_train_batch_size": 24, "use_cpu": True, "disable_tqdm": True,
        },
        "gates": {"agreement": 0.2},
        "output": str(folder / "out"),
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> Iterator[Path]:
    """The output of a complete run, for reading."""
    with pytest.MonkeyPatch.context() as patch:
        small.few_resamples(patch)
        patch.setattr(sys, "argv", ["finllm-prune", "run", str(home / "mine.yaml")])
        with pytest.raises(SystemExit) as left:
            main()
    assert not left.value.code
    before = contents(home / "out")
    yield home / "out"
    assert contents(home / "out") == before, "evaluate, inspect and verify only read"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def report(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return figures


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr holds: one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_version_and_help(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"finllm-prune {finllm_prune.__version__}\n"
    assert call("--help") == 0
    shown = capsys.readouterr().out
    commands = (
        "run", "plan", "evaluate", "inspect", "verify", "export", "delta", "trim", "card", "report", "sweep", "push",
        "pull-and-compare",
    )  # fmt: skip
    assert all(command in shown for command in commands)
    for command in commands:
        assert call(command, "--help") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"finllm-prune {command}" in shown
        assert command != "export" or all(f" {name} " in shown for name in FORMATS)


def test_a_run_writes_a_complete_output(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "dense", "masked", "compact", "plots", "README.md", "recorder.parquet", "report.json", "report.html", "flips.json",
        "recipe.yaml"
    }  # fmt: skip
    assert [path.name for path in finished.parent.iterdir() if path.name.startswith("out")] == ["out"]
    figures = report(finished)
    for metric in ("accuracy", "macro_f1", "mcc"):
        assert set(figures[metric]) >= {"dense", "pruned"}
        assert figures[metric]["dense"] > 0
    assert {"macro_f1_retention", "agreement", "sparsity", "bytes", "latency_ratio", "gates", "seed"} <= set(figures)
    assert figures["gates"]["agreement"]["passed"] is True
    assert figures["sparsity"]["targeted"] == 0.5
    card = (finished / "README.md").read_text()
    for name in ("masked", "compact"):
        assert (finished / name / "README.md").read_text() == card
    assert {path.suffix for path in (finished / "plots").iterdir()} == {".png"}
    table = pq.read_table(finished / "recorder.parquet").to_pandas()
    assert table["density"].iloc[-1] == 0.5
    assert len(table) == 6, "a row a step: the run has six steps and one layer"
    for name in ("density_over_steps", "churn", "scores"):
        assert f"(plots/{name}.png)" in card
        assert (finished / "masked" / "plots" / f"{name}.png").is_file()
    assert figures["skipped_steps"] == 0
    assert "skipped" not in card
    assert all(warning in card for warning in figures["warnings"])
    assert "nothing was found" in card or figures["warnings"]


def test_rows_that_a_run_left_out_lie_beside_its_report(call: Call, home: Path, tmp_path: Path) -> None:
    data = shutil.copytree(home / "data", tmp_path / "data")
    small.write_jsonl(
        data / "test.jsonl", [*small.rows("test"), *({"text": " ", "label": "neutral"} for _ in range(7))]
    )
    asked = [f"task.dataset={data}", "task.bad_rows=skip", f"output={tmp_path / 'out'}", "evidence=false"]
    assert call("run", home / "mine.yaml", *asked) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    begin = len(small.rows("test")) + 1
    assert lines == [
        {"file": str(data / "test.jsonl"), "split": "test", "kind": "no text", "line": begin + i} for i in range(7)
    ]
    figures = report(tmp_path / "out")
    assert figures["data"]["bad_rows"] == {"test": {"no text": 7}}
    assert not any("left_out" in key for key in figures["data"]), "the report counts, the file names"


def test_evaluate_measures_a_model(
    call: Call, home: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    assert (
        call("evaluate", finished / "compact", "--task", "sentiment", "--dataset", home / "data", "--json", target) == 0
    )
    figures, expected = json.loads(target.read_text()), report(finished)
    shown = capsys.readouterr().out
    for metric in ("accuracy", "macro_f1", "mcc"):
        assert figures[metric]["value"] == pytest.approx(expected[metric]["pruned"])
        assert f"{expected[metric]['pruned']:.3f}" in shown


def test_evaluate_holds_a_model_against_its_baseline(
    call: Call, home: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, expected = tmp_path / "figures.json", report(finished)
    models = (finished / "compact", "--baseline", finished / "dense")
    assert call("evaluate", *models, "--dataset", home / "data", "--json", target) == 0
    figures = json.loads(target.read_text())
    assert figures["agreement"] == expected["agreement"]
    assert figures["flips"] == expected["flips"]
    assert list(figures["per_class"]) == LABELS
    for metric in ("accuracy", "macro_f1", "mcc"):
        for kind in ("dense", "pruned"):
            assert figures["metrics"][metric][kind] == pytest.approx(expected[metric][kind])
    shown = capsys.readouterr().out
    assert "agreement" in shown
    assert "McNemar" in shown


def test_evaluate_on_the_embedded_data(call: Call, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", finished / "masked", "--dataset", "builtin") == 0
    shown = " ".join(capsys.readouterr().out.split())  # a title wraps by the length of its path
    assert "on builtin" in shown
    assert all(metric in shown for metric in ("accuracy", "macro_f1", "mcc"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("absent",), "absent"),
        (("{out}/compact", "--dataset", "/no/such/folder"), "/no/such/folder"),
        (("{out}/compact", "--task", "ner"), "unknown task 'ner'"),
        (("{out}/compact", "--baseline", "{out}/plots"), "holds no config.json"),
    ],
)
def test_evaluate_refuses_what_it_cannot_read(
    call: Call, finished: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert call("evaluate", *(argument.format(out=finished) for argument in arguments)) == 2
    assert expected in error_line(capsys)


def test_inspect_shows_every_layer_with_its_sparsity(
    call: Call, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(name: str) -> list[str]:
        assert call("inspect", finished / name) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "%" in line]

    masked, compact = lines("masked"), lines("compact")
    assert len(masked) == len(compact) == 6 + 1, "six matrices of one block, and their sum"
    assert sum("64 × 32" in line and "50.0%" in line for line in masked) == 1
    assert sum("32 × 64" in line and "50.0%" in line for line in masked) == 1
    assert all("32 × 32" in line and "0.0%" in line for line in compact[:-1])
    assert "8,192 weights" in masked[-1]
    assert "25.0%" in masked[-1]
    assert "6,144 weights" in compact[-1]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [(True, "model.safetensors is missing or is not the file"), (False, "damaged: its weights cannot be loaded")],
)
def test_inspect_of_damaged_weights_is_one_line(
    call: Call, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: bool, message: str
) -> None:
    shutil.copytree(finished / "masked", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not a model")
    if not manifest:
        (tmp_path / "damaged" / "finllm_prune.json").unlink()
    assert call("inspect", tmp_path / "damaged") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_json_file_in_a_folder_that_does_not_exist_is_told_before_the_evaluation(
    call: Call, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", finished / "masked", "--json", tmp_path / "none" / "figures.json") == 2
    assert "make it first" in capsys.readouterr().err
    assert call("evaluate", finished / "masked", "--json", tmp_path) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


def test_verify_proves_what_a_run_wrote(call: Call, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", finished / "masked") == 0
    [masked] = capsys.readouterr().out.splitlines()
    assert "masked: masked checkpoint holds: hashes" in masked
    assert call("verify", finished) == 0
    compact, again = capsys.readouterr().out.splitlines()
    assert "compact: compact checkpoint holds: hashes" in compact
    assert again == masked


def test_verify_stops_at_the_first_that_does_not_hold(
    call: Call, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "masked" / "model.safetensors").unlink()
    assert call("verify", tmp_path / "out") == 4
    shown = capsys.readouterr()
    assert "compact checkpoint holds" in shown.out
    [line] = shown.err.splitlines()
    assert line.startswith("Proof failed: ")
    assert "masked/model.safetensors is missing" in line


def test_verify_finds_a_changed_weight(
    call: Call, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "compact"
    copy.mkdir()
    for name, data in contents(finished / "compact").items():
        if "/" not in name:
            (copy / name).write_bytes(data)
    assert call("verify", copy) == 0
    capsys.readouterr()
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert call("verify", copy) == 4
    line = error_line(capsys)
    assert line.startswith("Proof failed: ")
    assert "model.safetensors" in line


def test_verify_wants_an_exported_folder(call: Call, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", finished / "dense") == 2
    assert "it is not a checkpoint that finllm-prune exported" in error_line(capsys)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rat=1", "training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("pruning.schedule={name: cubic, begin: 0.8}", "begin=0.8, end=0.5"),
        ("pruning.rules.0.target=mpl", "structure neuron exists in target mlp only, not in mpl; set target: mlp"),
        ("task.dataset=/no/such/folder", "there is no folder '/no/such/folder'"),
        ("task.text_column=sentence", "there is no column 'sentence' (task.text_column)"),
        ("task.labels=[good, bad]", "has the unknown label 'positive'"),
        ("training.eval_strategy=never", "never is not a valid IntervalStrategy"),
        ("model.keep_layers=[3]", "model.keep_layers: [3] must name blocks of this model"),
        ("distillation.teacher={home}/data", "holds no config.json"),
        ("export=['[/red]']", "export: unknown format '[/red]'; known: masked, "),
        ("task.text_column='[bold]'", "there is no column '[bold]' (task.text_column)"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    call: Call, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    changes = [override.replace("{home}", str(home)), f"output={tmp_path / 'out'}"]
    assert call("run", home / "mine.yaml", *changes) == 2
    line = error_line(capsys)
    assert line.startswith("Error: ")
    assert expected in line
    assert list(tmp_path.iterdir()) == []


def test_a_bad_recipe_names_its_file(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: x\ntask: sentiment\npruning: {rules: [{target: mlp, sparsity: 2}]}\noutput: out\n")
    assert call("run", path) == 2
    assert error_line(capsys).startswith(f"Error: {path}: pruning.rules: sparsity must lie between 0 and 1")
    assert call("run", tmp_path / "absent.yaml") == 2
    assert error_line(capsys) == f"Error: {tmp_path / 'absent.yaml'}: there is no such recipe"


def test_a_failed_gate_is_told_after_everything_is_written(
    call: Call, home: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And nothing is pushed: the Hub is out of reach here, which would be another exit code."""
    monkeypatch.setenv("HF_TOKEN", "one")
    out = tmp_path / "out"
    changes = [
        "hub=org/name",
        "gates={agreement: 1.1, macro_f1: 0.0}",
        f"dense.checkpoint={finished / 'dense'}",
        f"output={out}",
    ]
    assert call("run", home / "mine.yaml", *changes) == 3
    assert "A gate failed" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}
    figures = report(out)
    assert [gate["passed"] for gate in figures["gates"].values()] == [False, True]
    assert figures["passed"] is False
    for card in (out / "README.md", out / "compact" / "README.md"):
        assert "FAILED gates: agreement." in card.read_text()
    assert call("verify", out / "compact") == 0


def test_a_collapsed_model_is_never_a_success(
    call: Call, home: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    changes = [
        "pruning.rules=[{target: encoder, criterion: random, sparsity: 0.98}]", "export=[masked]", "gates={}",
        "distillation=null", "training.max_steps=1", "training.learning_rate=0.5", "recording=false", f"output={out}",
        f"dense.checkpoint={finished / 'dense'}",
    ]  # fmt: skip
    assert call("run", home / "mine.yaml", *changes) == 3
    assert report(out)["collapsed"] is True
    assert "it gives every text the same answer" in capsys.readouterr().out
    card = (out / "masked" / "README.md").read_text()
    assert "COLLAPSED" in card
    assert "on the way" not in card, "nothing was recorded"
    assert not (out / "recorder.parquet").exists()


def test_an_existing_output_is_kept_until_it_is_to_be_replaced(
    call: Call, home: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    changes = [f"dense.checkpoint={finished / 'dense'}", "training.max_steps=2", f"output={out}"]
    out.mkdir()
    (out / "thesis.txt").write_text("ten years of work")
    assert call("run", home / "mine.yaml", *changes) == 2
    line = error_line(capsys)
    assert str(out) in line
    assert "is not the output of a run" in line
    assert call("run", home / "mine.yaml", *changes, "--overwrite") == 2, "not even with --overwrite"
    assert contents(tmp_path) == {"out/thesis.txt": b"ten years of work"}
    shutil.rmtree(out)
    shutil.copytree(finished, out)
    before = contents(out)
    capsys.readouterr()
    assert call("run", home / "mine.yaml", *changes) == 2
    assert "--overwrite" in error_line(capsys)
    assert call("run", home / "mine.yaml", *changes, "pruning.rules.0.target=mpl", "--overwrite") == 2
    assert contents(out) == before, "--overwrite waits for a complete run"
    assert call("run", home / "mine.yaml", *changes, "--overwrite") == 0
    assert report(out)["recipe"]["training"]["max_steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_run_is_kept_and_goes_on_only_with_its_own_recipe(
    call: Call, home: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial"
    changes = [f"dense.checkpoint={finished / 'dense'}", "training.max_steps=2", f"output={out}"]
    assert call("run", home / "mine.yaml", *changes, "--resume") == 2
    assert "there is no unfinished run" in error_line(capsys)
    assert call("run", home / "mine.yaml", *changes) == 0
    out.rename(work)
    capsys.readouterr()
    assert call("run", home / "mine.yaml", *changes) == 2
    assert "use --resume to go on with it, or --overwrite" in error_line(capsys)
    assert call("run", home / "mine.yaml", *changes, "training.seed=7", "--resume") == 2
    assert "was started with another recipe (it differs in training)" in error_line(capsys)
    before = contents(work)["dense/model.safetensors"]
    assert call("run", home / "mine.yaml", *changes, "--resume") == 0
    assert contents(out)["dense/model.safetensors"] == before
    assert not work.exists()


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_a_killed_run_measures_its_sensitivities_only_where_no_checkpoint_holds_them(
    call: Call, home: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    rule = {"target": "encoder", "sparsity": 0.5, "criterion": "magnitude", "budget": "sensitivity"}
    changes = [
        f"dense.checkpoint={finished / 'dense'}", f"pruning.rules=[{json.dumps(rule)}]", f"output={tmp_path / 'out'}",
        "training.max_steps=2", "training.save_steps=1", "export=[masked]",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("finllm_prune.run.conclude", lambda *_: sys.exit(9))  # killed, when all checkpoints are there
        assert call("run", home / "mine.yaml", *changes) == 9
    checkpoints = tmp_path / "out.partial" / "checkpoints" / "prune"
    undisturbed = densities(checkpoints / "checkpoint-2")
    for folder in checkpoints.iterdir():
        if int(folder.name.rpartition("-")[2]) > stopped_at:
            shutil.rmtree(folder)
    if stopped_at:
        # Other densities than any measurement gives: where they come back, nothing was measured again.
        state = load_file(checkpoints / "checkpoint-1" / STATE_FILE)
        state |= {key: torch.full_like(value, 0.5) for key, value in state.items() if key.endswith("/density")}
        save_file(state, checkpoints / "checkpoint-1" / STATE_FILE)
    with monkeypatch.context() as patch:
        patch.setattr("finllm_prune.run.conclude", lambda *_: sys.exit(9))
        assert call("run", home / "mine.yaml", *changes, "--resume") == 9
    assert len(set(undisturbed)) > 1
    assert densities(checkpoints / "checkpoint-2") == ([0.5] * 6 if stopped_at else undisturbed)


def densities(checkpoint: Path) -> list[float]:
    return [
        float(value) for key, value in sorted(load_file(checkpoint / STATE_FILE).items()) if key.endswith("/density")
    ]


def test_the_script_for_accelerate_is_the_run_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, path = Path(__file__).parents[1] / "scripts" / "run.py", tmp_path / "absent.yaml"
    monkeypatch.setattr(sys, "argv", [str(script), str(path), "training.seed=7"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert left.value.code == 2
    assert error_line(capsys) == f"Error: {path}: there is no such recipe"
    assert sys.argv[1:] == ["run", str(path), "training.seed=7"]


@pytest.mark.slow
def test_the_installed_command(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("modle: x\n")
    command = [Path(sys.executable).with_name("finllm-prune"), "run", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"Error: {path}: modle: unknown key; did you mean 'model'?")
