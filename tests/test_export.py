"""``export`` and ``delta`` of a saved model: what they write, what they refuse, and what stays when they fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from finllm_prune.checkpoints import FORMATS, GRAPH, SERVED, delta, find_format, verify
from finllm_prune.checkpoints.manifest import MANIFEST
from finllm_prune.errors import InputError
from finllm_prune.export import export, export_delta
from finllm_prune.families import find_family
from finllm_prune.pruning import Constant, Magnitude, Neuron, Pruner, Rule
from tests import small
from tests.causal import byte_tokenizer, causal
from tests.conftest import Call, tiny_model
from tests.rankings import write_set


@pytest.fixture(scope="module")
def run_output(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """What a run leaves, as far as an export looks at it: half of the neurons are gone from ``dense``."""
    folder = tmp_path_factory.mktemp("run") / "out"
    model = tiny_model().eval()
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    Pruner(find_family("bert").groups(model, [Rule("mlp", 0.5, Neuron(), Magnitude())]), Constant()).finish()
    find_format("masked")(model, tokenizer, folder / "masked")
    for card in (folder, folder / "masked"):
        (card / "README.md").write_text("# a card")
        (card / "recipe.yaml").write_text("model: x")
        (card / "plots").mkdir()
        (card / "plots" / "sparsity.png").write_bytes(b"a plot")
    (folder / "report.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForSequenceClassification.from_pretrained(folder)(input_ids=torch.arange(4, 40).view(3, 12)).logits


def test_a_run_s_output_is_exported_with_card_and_recipe(
    call: Call, run_output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    before = contents(run_output)
    assert call("export", run_output, tmp_path / "new", "--to", "compact", "--to", "masked") == 0
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if "from_pretrained" in line] == ["compact", "masked"]
    assert "1.000" in shown
    assert contents(run_output) == before
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"compact", "masked"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    for name in ("compact", "masked"):
        folder = tmp_path / "new" / name
        assert verify(folder)["format"] == name
        torch.testing.assert_close(logits(folder), logits(run_output / "masked"), atol=1e-5, rtol=0)
        assert (folder / "README.md").read_text() == "# a card"
        assert (folder / "recipe.yaml").read_text() == "model: x"
        assert (folder / "plots" / "sparsity.png").read_bytes() == b"a plot"
    assert call("verify", tmp_path / "new") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_every_format_can_be_written_and_read_again(run_output: Path, tmp_path: Path) -> None:
    written = export(run_output / "masked", tmp_path / "first", FORMATS)
    assert [each.format for each in written] == list(FORMATS)
    by_name = {each.format: each for each in written}
    assert by_name["masked"].ratio == pytest.approx(1)
    assert by_name["compact"].ratio < 0.9
    for each in written:
        assert each.bytes == round(each.ratio * by_name["masked"].bytes / by_name["masked"].ratio) > 0
        assert each.files == sum(path.is_file() for path in each.folder.iterdir())
        manifest = verify(each.folder)
        if each.format in SERVED:
            assert manifest["rows"]["source"] == "the sentiment sentences that finllm-prune embeds"
            assert manifest["rows"]["count"] == 64
            assert manifest["rows"]["difference"] < (1e-4 if each.format == "onnx" else 1)
    [again] = export(tmp_path / "first" / "compact", tmp_path / "again", ["masked"])
    assert again.ratio == pytest.approx(1), "what is gone does not come back"


def test_a_model_that_somebody_else_saved_is_exported_too(run_output: Path, tmp_path: Path) -> None:
    [written] = export(run_output / "dense", tmp_path / "new", ["masked", "masked"])
    assert not (written.folder / "README.md").exists()
    torch.testing.assert_close(logits(written.folder), logits(run_output / "dense"), atol=1e-5, rtol=0)


def test_an_existing_folder_stays_until_it_is_to_be_replaced(
    call: Call, run_output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    assert call("export", run_output, out, "--to", "masked") == 0
    before = contents(out)
    capsys.readouterr()
    assert call("export", run_output, out, "--to", "compact") == 2
    assert "new exists; use --overwrite" in capsys.readouterr().err
    assert contents(out) == before
    assert call("export", run_output, out, "--to", "compact", "--overwrite") == 0
    assert [path.name for path in out.iterdir()] == ["compact"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_export_is_never_replaced(run_output: Path, tmp_path: Path, overwrite: bool) -> None:
    copy = tmp_path / "out"
    shutil.copytree(run_output, copy)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("ten years of work")
    (tmp_path / "unfinished.partial").mkdir()
    (tmp_path / "unfinished.partial" / "recipe.yaml").write_text("a run")
    before = contents(tmp_path)
    for out, told in (
        (copy, "holds more than exported checkpoints"),
        (tmp_path / "thesis", "holds more than exported checkpoints"),
        (tmp_path / "thesis" / "text.txt", "is a file"),
        (tmp_path / "thesis" / "text.txt" / "out", "lies below a file"),
        (tmp_path / "unfinished", "an unfinished run lies in unfinished.partial"),
        (run_output, "lie in one another"),
        (run_output / "masked" / "new", "lie in one another"),
        (run_output.parent, "lie in one another"),
    ):
        for write in (lambda: export(run_output, out, ["masked"], overwrite=overwrite),  # noqa: B023
                      lambda: export_delta(str(run_output / "dense"), run_output, out, overwrite=overwrite)):  # noqa: B023  # fmt: skip
            with pytest.raises(InputError, match=told):
                write()
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    export(run_output, tmp_path / "empty", ["masked"])
    assert verify(tmp_path / "empty" / "masked")


def test_a_source_that_cannot_be_used_is_one_sentence(
    call: Call, run_output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt, headless, short = (tmp_path / name for name in ("spoilt", "headless", "short"))
    shutil.copytree(run_output / "masked", spoilt)
    (spoilt / "model.safetensors").write_bytes(b"not a model")
    shutil.copytree(run_output / "dense", headless)
    tiny_model().bert.save_pretrained(headless)
    shutil.copytree(run_output / "dense", short)
    (short / "model.safetensors").write_bytes((run_output / "dense" / "model.safetensors").read_bytes()[:-50])
    for source, code, told in (
        (tmp_path / "absent", 2, "there is no folder"),
        (tmp_path, 2, "holds no config.json"),
        (spoilt, 4, "model.safetensors is missing or is not the file that was proved"),
        (headless, 2, "has no weights for classifier.bias and 1 more; name a finished classifier"),
        (short, 2, "its weights cannot be loaded"),
    ):
        assert call("export", source, tmp_path / "new", "--to", "masked") == code
        [line] = capsys.readouterr().err.splitlines()
        assert told in line
    assert call("export", run_output, tmp_path / "new", "--to", "masked", "--to", "gguf") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "unknown format 'gguf'; known: " in line
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial").exists()


def test_one_format_that_fails_leaves_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_model("mpnet").save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match="no family is known for model_type 'mpnet'"):
        export(tmp_path / "source", tmp_path / "new", ["masked", "compact"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    export(tmp_path / "source", tmp_path / "new", ["masked"])


def test_what_no_graph_can_be_made_of_is_one_sentence(
    call: Call, run_output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    causal().save_pretrained(tmp_path / "writer")
    byte_tokenizer().save_pretrained(tmp_path / "writer")
    shutil.copytree(run_output / "dense", tmp_path / "other")
    tiny_model("mpnet").save_pretrained(tmp_path / "other")
    monkeypatch.setattr("finllm_prune.checkpoints.graphs.GRAPH_BYTES", 1000)
    for source, name, told in (
        (tmp_path / "writer", "onnx", "onnx serves classifiers and rerankers, not a model that writes"),
        (tmp_path / "writer", "onnx-int8", "onnx-int8 serves classifiers and rerankers, not a model that writes"),
        (tmp_path / "other", "onnx", "onnx is made of models with a family, and mpnet has none"),
        (run_output, "onnx", "an ONNX file holds at most 2 GB, and this model has 0.0 GB in fp32"),
    ):
        assert call("export", source, tmp_path / "new", "--to", "masked", "--to", name) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.endswith(f"export: {told}; name another format")
    assert {path.name for path in tmp_path.iterdir()} == {"writer", "other"}


@pytest.fixture
def sham_graph(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """In the place of a graph the torch model itself, whose logits are off by the one number that a test may change."""
    off, held = [0.0], []

    def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        held.append(model)
        find_format("masked")(model, tokenizer, folder)

    def serve(folder: Path) -> Callable[..., SequenceClassifierOutput]:
        return lambda **inputs: SequenceClassifierOutput(logits=held[-1](**inputs).logits + off[0])

    monkeypatch.setattr("finllm_prune.export.find_format", lambda name: save)
    monkeypatch.setattr("finllm_prune.export.serve", serve)
    return off


def with_recipe(source: Path, folder: Path, **task: object) -> Path:
    """A copy of a model with the recipe of such a task beside it."""
    shutil.copytree(source, folder)
    rules = [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]
    recipe = {"model": "x", "task": task, "output": "x", "pruning": {"rules": rules}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def test_a_graph_is_held_against_the_texts_of_the_recipe_beside_the_model(
    run_output: Path, tmp_path: Path, sham_graph: list[float]
) -> None:
    dense, data = run_output / "dense", small.write_folder(tmp_path / "data")
    gone = {"text_column": "headline", "label_column": "mood", "unlabelled": str(tmp_path / "gone.txt")}
    sources = {
        "own": (with_recipe(dense, tmp_path / "own", name="sentiment", dataset=str(data)), "the local folder data", 9),
        "gone": (
            with_recipe(dense, tmp_path / "gone", name="filings", dataset=str(tmp_path / "absent"), **gone),
            "the passages of filings that finllm-prune embeds",
            64,
        ),
        "none": (dense, "the sentiment sentences that finllm-prune embeds", 64),
    }
    ranking = with_recipe(dense, tmp_path / "ranking", name="reranking", dataset=str(write_set(tmp_path / "beir")))
    tiny_model(labels=["relevance"]).save_pretrained(ranking)
    sources["ranking"] = (ranking, "the local folder beir", 48)  # of 12 queries 4 passages that share a word with them
    for name, (source, origin, count) in sources.items():
        [written] = export(source, tmp_path / "new" / name, ["onnx"])
        rows = json.loads((written.folder / MANIFEST).read_text())["rows"]
        assert (rows["source"], rows["count"]) == (origin, count)
        assert rows["difference"] < 1e-5
        assert rows["agreement"] == 1


def test_a_graph_that_says_something_else_of_real_texts_is_not_written(
    call: Call, run_output: Path, tmp_path: Path, sham_graph: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    sham_graph[0] = 0.01
    assert call("export", run_output, tmp_path / "new", "--to", "onnx") == 4
    assert "its logits differ by 0.01 from the model that was evaluated" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("sham_graph")
def test_a_tokenizer_that_no_graph_can_be_held_by_is_one_sentence(run_output: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(run_output / "dense", source)
    tiny_model(vocab_size=20).save_pretrained(source)
    with pytest.raises(InputError, match="the tokenizer makes tokens that the model does not know"):
        export(source, tmp_path / "new", ["onnx"])
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    with pytest.raises(InputError, match="has no padding token, which batches need"):
        export(source, tmp_path / "new", ["onnx"])
    assert list(tmp_path.iterdir()) == [source]


def test_delta_from_the_command_line(
    call: Call, run_output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "delta"
    assert call("delta", run_output / "dense", run_output, out) == 0
    shown = capsys.readouterr().out
    assert "delta" in shown
    # Of two blocks the matrices up and down (a fresh model's biases are zeros anyway); and the head, of two tensors.
    assert "35 tensors as in the base, 4 tensors with new zeros alone, 2 tensors with other values" in shown
    assert {path.name for path in out.iterdir()} == {delta.WEIGHTS, MANIFEST}
    model = AutoModelForSequenceClassification.from_pretrained(run_output / "dense")
    expected = AutoModelForSequenceClassification.from_pretrained(run_output / "masked")
    delta.apply(model, out)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert call("verify", out) == 0
    assert "delta holds: hashes" in capsys.readouterr().out
    assert call("delta", run_output / "dense", run_output, out) == 2
    assert call("delta", run_output / "dense", run_output, out, "--overwrite") == 0
    capsys.readouterr()
    assert call("export", out, tmp_path / "new", "--to", "masked") == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_a_base_without_a_head_will_do(run_output: Path, tmp_path: Path) -> None:
    tiny_model().bert.save_pretrained(tmp_path / "base")
    written, counts = export_delta(str(tmp_path / "base"), run_output, tmp_path / "delta")
    assert counts["values"] == 2
    assert written.ratio < 0.1
    model = AutoModelForSequenceClassification.from_pretrained(run_output / "dense")
    delta.apply(model, tmp_path / "delta")
    assert torch.equal(model.classifier.weight, tiny_model().classifier.weight)


@pytest.mark.parametrize("command", ["inspect {}", "export {} {}-out --to masked", "delta {} {} {}-out"])
def test_a_graph_is_no_source(tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str], command: str) -> None:
    graph = tmp_path / "onnx"
    graph.mkdir()
    for name in ("config.json", GRAPH, MANIFEST):
        (graph / name).write_text("{}")
    assert call(*command.replace("{}", str(graph)).split()) == 2
    assert "holds an ONNX graph, of which no model can be made again" in " ".join(capsys.readouterr().err.split())
