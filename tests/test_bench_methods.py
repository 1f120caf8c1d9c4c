"""The benchmark of methods: finished cells are kept, changed settings are new cells, processes share the work."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

import finllm_prune
from finllm_prune.errors import InputError
from finllm_prune.evaluation import compare
from finllm_prune.families import find_family
from tests import small
from tests.conftest import tiny_model

SCRIPTS = Path(finllm_prune.__file__).parents[1] / "scripts"
Room = Callable[[str], ModuleType]
Bench = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    """Imports a room of the benchmark as the script does, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] in ("bench", "bench_methods")]:
        del sys.modules[name]


@pytest.fixture
def bench(room: Room, tiny_folder: small.TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs ``bench_methods.py`` with a tiny model, four steps a cell, and returns all rows that it has written."""
    monkeypatch.setattr(room("bench.measure"), "compare", partial(compare, resamples=9))
    data, model, out = small.write_folder(tmp_path / "data"), tiny_folder(layers=1), tmp_path / "out"

    def main(*arguments: str) -> list[dict[str, Any]]:
        fixed = ["--data", str(data), "--model", str(model), "--rows", "24", "--dense-epochs", "1", "--out", str(out)]
        room("bench_methods").main([*fixed, "--epochs", "4", "--seeds", "1", "--seed", "1", *arguments])
        return list(room("bench.cells").read(out).values())

    return main


@pytest.mark.slow
def test_a_killed_bench_goes_on_and_a_changed_default_is_a_new_cell(
    bench: Bench, room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("--methods", "dense", "structured_magnitude", "--sparsities", "0.5")
    with monkeypatch.context() as patch:
        append = room("bench_methods").append

        def killed(out: Path, row: dict[str, Any]) -> None:
            append(out, row)
            with (out / "rows.jsonl").open("a") as stream:
                stream.write('{"key": "torn')
            raise KeyboardInterrupt

        patch.setattr(room("bench_methods"), "append", killed)
        with pytest.raises(KeyboardInterrupt):
            bench(*two)
    capsys.readouterr()
    dense, cut = bench(*two)
    shown = capsys.readouterr().out
    assert "2 cells, 1 of them finished earlier." in shown
    assert "[1/1] structured_magnitude 0.5, seed 1, learning rate 0.0004: macro-F1" in shown
    assert (dense["method"], dense["steps"], cut["method"], cut["steps"]) == ("dense", 4, "structured_magnitude", 4)
    assert cut["sparsity_of"]["targeted"] == cut["sparsity_of"]["encoder_linear"] == 0.5
    assert [entry["batch"] for entry in cut["latency"]] == [1, 16]
    assert dense["latency"] == []

    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    assert bench(*two) == [dense, cut]
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before, "nothing is run again"
    assert (tmp_path / "out" / "macro_f1.png").is_file()
    room("bench_methods").main(["--table-only", "--out", str(tmp_path / "out")])
    assert "| structured_magnitude | 0.5 | 1 | 0.0004 |" in capsys.readouterr().out

    methods = room("bench.methods")
    milder = methods.Method({"distillation": {"alpha": 0.5}})
    monkeypatch.setitem(methods.METHODS, "dense", milder)
    again = bench(*two)[-1]
    assert (again["method"], again["settings"]["method"]["distillation"]["alpha"]) == ("dense", 0.5)
    assert again["key"] != dense["key"]
    assert "not the newest: 1." in capsys.readouterr().out


@pytest.mark.slow
def test_texts_without_labels_take_no_more_steps(bench: Bench, room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room("bench.protocol"), "_BATCH", 8)
    methods = ("dense", "dense_unlabelled", "structured_taylor_recovery_apart_unlabelled")
    rows = {row["method"]: row for row in bench("--rows", "12", "--methods", *methods, "--sparsities", "0.5")}
    assert [rows[name]["steps"] for name in methods] == [8, 8, 16], (
        "two batches of 12 rows, whatever else is learned from"
    )
    assert rows["dense_unlabelled"]["settings"]["method"]["unlabelled"] is True
    assert "unlabelled" not in rows["dense"]["settings"]["method"]


def test_a_claim_ends_with_its_process(room: Room, tmp_path: Path) -> None:
    claimed = room("bench.cells").claimed
    hold = (
        f"import sys, time; sys.path.insert(0, {str(SCRIPTS)!r}); from pathlib import Path\n"
        "from bench.cells import claimed\n"
        "with claimed(Path(sys.argv[1]), 'cell'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with claimed(tmp_path, "cell") as mine:
            assert not mine
        other.kill()
    with claimed(tmp_path, "cell") as mine:
        assert mine


def test_two_processes_write_whole_lines(room: Room, tmp_path: Path) -> None:
    write = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); from pathlib import Path\n"
        "from bench.cells import append\n"
        "for i in range(20): append(Path(sys.argv[1]), {'key': sys.argv[2] + str(i), 'long': 'x' * 20000})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", write, str(tmp_path), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert set(room("bench.cells").read(tmp_path)) == {f"{name}{i}" for name in "ab" for i in range(20)}


def row(method: str, sparsity: float, seed: int, validation: float, test: float, **more: Any) -> dict[str, Any]:
    """A finished cell."""
    scores = {"dense": 0.8, "dense_interval": [0.7, 0.9], "pruned": test, "pruned_interval": [test - 0.1, test + 0.1]}
    return {
        "method": method, "sparsity": sparsity, "seed": seed, "learning_rate": 1e-4,
        "settings": {"protocol": {"dense": {"learning_rate": 1e-3}}, "method": {}},
        "validation": {"macro_f1": {"pruned": validation}},
        "test": dict.fromkeys(("macro_f1", "accuracy", "mcc"), scores) | {"agreement": 0.9, "collapsed": test < 0.3},
        "sparsity_of": {"encoder_linear": sparsity}, "latency": [],
    } | more  # fmt: skip


def test_the_table_takes_the_rate_that_validation_prefers(room: Room) -> None:
    rows = [
        row("dense", 0.0, 1, 0.8, 0.80), row("dense", 0.0, 2, 0.8, 0.82),
        row("movement", 0.9, 1, 0.7, 0.79), row("movement", 0.9, 2, 0.7, 0.79),
        row("movement", 0.9, 1, 0.8, 0.75, learning_rate=5e-4), row("movement", 0.9, 2, 0.7, 0.77, learning_rate=5e-4),
        row("movement", 0.9, 1, 0.99, 0.99, learning_rate=9e-4),
        row("torch_gradual", 0.9, 1, 0.2, 0.25), row("torch_gradual", 0.9, 2, 0.7, 0.65),
    ]  # fmt: skip
    lines = room("bench.table").table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| teacher: where all start", "| dense", "| movement", "| torch_gradual",
    ]  # fmt: skip
    movement = lines[4].split(" | ")
    assert movement[1:4] == ["0.9", "1 2", "0.0005"], "a rate with fewer seeds does not win, nor one by its test score"
    assert movement[4] == "0.760 [0.633, 0.887]", "mean and Student's t over two seeds"
    assert movement[5] == "-5.0 [-5.0, -5.0]"
    assert "(collapsed to one class in 1 of 2)" in lines[5]
    alone = room("bench.table").table(rows[2:3]).splitlines()[3].split(" | ")
    assert alone[4:6] == ["0.790 [0.690, 0.890]", ""], "one seed: the bootstrap; no dense: no gap"


def test_a_knob_that_is_off_is_no_setting_and_one_at_zero_is(room: Room) -> None:
    data = {"fill": False, "hidden": 0.0, "rules": [{"ceiling": None, "floor": 0, "moments": "whole", "regrow": True}]}
    assert room("bench.cells").what_is_on(data) == {"hidden": 0.0, "rules": [{"floor": 0}]}
    on = {"moments": "factored", "regrow": False}
    assert room("bench.cells").what_is_on(on) == on


def test_rows_of_other_settings_are_not_compared(room: Room) -> None:
    old = row("dense", 0.0, 1, 0.8, 0.1, settings={"protocol": {"epochs": 1}, "method": {}})
    lines = room("bench.table").table([old, row("dense", 0.0, 1, 0.8, 0.8)])
    assert "| dense | 0 | 1 | 0.0001 | 0.800" in lines
    assert "not the newest: 1." in lines


def events(peer: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """A training of some steps, with the events that the Trainer sends."""
    state, control = TrainerState(max_steps=steps), TrainerControl()
    given = (TrainingArguments(use_cpu=True), state, control)
    ids = torch.arange(5, 45).view(4, 10)
    for state.global_step in range(steps):
        model(ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        peer.on_pre_optimizer_step(*given, model=model)
        optimizer.step()
        peer.on_optimizer_step(*given, model=model, optimizer=optimizer)
        optimizer.zero_grad()
    peer.on_train_end(*given, model=model)


def test_torch_gradual_reaches_its_sparsity_and_leaves_a_plain_model(room: Room) -> None:
    model = tiny_model()
    names = list(model.state_dict())
    events(room("bench.peers").TorchGradual(0.75), model, torch.optim.AdamW(model.parameters()), 10)
    weights = [linear.weight for linear in find_family("bert").linears(model).values()]
    assert sum(int((w == 0).sum()) for w in weights) == 0.75 * sum(w.numel() for w in weights)
    assert sorted(model.state_dict()) == sorted(names)


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_torch_pruning_keeps_a_quarter_and_the_optimizer_follows(room: Room, importance: str) -> None:
    pytest.importorskip("torch_pruning", reason="pip install 'finllm-prune[bench]'")
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    events(room("bench.peers").TorchPruning(0.75, importance=importance), model, optimizer, 10)
    shapes = [tuple(linear.weight.shape) for linear in find_family("bert").linears(model).values()]
    assert shapes == 2 * [(8, 32), (8, 32), (8, 32), (32, 8), (16, 32), (32, 16)]
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 1
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_the_optimizer_keeps_the_moments_of_what_is_left(room: Room) -> None:
    old, new = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([old])
    moments = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    optimizer.state[old] = {"step": torch.tensor(7.0), "exp_avg": moments}
    new.grad = torch.tensor([[0.0, 1.0], [4.0, 5.0]])
    room("bench.peers")._follow(optimizer, {"w": old}, {"w": new})
    assert optimizer.param_groups[0]["params"] == [new]
    assert old not in optimizer.state
    assert optimizer.state[new]["exp_avg"].tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert optimizer.state[new]["step"] == 7


def test_a_missing_package_is_one_sentence(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r"pip install 'finllm-prune\[bench\]'"):
        room("bench.peers").torch_pruning()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "moovement"], "unknown name 'moovement'"),
        (["--sparsities", "1.5"], "they must lie between 0 and 1"),
        (["--rows", "99"], "99 of 24 rows"),
    ],
)
def test_bad_input_is_found_before_training(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as left:
        bench("--methods", "movement", *arguments)
    assert left.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
