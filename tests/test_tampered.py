"""A folder whose files are not those of its manifest is refused by whatever reads it, not only by verify."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from finllm_prune.checkpoints import PLUGGED, find_format
from finllm_prune.checkpoints.manifest import MANIFEST, spots_sha256
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
    state, right = load_file(folder / WEIGHTS), spots_sha256(folder / WEIGHTS)
    for name, tensor in state.items():
        if name.endswith("bitmask") or not tensor.any():
            continue
        save_file(state | {name: tensor.neg()}, folder / WEIGHTS, metadata={"format": "pt"})
        assert spots_sha256(folder / WEIGHTS) != right, name
    with pytest.raises(InputError, match=rf"{WEIGHTS} {REFUSED}") as error:
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert "\n" not in str(error.value)
    (folder / MANIFEST).unlink()
    AutoModelForSequenceClassification.from_pretrained(folder)  # as it is: nobody tells what it was


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
