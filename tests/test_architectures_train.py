"""Complete runs of a decoder and of a model without a family, and what their recipes cannot ask for."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from finllm_prune.errors import InputError
from finllm_prune.prepare import prepare
from finllm_prune.recipe import Recipe, parse
from finllm_prune.run import run
from tests import small
from tests.small import TinyFolder

NEURONS = {"target": "mlp", "structure": "neuron", "sparsity": 0.5}
QUERIES = {"target": r"layer.\d.attention.self.(query|key)", "structure": "n:m", "sparsity": 0.5}
NO_FAMILY = {"export": ["masked"], "pruning": {"rules": [QUERIES]}}


def recipe(tmp_path: Path, folder: Path, keep_layers: list[int] | None = None, **changes: Any) -> Recipe:
    short = {"max_steps": 2, "per_device_train_batch_size": 12, "use_cpu": True, "disable_tqdm": True}
    return parse(
        {
            "model": {"name": str(folder), "keep_layers": keep_layers}, "output": str(tmp_path / "out"),
            "training": short, "pruning": {"rules": [NEURONS]},
            "task": {"name": "sentiment", "dataset": str(small.write_folder(tmp_path / "data")), "max_length": 32},
        }
        | changes
    )  # fmt: skip


def test_a_decoder_runs_to_a_smaller_model(
    tmp_path: Path, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    rules = [NEURONS, {"target": "attention", "structure": "head", "sparsity": 0.5}]
    written = recipe(tmp_path, tiny_folder("llama"), pruning={"rules": rules})
    report = run(written)
    assert report is not None
    assert report.sparsity["encoder_linear"] == 0.5
    config = AutoModelForSequenceClassification.from_pretrained(written.output / "compact").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 32)


def test_a_model_without_a_family_runs_on_patterns(
    tmp_path: Path, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    written = recipe(tmp_path, tiny_folder("ernie"), **NO_FAMILY)
    report = run(written)
    assert report is not None
    assert report.sparsity["targeted"] == 0.5
    pruned = AutoModelForSequenceClassification.from_pretrained(written.output / "masked")
    for name, parameter in pruned.named_parameters():
        half = name.endswith(("query.weight", "key.weight"))
        assert float((parameter == 0).float().mean() == 0.5) == half, name
    assert {layer["layer"] for layer in report.layers} >= {"ernie.encoder.layer.0.output.dense", "ernie.pooler.dense"}


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("ernie", {}, r"structure neuron cuts several matrices.*families/ernie\.py"),
        ("ernie", {"pruning": {"rules": [{"target": "mlp", "sparsity": 0.5}]}, "export": ["masked"]},
         r"target 'mlp' matches no linear layer; no family is known for model_type 'ernie' .*are as ernie\.encoder"),
        ("ernie", NO_FAMILY | {"keep_layers": [0]}, r"model\.keep_layers: no family is known .*leave the key out"),
        ("ernie", NO_FAMILY | {"export": ["masked", "onnx"]},
         "^export: onnx is made of models with a family, and ernie has none; drop onnx from export$"),
        ("bert", {"pruning": {"rules": [NEURONS | {"target": "attention", "structure": "head"}]}},
         "export: compact can leave out nothing of what these rules cut in a bert model"),
        ("bert", {"pruning": {"rules": [NEURONS | {"target": "encoder", "structure": "layer"}]}},
         "export: compact can leave out nothing"),
        ("llama", {"pruning": {"rules": [NEURONS | {"structure": "layer"}]}}, "export: compact can leave out nothing"),
        ("albert", {"keep_layers": [0]}, "share one set of weights"),
        ("bart", {"pruning": {"rules": [{"target": "fc1", "sparsity": 0.5}]}, "export": ["masked"]},
         r"distillation\.hidden: the hidden states of bart models are not known; set distillation\.hidden: 0"),
    ],
)  # fmt: skip
def test_what_an_architecture_cannot_give_is_refused_before_training(
    tmp_path: Path, tiny_folder: TinyFolder, model_type: str, changes: dict[str, Any], expected: str
) -> None:
    folder = tiny_folder(model_type)
    with pytest.raises(InputError, match=expected):
        prepare(recipe(tmp_path, folder, **changes), resume=False, overwrite=False)
    assert not (tmp_path / "out.partial").exists()


def test_a_decoder_without_a_padding_token_is_refused(tmp_path: Path, tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("llama", pad_token_id=None)
    with pytest.raises(InputError, match="has no padding token, which batches need; set pad_token"):
        prepare(recipe(tmp_path, folder), resume=False, overwrite=False)


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_a_decoder_whose_blocks_are_cut_may_be_compact(tmp_path: Path, tiny_folder: TinyFolder, family: str) -> None:
    rules = [{"target": "encoder", "structure": "layer", "sparsity": 0.5}]
    ready = prepare(recipe(tmp_path, tiny_folder(family), pruning={"rules": rules}), resume=False, overwrite=False)
    assert "compact" in ready.recipe.export


@pytest.mark.parametrize(("block", "told"), [(50, False), (60000, True)])
def test_a_large_state_of_second_order_is_told_before_it_is_made(
    tmp_path: Path, tiny_folder: TinyFolder, caplog: pytest.LogCaptureFixture, block: int, told: bool
) -> None:
    rule = {"target": "mlp", "sparsity": 0.5, "criterion": {"name": "second_order", "block": block}}
    asked = recipe(tmp_path, tiny_folder(), pruning={"rules": [rule]}, export=["masked"])
    prepare(asked, resume=False, overwrite=False)
    # Four matrices of 32 x 64 weights, each in one block of 60000 x 60000 numbers.
    assert ("its state takes 57.6 GB, in memory and in each checkpoint" in caplog.text) == told
