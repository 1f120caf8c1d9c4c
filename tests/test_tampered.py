"""A folder whose files are not those of its manifest is refused by whatever reads it, not only by verify."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from finllm_prune.checkpoints import PLUGGED, find_format
from finllm_prune.checkpoints.manifest import MANIFEST, sums_sha256
from finllm_prune.checkpoints.quantizer import WEIGHTS
from finllm_prune.errors import InputError
from finllm_prune.saved import evaluate_saved, inspect_saved
from tests import small
from tests.test_packed import sparse
from tests.test_ragged import uneven

REFUSED = rf"is missing or is not the file that {MANIFEST} beside it tells of; export or download the model anew"


@pytest.mark.parametrize("format_name", PLUGGED)
def test_a_tensor_that_was_negated_is_refused_by_from_pretrained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, format_name: str
) -> None:
    folder = tmp_path / "saved"
    find_format(format_name)(uneven() if "ragged" in format_name else sparse(), tokenizer, folder)
    state, right = load_file(folder / WEIGHTS), sums_sha256(folder / WEIGHTS)
    for name, tensor in sorted(state.items(), key=lambda item: not item[0].endswith("bitmask")):
        changed = tensor.flip(0) if name.endswith("bitmask") else tensor.neg()
        if torch.equal(changed, tensor):
            continue
        save_file(state | {name: changed}, folder / WEIGHTS, metadata={"format": "pt"})
        assert sums_sha256(folder / WEIGHTS) != right, name
    with pytest.raises(InputError, match=rf"{WEIGHTS} {REFUSED}") as error:
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert "\n" not in str(error.value)
    (folder / MANIFEST).unlink()
    AutoModelForSequenceClassification.from_pretrained(folder)  # as it is: nobody tells what it was


@pytest.mark.parametrize("recorded", ["sums", "sha256"])
@pytest.mark.parametrize("format_name", ["packed", "packed-int8"])
def test_a_bitmask_with_as_many_bits_elsewhere_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, format_name: str, recorded: str
) -> None:
    find_format(format_name)(sparse(), tokenizer, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    name = next(name for name in state if name.endswith("bitmask"))
    byte = next(place for place, bits in enumerate(state[name].tolist()) if bits not in (0, 255))
    bits = int(state[name][byte])
    state[name][byte] = bits >> 1 | (bits & 1) << 7
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    if recorded == "sha256":
        del manifest["sums"]
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"{WEIGHTS} {REFUSED}"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    (tmp_path / MANIFEST).unlink()
    AutoModelForSequenceClassification.from_pretrained(tmp_path)  # nothing else tells: it would be another model


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several pieces and a bit, half of it zeros; no tensor is more than half of it."""
    numbers = torch.randn(3, 100_001, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("sums") / "file"
    save_file({str(i): row for i, row in enumerate(torch.where(numbers > 0, numbers, 0.0))}, path)
    return path


@given(st.data())
def test_any_byte_of_a_file_moves_its_sums(file: Path, data: st.DataObject) -> None:
    whole, right = file.read_bytes(), sums_sha256(file)
    header = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(header, len(whole) - 1))
    changed = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
    for content in (whole[:place] + changed + whole[place + 1 :], whole[:place], whole + bytes(place % 9 + 1)):
        file.write_bytes(content)
        assert sums_sha256(file) != right
    file.write_bytes(whole)
    assert sums_sha256(file) == right


def test_of_a_tensor_of_most_of_the_file_spots_are_hashed_and_the_rest_is_added_up(tmp_path: Path) -> None:
    numbers = torch.randn(400_001, generator=torch.Generator().manual_seed(0))
    parts = {name: numbers[:size].clone() for name, size in (("a", 70_000), ("embeddings", 300_000), ("z", 5_001))}
    save_file(parts, path := tmp_path / "file")
    right, size = sums_sha256(path), path.stat().st_size
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["a", "embeddings", "z"]
    ends = size - 4 * 305_001, size - 4 * 5_001
    told = {}
    for place in (ends[0] - 9, ends[0], ends[0] + 5_000, ends[1] - 1, ends[1], size - 1):
        changed = bytearray(path.read_bytes())
        changed[place] ^= 1
        (tmp_path / "other").write_bytes(changed)
        told[place] = sums_sha256(tmp_path / "other") != right
    assert list(told.values()) == [True, True, False, True, True, True]
    save_file(parts | {"embeddings": -parts["embeddings"]}, tmp_path / "other")
    assert sums_sha256(tmp_path / "other") != right


def test_a_model_that_was_saved_anew_is_taken_as_it_is(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    find_format("ragged")(uneven(), tokenizer, tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    for folder in ("again", "saved"):
        model.save_pretrained(tmp_path / folder, max_shard_size="20KB")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert torch.equal(again.classifier.bias, model.classifier.bias)


def test_no_figure_is_printed_of_a_changed_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder, data = tmp_path / "saved", str(small.write_folder(tmp_path / "data"))
    find_format("masked")(sparse(), tokenizer, folder)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
        for ask in (lambda: evaluate_saved(str(folder), "sentiment", data), lambda: inspect_saved(str(folder))):
            with pytest.raises(InputError, match=rf"{name} {REFUSED}"):
                ask()
        (folder / name).write_bytes(whole)
    evaluate_saved(str(folder), "sentiment", data)
