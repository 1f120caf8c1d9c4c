"""A sweep: its cells, its devices, its processes, what it concludes, and the whole of it, killed and gone on with."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from finllm_prune.checkpoints import verify
from finllm_prune.recipe import parse
from finllm_prune.sweep import Grid, Result, Results, Setting
from finllm_prune.sweep.devices import find_devices
from finllm_prune.sweep.grid import cells_of, teacher_of
from finllm_prune.sweep.sweep import write_results
from finllm_prune.sweep.workers import Job, held, last_line, work
from tests import small
from tests.conftest import Call

TARGET = "pruning={target: {flops: 0.6, tokens: 24}, rules: [{target: mlp, structure: neuron, criterion: taylor}, " \
    "{target: attention, structure: head, criterion: taylor}]}"  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Any) -> Path:
    """Of 40 steps, with a checkpoint at each of them."""
    data = {
        "model": str(tiny_folder("bert", layers=1, seed=1)),
        "task": {"name": "sentiment", "dataset": str(small.write_folder(tmp_path / "data")), "max_length": 32},
        "pruning": {
            "rules": [
                {"target": "mlp", "structure": "neuron", "criterion": "movement", "sparsity": 0.3},
                {"target": "attention", "criterion": "movement", "sparsity": 0.4},
            ]
        },
        "dense": {"training": {"max_steps": 12, "learning_rate": 1e-2, "save_strategy": "no"}},
        "training": {
            "max_steps": 40, "save_steps": 1, "learning_rate": 2e-3, "per_device_train_batch_size": 24, "use_cpu": True,
            "seed": 5,
        },
        "gates": {"agreement": 0.0},
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_cells_are_the_recipe_at_each_value_and_seed_and_share_one_dense_model(recipe: Path) -> None:
    data = yaml.safe_load(recipe.read_text()) | {"hub": "org/name", "vocabulary": {"texts": "train"}}
    loaded = parse(data)
    cells = cells_of(loaded, Grid(sparsities=[0.5, 0.75, 0.5], seeds=[1, 2]))
    assert [cell.name for cell in cells] == [
        "sparsity-0.5_seed-1", "sparsity-0.5_seed-2", "sparsity-0.75_seed-1", "sparsity-0.75_seed-2",
    ]  # fmt: skip
    for cell in cells:
        assert cell.recipe.output == loaded.output / cell.name
        assert [rule.sparsity for rule in cell.recipe.pruning.rules] == [cell.value] * 2
        assert cell.recipe.dense.checkpoint == str(loaded.output / "dense")
        training = cell.recipe.training
        assert (training["seed"], training["run_name"], training["project"]) == (cell.seed, cell.name, "out")
        assert cell.recipe.hub is None
        assert cell.recipe.vocabulary == loaded.vocabulary
        assert parse(cell.recipe.resolved) == cell.recipe, "what a process is given is what was checked"
    teacher = teacher_of(loaded)
    assert teacher is not None
    assert (teacher.output, teacher.vocabulary) == (loaded.output / "dense", None), "each cell trims, and counts"
    assert teacher.dense == loaded.dense
    assert (teacher.training["seed"], teacher.training["max_steps"]) == (5, 40)
    named = parse(data | {"dense": {"checkpoint": "mine"}})
    assert teacher_of(named) is None
    assert cells_of(named, Grid(sparsities=[0.5]))[0].recipe.dense.checkpoint == "mine"
    assert cells_of(named, Grid(sparsities=[0.5]))[0].seed == 5, "the recipe's own"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--sparsities, --targets: give one of the two"),
        (["--sparsities", 0.5, "--targets", 0.5], "--sparsities, --targets: give one of the two"),
        (["--sparsities", 0.5, 1.5], "--sparsities: 1.5 is no part of the whole"),
        (["--targets", -0.5], "--targets: -0.5 is no part of the whole"),
        (["--seeds", 1, -2, "--targets", 0.5], "--seeds: -2 is no seed"),
        (["--targets", 0.5], "--targets: the recipe has no pruning.target"),
        (["--sparsities", 0.5, TARGET], "--sparsities: in this recipe pruning.target decides"),
        (["--sparsities", 0.5, 0.7, "training.seed=1", "--devices", "cpu", "gpu7"], "there is no gpu7 here; name some of"),
        (["--sparsities", 0.5, "--pick", "gates={}"], "--pick: the recipe has no gates"),
        (["--sparsities", 0.5, "--resume"], "--resume: there is no sweep in"),
        (["--sparsities", 0.5, "output={data}", "--overwrite"], "exists and holds no sweep, so it is left alone"),
        (["--sparsities", 0.5, 0.7, "pruning.rules.1={target: attention, structure: 'n:m', sparsity: 0.5}"],
         "sparsity-0.7_seed-5: structure n:m: 2 of every 4 weights stay"),
        (["--targets", 0.6, 0.01, TARGET], "target-0.01_seed-5: pruning.target.flops: 0.01 cannot be reached"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_anything_is_written(
    call: Call, recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[Any], expected: str
) -> None:
    before = sorted(recipe.parent.rglob("*"))
    given = [str(each).replace("{data}", str(recipe.parent / "data")) for each in arguments]
    assert call("sweep", recipe, *given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert expected in line
    assert sorted(recipe.parent.rglob("*")) == before


def test_devices_share_the_threads_and_cpu_means_no_gpu() -> None:
    assert [device.environment for device in find_devices([])] == [{}], "as a run"
    one, two = find_devices(["cpu", "cpu"])
    assert one == two
    assert one.environment == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def test_processes_run_side_by_side_and_what_fails_stops_no_other(tmp_path: Path) -> None:
    """Each of the first two waits for the other."""
    meet = "touch {0}; while [ ! -e {1} ]; do sleep 0.01; done; echo sees [$CUDA_VISIBLE_DEVICES] {0}; exit {2}"
    scripts = {"a": meet.format("a", "b", 0), "b": meet.format("b", "a", 7), "c": "echo late; kill -9 $$"}
    jobs = [
        Job(name, ["sh", "-c", f"cd {tmp_path}; {script}"], tmp_path / f"{name}.log")
        for name, script in scripts.items()
    ]
    heard: list[tuple[str, int | None]] = []
    with held(tmp_path) as lock:
        codes = work(jobs, find_devices(["cpu", "cpu"]), lock, lambda *told: heard.append(told))
    assert codes == {"a": 0, "b": 7, "c": -signal.SIGKILL}
    assert set(heard[:2]) == {("a", None), ("b", None)}
    assert len(heard) == 6
    assert [last_line(job.log) for job in jobs] == ["sees [] a", "sees [] b", "late"]


def test_a_signal_reaches_every_process_and_nothing_more_is_started(tmp_path: Path) -> None:
    saves = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print('up', flush=True)" \
        "\nfor _ in range(600): time.sleep(0.1)"  # fmt: skip
    jobs = [Job(name, [sys.executable, "-Sc", saves], tmp_path / f"{name}.log") for name in ("a", "b", "never")]
    heard: list[tuple[str, int | None]] = []

    def end() -> None:
        while not all(job.log.exists() and job.log.read_text() for job in jobs[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=end).start()
    before = signal.getsignal(signal.SIGINT)
    with held(tmp_path) as lock, pytest.raises(SystemExit) as left:
        work(jobs, find_devices(["cpu", "cpu"]), lock, lambda *told: heard.append(told))
    assert left.value.code == 128 + signal.SIGINT
    assert set(heard) == {("a", None), ("b", None), ("a", 143), ("b", 143)}
    assert signal.getsignal(signal.SIGINT) is before


def result(value: float, seed: int, pruned: float, passed: bool = True, **costs: float) -> Result:
    costs = {"weights": 1 - value, "bytes": 1 - value / 2, "latency": 1.0} | costs
    return Result(
        cell=f"sparsity-{value}_seed-{seed}", value=value, seed=seed, dense=0.8, dense_interval=[0.7, 0.9], pruned=pruned,
        pruned_interval=[pruned - 0.1, pruned + 0.1], retention=pruned / 0.8, agreement=0.9, format="compact",
        gates={"agreement": {"threshold": 0.8, "value": 0.9, "passed": passed}}, passed=passed, **costs,
    )  # fmt: skip


def test_the_smallest_setting_of_which_every_seed_passed_is_picked_and_no_seed_by_its_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [
        Setting(0.3, [result(0.3, 1, 0.7), result(0.3, 2, 0.72)], 0),
        Setting(0.5, [result(0.5, 1, 0.78), result(0.5, 2, 0.82)], 0),
        Setting(0.7, [result(0.7, 1, 0.9), result(0.7, 2, 0.6, passed=False)], 0),
        Setting(0.9, [result(0.9, 2, 0.7)], 1),
    ]
    results = Results("sparsity", "macro_f1", settings, {"sparsity-0.9_seed-1": "exit code 1"})
    assert results.smallest() == settings[1].results[0]
    assert results.fronts()["bytes"] == [0.9, 0.7, 0.5], "0.3 costs more than 0.5 and is worse"
    assert results.fronts()["latency"] == [0.5], "where all cost the same, the best"
    plain = json.loads(json.dumps(results.to_dict()))
    assert [each["passed"] for each in plain["settings"]] == [True, True, False, False]
    assert plain["settings"][1]["mean"]["pruned"] == pytest.approx(0.8)
    assert plain["settings"][1]["deviation"]["pruned"] == pytest.approx(0.02 * 2**0.5)
    assert plain["settings"][3]["deviation"] is None
    heads, rows = results.table()
    assert all(len(row) == len(heads) for row in rows)
    assert [row[1] for row in rows] == ["1", "2", "mean"] * 3 + ["2"]
    assert rows[5][2] == "0.800 ± 0.028"
    assert rows[7][-2] == "FAILED agreement"
    write_results(results, tmp_path)
    assert "page of the sweep could not be written" in caplog.text, "no cell has a report"
    assert json.loads((tmp_path / "sweep.json").read_text()) == plain
    assert (tmp_path / "pareto.png").stat().st_size > 0
    same = [Setting(value, [result(value, 1, 0.8, bytes=1.0)], 0) for value in (0.5, 0.9, 0.7)]
    best = Results("sparsity", "mse", same, {}).smallest()
    assert best is not None
    assert best.value == 0.9, "where bytes are the same, weights decide"
    assert Results("sparsity", "macro_f1", settings[2:], {}).smallest() is None
    errors = [Setting(value, [result(value, 1, error)], 0) for value, error in ((0.5, 0.2), (0.7, 0.3), (0.6, 0.4))]
    assert Results("sparsity", "mse", errors, {}).fronts()["bytes"] == [0.7, 0.5], "the less the better"


def test_cells_that_fail_are_named_and_the_exit_code_tells(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processes find a package of our name where they are started that cannot even be imported."""
    (tmp_path / "here" / "finllm_prune").mkdir(parents=True)
    (tmp_path / "here" / "finllm_prune" / "__init__.py").write_text("raise SystemExit('no [disk] here')")
    monkeypatch.chdir(tmp_path / "here")
    model = f"dense.checkpoint={tmp_path / 'tiny-bert'}"
    assert call("sweep", recipe, "--sparsities", 0.5, 0.75, "--pick", model) == 1
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("sparsity-0.5_seed-5", "sparsity-0.75_seed-5"):
        assert f"{name} failed: exit code 1, no [disk] here" in shown
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["cells"] == []
    assert call("sweep", recipe, "--sparsities", 0.5, model) == 2
    assert "use --resume to go on with it" in " ".join(capsys.readouterr().err.split())
    with held(tmp_path / "out"):
        assert call("sweep", recipe, "--sparsities", 0.5, model, "--resume") == 2
    assert "a sweep is at work in" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "out" / "sparsity-0.75_seed-5").mkdir()
    assert call("sweep", recipe, "--sparsities", 0.5, "--overwrite") == 1
    failed = json.loads((tmp_path / "out" / "sweep.json").read_text())["failed"]
    assert failed == {
        "dense": "exit code 1, no [disk] here",
        "sparsity-0.5_seed-5": "there is no dense model",
    }
    assert not list((tmp_path / "out").glob("sparsity-0.75*")), "what lay there is gone"


def kill_at(file: Path) -> None:
    """Tell this process to stop when a file appears."""

    def wait() -> None:
        deadline = time.monotonic() + 500
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_picks(
    call: Call, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ("sweep", recipe, "--sparsities", 0.5, 0.75, "--devices", "cpu", "cpu", "--pick")
    first, second = out / "sparsity-0.5_seed-5", out / "sparsity-0.75_seed-5"
    kill_at(out / f"{first.name}.partial" / "checkpoints" / "prune" / "checkpoint-3" / "pruner.safetensors")
    assert call(*asked) == 128 + signal.SIGTERM
    assert "the same command with --resume goes on" in capsys.readouterr().out
    assert "is complete; go on with --resume" in first.with_name(f"{first.name}.log").read_text()
    assert not first.exists()
    assert not second.exists()
    teacher = (out / "dense" / "model.safetensors").read_bytes()

    assert call(*asked, "--resume") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Picked: sparsity-0.75_seed-5" in shown
    kept = json.loads((out / "sweep.json").read_text())
    for cell, row in zip((first, second), kept["cells"], strict=True):
        report = json.loads((cell / "report.json").read_text())
        assert (cell / "dense" / "model.safetensors").read_bytes() == teacher, "one for all"
        assert [entry["step"] for entry in report["history"]] == list(range(1, 41)), (
            "no step is missing, none came twice"
        )
        assert row["pruned"] == report["accuracy"]["pruned"]
        assert row["weights"] == pytest.approx(1 - row["value"], abs=0.01)
        assert row["bytes"] == report["bytes"]["compact"] / report["bytes"]["dense"]
        assert row["passed"] == report["passed"]
    assert not (out / "picked").is_symlink()
    verify(out / "picked" / "compact")
    assert (out / "picked" / "report.json").read_bytes() == (second / "report.json").read_bytes()
    assert (out / "pareto.png").is_file()
    assert "sparsity-0.75_seed-5" in (out / "report.html").read_text()

    times = {path: path.stat().st_mtime_ns for path in out.glob("sparsity*/**/*")}
    assert call(*asked, "--resume") == 0
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("sparsity*/**/*")}, "nothing ran again"
    assert json.loads((out / "sweep.json").read_text()) == kept
    capsys.readouterr()
    assert call(*asked, "--resume", "training.learning_rate=1e-3") == 2
    assert "dense was started with another recipe (it differs in training)" in " ".join(capsys.readouterr().err.split())
