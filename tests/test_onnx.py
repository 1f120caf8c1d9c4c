"""onnx: the graph is the model without its dead parts, at every shape; the 8-bit one is measured, not assumed."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import onnx
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from finllm_prune.checkpoints import GRAPH, SERVED, find_format, prove_rows, refuse_no_graph, serve, verify
from finllm_prune.checkpoints import onnx as graphs
from finllm_prune.checkpoints.manifest import MANIFEST
from finllm_prune.checkpoints.ragged import smallest
from finllm_prune.errors import InputError, ProofError
from finllm_prune.export import export
from finllm_prune.families import find_family
from finllm_prune.pruning import Constant, Head, Neuron, Pruner, Random, Rule, Uniform
from finllm_prune.recipe import parse
from finllm_prune.run import run
from finllm_prune.saved import evaluate_saved
from tests import small
from tests.conftest import FAMILIES, LABELS, tiny_model


def narrow(model_type: str = "bert", **sizes: int) -> PreTrainedModel:
    """A tiny model with half of its heads and a quarter of its neurons; every unit that is left moves the logits."""
    model = tiny_model(model_type, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith("bias"):
                parameter.normal_(std=0.3)
    rules = [Rule("mlp", 0.75, Neuron(), Random(), Uniform()), Rule("attention", 0.5, Head(), Random(), Uniform())]
    Pruner(find_family(model_type).groups(model, rules), Constant()).finish()
    return model.eval()


def padded(rows: int, tokens: int, padding: int, seed: int = 0) -> dict[str, Tensor]:
    """Token ids; the last row ends in that much padding."""
    ids = torch.randint(5, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding:
        ids[-1, -padding:] = mask[-1, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def read(tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Sentences of several lengths, padded as in use."""
    tokens = tokenizer([row["text"] for row in small.rows("train")], padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter runs once, for both formats of one model; each writes the graph, holds it against the model and loads it."""
    made: list[onnx.ModelProto] = []
    make = graphs._graph

    def first(smaller: PreTrainedModel, example: dict[str, Tensor]) -> onnx.ModelProto:
        made.extend([] if made else [make(smaller, example)])
        return made[0]

    monkeypatch.setattr(graphs, "_graph", first)


@torch.inference_mode()
def farthest(folder: Path, model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    return float((serve(folder)(**inputs).logits - model(**inputs).logits).abs().max())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return narrow()


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> Path:
    """A folder with both formats, for reading."""
    folder = tmp_path_factory.mktemp("exported")
    pairs = copy.deepcopy(tokenizer)
    pairs.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in SERVED:
        find_format(name)(model, pairs, folder / name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {path.name for path in folder.iterdir()} == set(SERVED)
    return folder


@settings(max_examples=20)
@given(rows=st.integers(1, 4), tokens=st.integers(1, 66), part=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_graph_is_the_model_at_every_shape(
    exported: Path, model: PreTrainedModel, rows: int, tokens: int, part: float, seed: int
) -> None:
    assert farthest(exported / "onnx", model, padded(rows, tokens, int(part * (tokens - 1)), seed)) < 1e-4


def test_a_graph_is_held_against_the_model_on_rows_of_real_texts(
    exported: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = Dataset.from_list([dict(tokenizer(row["text"], truncation=True)) for row in small.rows("train")])
    served, collator, other = serve(exported / "onnx"), DataCollatorWithPadding(tokenizer), copy.deepcopy(model)
    prove_rows(served, model, rows, collator, exported / "onnx", "here")
    found = verify(exported / "onnx")["rows"]
    assert (found["source"], found["count"], found["agreement"]) == ("here", len(rows), 1)
    assert found["difference"] < 1e-4
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(ProofError, match=r"onnx: its logits differ by .* from the model that was evaluated"):
        prove_rows(served, other, rows, collator, exported / "onnx", "here")
    prove_rows(serve(exported / "onnx-int8"), model, rows, collator, exported / "onnx-int8", "here")
    found = verify(exported / "onnx-int8")["rows"]
    assert found["difference"] > 1e-4, "measured, and not refused"
    assert found["agreement"] > 0.8


def test_token_types_reach_the_graph(exported: Path, model: PreTrainedModel) -> None:
    inputs = padded(2, 9, 0)
    second = inputs | {"token_type_ids": (torch.arange(9) > 4).long().expand(2, -1).contiguous()}
    assert farthest(exported / "onnx", model, second) < 1e-4
    served = serve(exported / "onnx")
    assert not torch.equal(served(**inputs).logits, served(**second).logits)


def test_dead_heads_and_neurons_are_not_in_the_graph_nor_are_paths_of_this_machine(exported: Path) -> None:
    graph = onnx.load(exported / "onnx" / GRAPH).graph
    shapes = {tuple(sorted(each.dims)) for each in graph.initializer}
    assert {(16, 32)} <= shapes, "two of four heads, and 16 of 64 neurons"
    assert not any(64 in shape for shape in shapes)
    assert b".py" not in (exported / "onnx" / GRAPH).read_bytes()


def test_a_served_folder_names_its_labels(exported: Path) -> None:
    config = json.loads((exported / "onnx" / "config.json").read_text())
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}


def test_the_manifest_says_what_8_bits_changed(exported: Path, model: PreTrainedModel) -> None:
    manifest = verify(exported / "onnx-int8")
    ids = torch.tensor(manifest["probe"]["input_ids"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        got, expected = serve(exported / "onnx-int8")(**inputs).logits, model(**inputs).logits
    assert 1e-4 < manifest["difference"] == pytest.approx(float((got - expected).abs().max()), rel=1e-3)
    assert 0.9 < manifest["agreement"] == float((got.argmax(-1) == expected.argmax(-1)).float().mean())
    sizes = [(exported / name / GRAPH).stat().st_size for name in SERVED]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.fixture(params=SERVED)
def spoilt(request: pytest.FixtureRequest, exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / request.param
    shutil.copytree(exported / request.param, folder)
    verify(folder)
    return folder


def test_verify_catches_a_changed_graph(spoilt: Path) -> None:
    whole = bytearray((spoilt / GRAPH).read_bytes())
    whole[len(whole) // 2] ^= 1
    (spoilt / GRAPH).write_bytes(whole)
    with pytest.raises(ProofError, match=rf"{GRAPH} is missing or is not the file that was proved"):
        verify(spoilt)


def test_a_changed_graph_is_not_served(spoilt: Path) -> None:
    graph = onnx.load(spoilt / GRAPH)
    graph.graph.name = "edited"
    onnx.save(graph, spoilt / GRAPH)
    with pytest.raises(InputError, match=rf"{GRAPH} is missing or is not the file that {MANIFEST} beside it tells of"):
        serve(spoilt)
    (spoilt / MANIFEST).unlink()
    serve(spoilt)


def test_verify_holds_the_graph_against_the_recorded_logits_and_classes(spoilt: Path) -> None:
    manifest = json.loads((spoilt / MANIFEST).read_text())
    far = [[value + 2 * manifest["probe"]["tolerance"] + 1 for value in row] for row in manifest["probe"]["logits"]]
    for change, sentence in (
        ({"probe": manifest["probe"] | {"logits": far}}, "its logits differ by"),
        ({"agreement": 1.5}, "it predicts other classes for the probe"),
    ):
        (spoilt / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(ProofError, match=sentence):
            verify(spoilt)


@pytest.mark.parametrize("version", [0, 2, -1])
def test_a_graph_of_another_version_is_neither_proved_nor_served(spoilt: Path, version: int) -> None:
    manifest = json.loads((spoilt / MANIFEST).read_text())
    (spoilt / MANIFEST).write_text(json.dumps(manifest | {"format_version": version}))
    for read_it in (verify, serve):
        with pytest.raises(
            ProofError, match=rf"has the format version {version}, and this finllm_prune reads 1; upgrade"
        ):
            read_it(spoilt)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_one_sentence_before_training(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for module in ("onnx", "onnx_int8"):
        monkeypatch.delitem(sys.modules, f"finllm_prune.checkpoints.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"^export: .* {package}, .*: pip install 'finllm-prune\[onnx\]'$"):
        find_format("onnx-int8")


class FullDisk:
    """A tokenizer whose files cannot be written: the graph is on disk already when it fails."""

    model_input_names = ("input_ids", "attention_mask")

    def save_pretrained(self, folder: Path) -> None:
        assert (folder / GRAPH).is_file()
        raise OSError(28, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_an_export_that_fails_midway_leaves_nothing(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    with pytest.raises(InputError, match="No space left"):
        find_format(name)(model, FullDisk(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


# Of two kinds of blocks: those that see a window of the text turn its positions by other angles.
BLOCKS = {"modernbert": 2, "gemma3_text": 2}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_its_graphs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, one_graph: None, model_type: str
) -> None:
    model, inputs = narrow(model_type, layers=BLOCKS.get(model_type, 1), hidden=16), read(tokenizer)
    assert 0 < inputs["attention_mask"].float().mean() < 1, "shorter texts are padded"
    with torch.inference_mode():
        assert model(**inputs).logits.std(0).max() > 0.05, "the logits depend on the text"
    for name in SERVED:
        find_format(name)(model, tokenizer, tmp_path / name)
        assert verify(tmp_path / name)["format"] == name
    assert farthest(tmp_path / "onnx", model, inputs) < 1e-4
    manifest = verify(tmp_path / "onnx-int8")
    assert manifest["agreement"] > 0.8
    assert 1e-4 < farthest(tmp_path / "onnx-int8", model, inputs) < 3 * manifest["difference"]


@pytest.mark.slow
def test_a_graph_of_a_half_precision_model_is_held_against_its_weights_in_fp32(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, one_graph: None
) -> None:
    narrow(layers=1, hidden=16).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    export(tmp_path / "half", tmp_path / "out", SERVED)
    half, model = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "half", dtype=dtype).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    for name in SERVED:
        assert verify(tmp_path / "out" / name)["format"] == name
        assert json.loads((tmp_path / "out" / name / "config.json").read_text())["dtype"] == "float32"
    assert farthest(tmp_path / "out" / "onnx", model, read(tokenizer)) < 1e-4
    assert farthest(tmp_path / "out" / "onnx", half, read(tokenizer)) > 1e-4, "what half precision rounds is no fault"


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: small.TinyFolder) -> dict[str, object]:
    """A run of a few steps that exports graphs."""
    return {
        "model": str(tiny_folder()),
        "task": {"name": "sentiment", "dataset": str(small.write_folder(tmp_path / "data"))},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "magnitude", "sparsity": 0.5}]},
        "output": str(tmp_path / "mine"),
        "training": {"num_train_epochs": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True},
        "export": ["masked", "onnx", "onnx-int8"],
    }


def test_a_model_that_no_onnx_file_can_hold_is_refused_before_training(
    recipe: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finllm_prune.checkpoints.graphs.GRAPH_BYTES", 1000)
    with pytest.raises(InputError, match=r"^export: an ONNX file holds at most 2 GB, .*; drop onnx from export$"):
        run(parse(recipe))


def test_of_a_finished_model_only_what_is_left_has_to_fit_into_a_graph(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = smallest(model).num_parameters() * 4
    assert left < model.num_parameters() * 4
    monkeypatch.setattr("finllm_prune.checkpoints.graphs.GRAPH_BYTES", left)
    refuse_no_graph(model, "export", "onnx", "wait", finished=True)
    with pytest.raises(InputError, match="holds at most 2 GB"):
        refuse_no_graph(model, "export", "onnx", "wait")


@pytest.mark.slow
def test_a_run_measures_its_graphs_and_its_card_shows_how_to_serve_them(
    recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.few_resamples(monkeypatch)
    report = run(parse(recipe))
    assert report is not None
    assert [entry["model"] for entry in report.latency] == [
        "masked",
        "masked",
        "onnx",
        "onnx",
        "onnx-int8",
        "onnx-int8",
    ]
    assert report.bytes["onnx-int8"] < report.bytes["onnx"]
    assert 0 < report.exported["onnx-int8"].agreement <= 1
    assert any(row[0] == "same prediction (agreement), onnx-int8" for row in report.rows())
    figures, _ = evaluate_saved(str(tmp_path / "mine" / "onnx-int8"), "sentiment", str(tmp_path / "data"), None)
    assert figures["macro_f1"]["value"] == report.exported["onnx-int8"].metrics["macro_f1"]["pruned"]
    card = (tmp_path / "mine" / "README.md").read_text()
    snippet = re.findall(r"```python\n(import onnxruntime.*?)```", card, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out.strip() in {f"['{label}']" for label in LABELS}
