"""A target instead of ratios: the costs are those of the really smaller model, and a run ends at its target or says so."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_engine, find_format, serve
from finllm_prune.errors import InputError
from finllm_prune.evaluation import (
    LatencyTable,
    Report,
    Target,
    check_target,
    flops,
    latency_table,
    measured_table,
    parameter_bytes,
    price,
    token_ids,
)
from finllm_prune.evaluation.latency_table import equal_blocks
from finllm_prune.families import find_family, narrow
from finllm_prune.pruning import Head, Neuron, Rule, Taylor
from finllm_prune.recipe import parse
from finllm_prune.run import run
from tests import small
from tests.conftest import FAMILIES, Call, Clock, tiny_model
from tests.test_quality import judge, noisy

RULES = [Rule("mlp", None, Neuron(), Taylor()), Rule("attention", None, Head(), Taylor())]


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_costs_are_those_of_the_really_smaller_model(family: str) -> None:
    model = tiny_model(family, layers=3)
    groups = find_family(family).groups(model, RULES)
    blocks, heads = len(find_family(family).layers(model)), groups[-1].mask.numel()
    widths = {"mlp": [3, 50, 21][:blocks], "attention": [1, heads, heads - 1][:blocks]}
    smaller = narrow(model, widths)
    kept = {group.name: widths[kind][int(block)] for group in groups for *_, block, kind in [group.name.split(".")]}
    by_flops = price(Target(flops=0.5, tokens=16), model, model, groups)
    assert by_flops.total(kept) == pytest.approx(flops(smaller, 16) / flops(model, 16), rel=1e-9)
    by_size = price(Target(size=0.8), model, model, groups)
    assert by_size.total(kept) == pytest.approx(parameter_bytes(smaller) / parameter_bytes(model), rel=1e-9)
    assert by_flops.start == pytest.approx(1.0)
    assert by_size.start == pytest.approx(1.0)


def test_flops_are_two_for_each_product_of_each_matrix() -> None:
    model, tokens = tiny_model("bert"), 16
    linear = sum(linear.weight.numel() for linear in find_family("bert").linears(model).values()) * tokens
    attention = 2 * 2 * tokens * tokens * 32
    head = 32 * 32 + 32 * 3  # the pooler and the classifier see the first token alone
    assert flops(model, tokens) == 2 * (linear + attention + head)


def test_a_target_out_of_reach_is_refused_with_the_lowest() -> None:
    model = tiny_model()
    groups = find_family("bert").groups(model, RULES)
    lowest = price(Target(size=0.8), model, model, groups).lowest
    with pytest.raises(InputError, match=f"pruning.target.size: 0.3 cannot be reached: .* come down to {lowest:.3f}"):
        price(Target(size=0.3), model, model, groups)
    with pytest.raises(InputError, match="cannot be reached"):
        price(Target(flops=0.3, tokens=16), model, model, find_family("bert").groups(model, RULES[1:]))


def test_a_trimmed_vocabulary_counts_towards_a_size_and_nothing_else() -> None:
    model = tiny_model()
    groups = find_family("bert").groups(model, RULES)
    with pytest.raises(
        InputError, match=r"fp32, those of a trimmed vocabulary's missing tokens among them; .* by vocabulary"
    ):
        price(Target(size=0.3), model, model, groups)
    half = price(Target(size=0.3), model, model, groups, share=0.5)
    assert half.start == pytest.approx(0.5)
    flops_alone = price(Target(flops=0.5, tokens=16), model, model, groups, share=0.5)
    assert flops_alone.start == pytest.approx(1.0)
    found = check_target(Target(size=0.3), half, model, model, dict.fromkeys(half.tables, 1), share=0.5)
    assert found["measured"] == pytest.approx(0.5)
    assert found["predicted"] == pytest.approx(half.lowest)


def test_a_smaller_start_counts_towards_the_target() -> None:
    dense, model = tiny_model(layers=4), tiny_model(layers=4)
    find_family("bert").keep_layers(model, [0, 2])
    groups = find_family("bert").groups(model, RULES)
    costs = price(Target(flops=0.3, tokens=16), dense, model, groups)
    assert costs.start == pytest.approx(flops(model, 16) / flops(dense, 16))
    with pytest.raises(InputError, match=r"0\.9 is met before anything is cut"):
        price(Target(flops=0.9, tokens=16), dense, model, groups)


TABLE = LatencyTable(
    [1, 2, 4], [1, 16, 32, 64], [[0.2, 0.3, 0.41, 0.6], [0.3, 0.4, 0.38, 0.7], [0.5, 0.6, 0.7, 1.0]], 9.0
)


def test_a_table_never_falls_and_counts_neurons_by_eights() -> None:
    surface = TABLE.surface()
    assert surface.shape == (5, 65)
    assert (np.diff(surface, axis=0) >= 0).all()
    assert (np.diff(surface, axis=1) >= 0).all()
    assert surface[4, 64] == 1.0
    assert surface[3, 16] == pytest.approx((surface[2, 16] + surface[4, 16]) / 2)
    assert surface[4, 33] == surface[4, 40] < surface[4, 41]
    heads, neurons = equal_blocks(surface, 0.6)
    assert 0.45 < surface[heads, neurons] <= 0.6
    assert equal_blocks(surface, 0.1) == (1, 1)


def test_a_part_that_no_rule_cuts_costs_the_same_in_the_table() -> None:
    surface = LatencyTable([4], [1, 32, 64], [[0.4, 0.7, 1.0]], 9.0).surface()
    assert surface[:, 32] == pytest.approx([0.7] * 5)


TINY = LatencyTable([1, 4], [1, 64], [[0.5, 0.7], [0.8, 1.0]], 1.0)


def few_cells(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(latency_table, "CACHE", folder)
    monkeypatch.setattr(latency_table, "_ROUNDS", 1)
    monkeypatch.setattr(latency_table, "_STEPS", {"attention": (0.0, 1.0), "mlp": (0.0, 0.5, 1.0)})


def test_the_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_cells(monkeypatch, tmp_path)
    model = tiny_model()
    first = measured_table(model, model, 1, 8, {"mlp"})
    assert first.heads == [4]
    assert first.neurons[0] >= 1
    assert first.neurons[-1] == 64
    assert measured_table(model, model, 1, 8, {"mlp"}) == first
    (file,) = tmp_path.iterdir()
    assert {"processor", "torch", "threads", "batch", "tokens", "shapes"} <= json.loads(file.read_text())["of"].keys()
    file.write_text("{")
    measured_table(model, model, 1, 8, {"mlp"})
    assert json.loads(file.read_text())["neurons"] == first.neurons


def test_another_runtime_has_a_table_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    few_cells(monkeypatch, tmp_path)
    monkeypatch.setattr(latency_table, "_FEW_STEPS", {"attention": (0.0, 1.0), "mlp": (0.0, 1.0)})
    model, made = tiny_model(), []

    def engine(narrowed: PreTrainedModel) -> Callable[..., None]:
        made.append(narrowed)
        weights = sum(linear.weight.numel() for linear in find_family("bert").linears(narrowed).values())
        return lambda **inputs: clock.sleep(1e-6 * weights)

    parts = {"mlp", "attention"}
    table = measured_table(model, model, 1, 8, parts, "onnx", engine)
    assert (table.heads, table.neurons, table.ratios[-1][-1]) == ([1, 4], [1, 64], 1.0)
    attention, mlp = 4 * 32 * 32, 2 * 32 * 64  # weights of a block
    assert table.ratios[0] == pytest.approx(
        [(attention / 4 + mlp / 64) / (attention + mlp), (attention / 4 + mlp) / (attention + mlp)]
    )
    assert table.dense_ms == pytest.approx(1e-3 * 2 * (attention + mlp))
    assert [narrowed for narrowed in made if narrowed is model] == [model], "one dense engine for all cells"
    assert len(made) == 4
    assert measured_table(model, model, 1, 8, parts, "onnx", engine) == table
    assert len(made) == 4
    measured_table(model, model, 1, 8, parts, engine=engine)
    known = [json.loads(file.read_text())["of"] for file in tmp_path.iterdir()]
    assert sorted(of["runtime"] for of in known) == ["onnx", "torch"]
    assert [("onnxruntime" in of) for of in known] == [of["runtime"] == "onnx" for of in known]


@pytest.mark.slow  # each cell of the table is a graph, which takes a second to make
def test_a_run_ends_at_its_target_in_eight_bits(
    tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    few_cells(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(latency_table, "_FEW_STEPS", {"attention": (0.0, 1.0), "mlp": (0.0, 1.0)})
    target = {"latency": 0.95, "tokens": 32, "runtime": "onnx-int8"}
    recipe = parse(target_recipe(tiny_folder(), tmp_path, target))
    # What a tiny model takes is noise, so a table is put in the place of the measured one.
    monkeypatch.setattr(latency_table, "_measure", lambda *args: TINY)
    report = run(recipe)
    assert report is not None
    assert report.target is not None
    assert (report.target["runtime"], report.target["kind"]) == ("onnx-int8", "latency")
    assert 0.85 < report.target["predicted"] <= 0.953
    assert report.target["measured"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "onnx-int8"])
def test_an_engine_is_what_its_format_serves(runtime: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    find_format(runtime)(model, tokenizer, tmp_path / "saved")
    inputs = token_ids(300, 3, 11)
    assert torch.equal(find_engine(runtime)(model)(**inputs).logits, serve(tmp_path / "saved")(**inputs).logits)


def test_latency_is_shared_out_as_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_cells(monkeypatch, tmp_path)
    model = tiny_model()
    table = measured_table(model, model, 1, 8, {"mlp", "attention"})
    (file,) = tmp_path.iterdir()
    ratios = [[0.2 + 0.1 * h + 0.4 * n / 64 for n in table.neurons] for h in table.heads]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ratios": ratios}))
    costs = price(Target(latency=0.6, tokens=8), model, model, find_family("bert").groups(model, RULES))
    kept = {name: 2 if "attention" in name else 32 for name in costs.tables}
    assert costs.total(kept) == pytest.approx(0.2 + 0.2 + 0.2, abs=1e-6)
    kept["bert.encoder.layer.0.attention"] = 4
    assert costs.total(kept) == pytest.approx(0.2 + 0.3 + 0.2, abs=1e-6), "two heads of one of two blocks"
    kept["bert.encoder.layer.1.mlp"] = 48
    assert costs.total(kept) == pytest.approx(0.2 + 0.3 + 0.25, abs=1e-6)
    neurons = costs.tables["bert.encoder.layer.0.mlp"]
    assert neurons[25] == neurons[32] < neurons[33], "matrix kernels work on eight columns at a time"
    generator = torch.Generator().manual_seed(0)
    worth = {name: torch.rand(len(table) - 1, generator=generator) for name, table in costs.tables.items()}
    for fraction in (0.3, 1.0):
        masks = costs.share(worth, fraction)
        found = costs.total({name: int(mask.sum()) for name, mask in masks.items()})
        assert costs.due(fraction) - 0.05 < found <= costs.due(fraction) + 0.002
    with pytest.raises(InputError, match=r"target.latency: 0\.1 cannot be reached"):
        price(Target(latency=0.1, tokens=8), model, model, find_family("bert").groups(model, RULES))


def target_recipe(model: Path, folder: Path, target: dict[str, object]) -> dict[str, object]:
    return {
        "model": str(model), "task": {"name": "sentiment", "dataset": str(small.write_folder(folder / "data"))},
        "output": str(folder / "out"), "export": ["masked"],
        "pruning": {
            "target": target,
            "rules": [
                {"target": "mlp", "structure": "neuron", "criterion": "taylor"},
                {"target": "attention", "structure": "head", "criterion": "taylor"},
            ],
        },
        "dense": {"training": {"max_steps": 1}}, "recording": False,
        "training": {"max_steps": 8, "use_cpu": True, "disable_tqdm": True, "report_to": "none"},
    }  # fmt: skip


def test_a_run_ends_at_its_target(tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch) -> None:
    small.few_resamples(monkeypatch)
    recipe = parse(target_recipe(tiny_folder(), tmp_path, {"flops": 0.5, "tokens": 32}))
    assert parse(recipe.resolved) == recipe
    report = run(recipe)
    assert report is not None
    target = json.loads((recipe.output / "report.json").read_text())["target"]
    assert (target["kind"], target["tokens"]) == ("flops", 32)
    assert target["met"]
    assert target["measured"] == pytest.approx(target["predicted"], rel=1e-6)
    assert 0.475 <= target["measured"] <= 0.5
    card = (recipe.output / "README.md").read_text()
    assert "target: flops 0.5 of the dense model's (32 tokens)" in card
    assert "MISSED" not in card


def test_a_missed_target_is_said() -> None:
    model = tiny_model()
    groups = find_family("bert").groups(model, RULES)
    target = Target(flops=0.5, tokens=16)
    costs = price(target, model, model, groups)
    found = check_target(target, costs, model, model, {group.name: 1 for group in groups})
    assert found["measured"] == 1.0
    assert found["predicted"] == pytest.approx(costs.lowest)
    assert not found["met"]


def test_the_table_and_the_command_say_that_a_target_was_missed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = {"kind": "size", "asked": 0.5, "predicted": 0.5, "measured": 0.7, "tolerance": 0.05, "met": False}
    quality = judge(noisy(0.2, 1), noisy(0.25, 2))
    told = {"wall_seconds": {"total": 1.0}}
    report = Report(quality, {}, {"dense": 1}, [], [], [], told, target=missed)
    assert ("target size 0.5 of the dense model's", "1.000", "0.700 MISSED") in report.rows()
    monkeypatch.setattr("finllm_prune.run.run", lambda *_, **__: report)
    (tmp_path / "mine.yaml").write_text(json.dumps(target_recipe(tmp_path, tmp_path, {"size": 0.5})))
    assert call("run", tmp_path / "mine.yaml") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The target was missed: size 0.5 asked, 0.500 predicted, 0.700 measured." in shown


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target", {}, "pruning.target: one of latency, size, flops is needed, and 0 are given"),
        ("target", {"size": 0.5, "flops": 0.5}, "one of latency, size, flops is needed, and 2 are given"),
        ("target", {"flops": 3}, "pruning.target.flops: 3.0 is no part of the dense model's"),
        ("target", {"flops": 0.5, "batch": 0}, "batch, tokens and threads must be at least 1"),
        ("target", {"latency": 0.5, "runtime": "tflite"}, "target.runtime: unknown 'tflite'; known: torch, onnx, onnx-int8"),
        ("target", {"flops": 0.5, "runtime": "onnx"}, "target.runtime: flops is the same in each runtime; remove the key"),
        ("target", None, "pruning.rules.0.sparsity: this key is missing"),
        ("fill", True, "pruning.fill: "),
        ("oneshot", "magnitude", "pruning.oneshot: pruning.target needs masks that are chosen while training"),
        ("rules", [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}], "target decides how many .* remove the key"),
        ("rules", [{"target": "mlp", "sparsity": 0.5}], "pruning.target: no rule cuts heads or neurons"),
        ("rules", [{"target": "mlp"}], "pruning.rules.0.sparsity: this key is missing"),
        ("rules", [{"target": "mlp", "structure": "neuron", "budget": "global"}], "remove the rule's budget"),
        ("rules", [{"target": "encoder", "structure": "layer"}], "shares heads and neurons only"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_target_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    content = target_recipe(tmp_path, tmp_path, {"flops": 0.5})
    content["pruning"][key] = value
    with pytest.raises(InputError, match=message):
        parse(content)
