"""What goes into a parcel, before any Hub is asked."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.hub.parcel import pack
from tests.hub.finished import write_output


def test_code_goes_to_the_root_of_a_repository_of_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = write_output(tmp_path / "out", tokenizer, ("compact", "ragged-remote"))
    with pytest.raises(
        InputError, match=r"^--format: .* at the root alone, where compact lies; .* --format ragged-remote"
    ):
        pack(folder, "org/name")
    assert pack(folder, "org/name", ["compact"]).places == {"compact": ""}
    alone = pack(folder, "org/name", ["ragged-remote"])
    assert alone.places == {"ragged-remote": ""}
    assert "modeling_ragged.py" in alone.files
