"""A run with everything at once: a target, fewer tokens, recovery, and several formats, each told for what it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

import finllm_prune.prepare
from finllm_prune.checkpoints import verify
from finllm_prune.evaluation import flops, parameter_bytes
from finllm_prune.pages import write_page
from finllm_prune.plan import plan
from finllm_prune.recipe import parse
from finllm_prune.run import run
from tests import small
from tests.test_target import few_cells, target_recipe

EXPORT = ["masked", "ragged", "packed", "packed-int8"]


@pytest.fixture
def content(tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    small.few_resamples(monkeypatch)
    few_cells(monkeypatch, tmp_path / "cache")
    more = {"export": EXPORT, "vocabulary": {}, "recovery": {"max_steps": 3}, "gates": {"latency_ratio": 9.0}}
    return target_recipe(tiny_folder(layers=3), tmp_path, {"flops": 0.5, "tokens": 32}) | more


def test_each_format_of_a_run_is_told_for_what_it_is(content: dict[str, Any]) -> None:
    recipe = parse(content)
    report = run(recipe)
    assert report is not None
    figures = json.loads((recipe.output / "report.json").read_text())
    assert figures["exported"].keys() == {"packed-int8"}
    assert [entry["model"] for entry in figures["latency"]] == ["ragged", "ragged"]
    dense, ragged = (
        AutoModelForSequenceClassification.from_pretrained(recipe.output / name) for name in ("dense", "ragged")
    )
    assert figures["target"]["measured"] == pytest.approx(flops(ragged, 32) / flops(dense, 32), rel=1e-6)
    assert figures["target"]["met"]
    for name in EXPORT:
        assert verify(recipe.output / name)["format"] == name
    rows = {what: pruned for what, _, pruned in report.rows()}
    before = figures["vocabulary"]["weight_bytes"]["before"]
    assert (
        f"ragged {figures['bytes']['ragged'] / before:.2f}"
        in rows["weights on disk, against the dense model with all its tokens"]
    )
    card = (recipe.output / "README.md").read_text()
    assert "import finllm_prune  # with it, transformers reads packed\nfrom transformers import pipeline\n" in card
    assert 'model="out/packed")' in card
    assert (
        "loads masked; finllm-prune is not needed. ragged, packed, packed-int8 load after `import finllm_prune`" in card
    )
    assert "see its documentation" not in card


def test_answers_that_took_long_are_kept_for_runs_that_share_the_dense_model(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second of them, whose page cannot be made, is not lost."""
    monkeypatch.setattr("finllm_prune.conclusion._LONG", 0.0)
    monkeypatch.setattr("finllm_prune.conclusion.CACHE", tmp_path / "home")
    plain = {"pruning": {"rules": [{"target": "mlp", "sparsity": 0.5}]}, "export": ["masked"]}
    plain |= {"recovery": None, "vocabulary": None, "gates": {}}
    first = run(parse(content | plain))
    kept = list((tmp_path / "home" / "answers").iterdir())
    assert len(kept) == 2, "of the dense and of the pruned model"
    stamps = [path.stat().st_mtime_ns for path in kept]
    plain["pruning"]["rules"][0]["sparsity"] = 0.75
    monkeypatch.setattr("finllm_prune.conclusion.write_page", lambda output: write_page(output / "nowhere"))
    second = run(
        parse(
            content
            | plain
            | {"dense": {"checkpoint": str(tmp_path / "out" / "dense")}, "output": str(tmp_path / "second")}
        )
    )
    assert first is not None
    assert second is not None
    assert f"write it with `finllm-prune report {tmp_path / 'second'}`" in caplog.text
    assert (tmp_path / "second" / "report.json").is_file()
    assert len(list((tmp_path / "home" / "answers").iterdir())) == 3, "the dense model is not asked again"
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    dense = [report.quality.metrics["accuracy"]["dense"] for report in (first, second)]
    assert dense[0] == dense[1]


def test_a_plan_knows_the_trimmed_model_its_recovery_and_its_formats(content: dict[str, Any]) -> None:
    whole = parameter_bytes(AutoModelForSequenceClassification.from_pretrained(content["model"]))
    content["model"] = {"name": content["model"], "keep_layers": [0, 2]}
    content["pruning"]["target"] = {"size": 0.5}
    planned = plan(parse(content))
    assert planned.seconds["recovery"] > 0
    assert planned.bytes.keys() == {"dense", *EXPORT}
    assert 0.45 * whole < planned.bytes["ragged"] <= 0.5 * whole, "the tokens that are gone count towards the target"
    report = run(parse(content))
    assert report is not None
    assert report.target is not None
    assert report.target["met"]
    ragged = AutoModelForSequenceClassification.from_pretrained(parse(content).output / "ragged")
    assert report.target["measured"] == pytest.approx(parameter_bytes(ragged) / whole)
    assert any(what == "target size 0.5 of the dense model's with all its tokens" for what, *_ in report.rows())
    for name in ("dense", *EXPORT):
        assert planned.bytes[name] == pytest.approx(report.bytes[name], rel=0.2), name
    dense = AutoModelForSequenceClassification.from_pretrained(parse(content).output / "dense")
    assert planned.bytes["dense"] == parameter_bytes(dense)


@pytest.mark.parametrize(
    "changes",
    [
        {"oneshot": "magnitude", "rules": [{"target": "mlp", "sparsity": 0.5}]},
        {"fill": True, "rules": [{"target": "mlp", "criterion": "movement", "sparsity": 0.9, "budget": "global"}]},
    ],
    ids=["oneshot", "fill"],
)
def test_a_trimmed_vocabulary_goes_with_one_shot_and_filling_with_recovery(
    content: dict[str, Any], changes: dict[str, Any]
) -> None:
    more = {"pruning": changes, "export": ["masked", "packed"], "gates": {}}
    recipe = parse(content | more | {"recovery": {"max_steps": 3} if "fill" in changes else None})
    report = run(recipe)
    assert report is not None
    assert report.sparsity["targeted"] == pytest.approx(0.5) or "fill" in changes
    assert report.run["vocabulary"]["kept"] < 300
    assert verify(recipe.output / "packed")["format"] == "packed"


def test_a_resumed_run_is_held_against_the_costs_that_it_chose_by(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without the table measures other times, and the masks are those of the old ones."""
    content["training"] |= {"save_strategy": "steps", "save_steps": 1}
    recipe = parse(content)
    with monkeypatch.context() as patch:
        patch.setattr("finllm_prune.run.conclude", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    priced = finllm_prune.prepare.price

    def dearer(*given: Any) -> Any:
        costs = priced(*given)
        return dataclasses.replace(costs, rest=costs.rest + 0.01)

    monkeypatch.setattr(finllm_prune.prepare, "price", dearer)
    report = run(recipe, resume=True)
    assert report is not None
    assert report.target is not None
    assert report.target["predicted"] == pytest.approx(report.target["measured"], rel=1e-6)
