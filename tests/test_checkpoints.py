"""Checkpoint formats: what is saved is the model that was in memory, and what is not is never left behind."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from finllm_prune.checkpoints import exported_in, find_format, verify
from finllm_prune.checkpoints.manifest import MANIFEST, sha256
from finllm_prune.checkpoints.proof import save_proved
from finllm_prune.errors import InputError, ProofError
from finllm_prune.families import find_family
from finllm_prune.pruning import Budget, Constant, Global, Neuron, Pruner, Random, Rule, Uniform, Unstructured
from tests.conftest import FAMILIES, LABELS, logits, loud, tiny_model

FORMATS = [
    "compact",
    "masked",
]  # transformers alone can open these; the others: test_ragged.py, test_packed.py, test_onnx.py
NEURONS = 64


def pruned(model_type: str = "bert", budget: Budget | None = None, sparsity: float = 0.75) -> PreTrainedModel:
    """A tiny model without most of its neurons and half of its attention weights."""
    model = loud(tiny_model(model_type, layers=3))
    rules = [
        Rule("mlp", sparsity, Neuron(), Random(), budget or Uniform()),
        Rule("attention", 0.5, Unstructured(), Random()),
    ]
    Pruner(find_family(model_type).groups(model, rules), Constant()).finish()
    return model


def living(model: PreTrainedModel) -> list[int]:
    """In each block, the neurons that have an effect."""
    family = find_family(model.config.model_type)
    blocks = range(len(family.layers(model)))
    paths = [family.sites(model, "mlp", block)[-1].path for block in blocks]
    return [int((model.get_submodule(path).weight != 0).any(0).sum()) for path in paths]


def width(model: PreTrainedModel) -> int:
    return int(getattr(model.config, find_family(model.config.model_type).width))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_saved_model_is_the_one_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, format_name: str
) -> None:
    model = pruned(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    returned = find_format(format_name)(model, tokenizer, tmp_path / "saved")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(reloaded) is type(model)
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(returned), expected, atol=1e-5, rtol=0)
    assert expected.std(0).max() > 0.05, "the logits depend on the text"
    assert width(reloaded) == (NEURONS if format_name == "masked" else NEURONS // 4)
    assert set(living(reloaded)) == {NEURONS // 4}
    assert (reloaded.config.id2label, reloaded.config.label2id["positive"]) == (dict(enumerate(LABELS)), 2)
    text = "Profit rose by 12 percent."
    if model_type != "qwen2":  # there AutoTokenizer takes any tokenizer.json for Qwen2's own
        assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert verify(tmp_path / "saved")["format"] == format_name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "modernbert", "qwen2"])
def test_compact_fills_narrow_blocks_up(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    model = pruned(model_type, Global())
    alive = living(model)
    assert len(set(alive)) > 1, "a global budget leaves blocks of several widths"
    find_format("compact")(model, tokenizer, tmp_path / "compact")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact")
    assert width(reloaded) == max(alive) < NEURONS
    assert living(reloaded) == alive
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)


def test_compact_keeps_the_zeros_of_other_rules(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pruned()
    find_format("compact")(model, tokenizer, tmp_path / "compact")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact")
    for path, linear in find_family("bert").linears(model).items():
        if ".attention." in path:
            assert torch.equal(reloaded.get_submodule(path).weight, linear.weight)
            assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2


def test_compact_of_a_model_without_any_living_neuron(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        for block in model.bert.encoder.layer:
            block.output.dense.weight.zero_()
    find_format("compact")(model, tokenizer, tmp_path / "compact")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact")
    assert width(reloaded) == 1
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "model_type", [name for name in FAMILIES if name != "albert"]
)  # whose blocks share their weights
def test_compact_after_whole_layers_are_gone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    model = pruned(model_type)
    find_family(model_type).keep_layers(model, [0, 2])
    find_format("compact")(model, tokenizer, tmp_path / "compact")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact")
    assert (reloaded.config.num_hidden_layers, width(reloaded)) == (2, NEURONS // 4)
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)


def test_compact_is_smaller_on_disk(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pruned()
    for name in FORMATS:
        find_format(name)(model, tokenizer, tmp_path / name)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in FORMATS}
    gone = 3 * (NEURONS - NEURONS // 4) * (2 * 32 + 1) * 4
    assert sizes["masked"] - sizes["compact"] == pytest.approx(gone, abs=256)


def other_weights(model: PreTrainedModel) -> None:
    model.classifier.bias.data += 1e-3


def not_a_number(model: PreTrainedModel) -> None:
    model.classifier.bias.data.fill_(float("nan"))


@pytest.mark.parametrize("change", [other_weights, not_a_number])
def test_another_model_than_the_one_in_memory_is_not_kept(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, change: Callable[[PreTrainedModel], None]
) -> None:
    model = pruned()
    wrong = copy.deepcopy(model)
    change(wrong)
    with pytest.raises(ProofError, match="its logits differ by"):
        save_proved(model, tokenizer, tmp_path / "saved", "masked", smaller=wrong)
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A tokenizer whose files cannot be written: the weights are on disk already when it fails."""

    def save_pretrained(self, folder: Path) -> None:
        assert list(folder.glob("*.safetensors"))
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("format_name", [*FORMATS, "ragged", "ragged-remote", "packed", "packed-int8"])
def test_a_save_that_fails_midway_leaves_what_was_there(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, format_name: str
) -> None:
    folder = tmp_path / "saved"
    with pytest.raises(InputError, match=r"saved cannot be written: .*No space left.*; free some space there"):
        find_format(format_name)(pruned(), FullDisk(), folder)
    assert list(tmp_path.iterdir()) == []
    find_format(format_name)(pruned(), tokenizer, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"saved cannot be written: .*No space left.*; free some space there"):
        find_format(format_name)(pruned(sparsity=0.5), FullDisk(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    verify(folder)


def test_a_second_save_replaces_the_first_one_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "saved"
    find_format("compact")(pruned(), tokenizer, folder)
    (folder / "left_over.txt").write_text("of the first")
    find_format("masked")(pruned(), tokenizer, folder)
    assert not (folder / "left_over.txt").exists()
    assert verify(folder)["format"] == "masked"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "compact"
    find_format("compact")(pruned(), tokenizer, folder)
    return folder


@pytest.fixture
def spoilt(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "compact"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)


def test_verify_catches_a_changed_byte_and_a_missing_file(exported: Path, spoilt: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files(exported))
    for name in files(exported):
        whole = (exported / name).read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            (spoilt / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ProofError, match=rf"{name} is missing or is not the file that was proved"):
                verify(spoilt)
        (spoilt / name).unlink()
        with pytest.raises(ProofError, match=rf"{name} is missing or is not the file that was proved"):
            verify(spoilt)
        (spoilt / name).write_bytes(whole)
    verify(spoilt)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"format": "masked", "sha256": {}, "zeros": {}, "probe": {}}', "\x00\x01"],
)
def test_verify_catches_a_damaged_manifest(spoilt: Path, content: str) -> None:
    (spoilt / MANIFEST).write_text(content)
    with pytest.raises(ProofError, match=rf"{MANIFEST} is damaged"):
        verify(spoilt)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda manifest: manifest["probe"]["logits"][0].__setitem__(0, 9.0), "its logits differ by"),
        (lambda manifest: manifest["probe"]["logits"].pop(), "its logits differ by inf"),
        (lambda manifest: manifest["probe"].pop("logits"), "is damaged"),
        (lambda manifest: manifest["zeros"].popitem(), "other zeros than the manifest says"),
        (lambda manifest: manifest["sha256"].update({"more.safetensors": "00"}), "more.safetensors is missing"),
    ],
)
def test_verify_holds_the_files_against_the_manifest(
    spoilt: Path, change: Callable[[dict[str, object]], None], expected: str
) -> None:
    manifest = json.loads((spoilt / MANIFEST).read_text())
    change(manifest)
    (spoilt / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ProofError, match=expected):
        verify(spoilt)


@pytest.mark.parametrize(
    "name", ["more.safetensors", "adapter_config.json", "pytorch_model.bin", "modeling.py", "vocab.txt"]
)
def test_verify_finds_a_file_that_a_loader_may_read_and_nobody_proved(spoilt: Path, name: str) -> None:
    for allowed in ("README.md", "recipe.yaml", "plot.png", "LICENSE", ".gitattributes"):
        (spoilt / allowed).write_text("for people")
    verify(spoilt)
    (spoilt / name).write_text("for machines")
    with pytest.raises(ProofError, match=rf"{name} is not a file that was proved"):
        verify(spoilt)


def rewrite(folder: Path, **changes: object) -> None:
    """Change a manifest so that the hashes of the files beside it hold again."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest["sha256"] = {name: sha256(folder / name) for name in manifest["sha256"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("version", [0, 2, -1])
def test_verify_tells_of_another_version(spoilt: Path, version: int) -> None:
    rewrite(spoilt, format_version=version, zeros="what another version may hold here")
    with pytest.raises(ProofError, match=rf"has the format version {version}, and this finllm_prune reads 1; upgrade"):
        verify(spoilt)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_verify_catches_a_truncated_file_even_with_its_own_hash(spoilt: Path, name: str) -> None:
    content = (spoilt / name).read_bytes()
    (spoilt / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ProofError, match=f"{name} is missing or is not the file that was proved"):
        verify(spoilt)
    rewrite(spoilt)
    with pytest.raises(ProofError, match="its files cannot be loaded"):
        verify(spoilt)


def test_what_is_exported_in_a_folder(exported: Path, tmp_path: Path) -> None:
    assert exported_in(exported) == [exported]
    assert exported_in(tmp_path / "absent") == [tmp_path / "absent"]
    for name in ("b", "a", "a.partial", "a.old", "plain"):
        (tmp_path / name).mkdir()
        if name != "plain":
            (tmp_path / name / MANIFEST).write_text("{}")
    assert exported_in(tmp_path) == [tmp_path / "a", tmp_path / "b"]


def test_verify_wants_a_folder_that_was_exported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(
            InputError, match=rf"holds no {MANIFEST}: it is not a checkpoint that finllm-prune exported"
        ):
            verify(path)


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(
        InputError,
        match=r"unknown format 'gguf'; known: masked, compact, ragged, ragged-remote, packed, packed-int8, onnx",
    ):
        find_format("gguf")


@pytest.mark.slow
def test_plain_transformers_uses_a_checkpoint_without_this_package(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["Profit rose.", "The loss widened.", "The meeting is on Tuesday."]
    here = []
    for name in FORMATS:
        returned = find_format(name)(pruned(), tokenizer, tmp_path / name)
        here += pipeline("text-classification", model=returned, tokenizer=tokenizer, device="cpu")(texts)
    code = (
        "import json, sys\n"
        "from transformers import pipeline\n"
        "folders, texts = map(json.loads, sys.argv[1:])\n"
        "pipes = [pipeline('text-classification', model=folder, device='cpu') for folder in folders]\n"
        "found = [row for pipe in pipes for row in pipe(texts)]\n"
        "assert 'finllm_prune' not in sys.modules\n"
        "print(json.dumps(found))\n"
    )
    arguments = [json.dumps([str(tmp_path / name) for name in FORMATS]), json.dumps(texts)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], cwd=tmp_path, text=True, capture_output=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert len(there) == len(FORMATS) * len(texts)
    assert [row["label"] for row in there] == [row["label"] for row in here]
    assert {row["label"] for row in there} <= set(LABELS)
    assert [row["score"] for row in there] == pytest.approx([row["score"] for row in here], abs=1e-5)
