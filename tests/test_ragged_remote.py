"""ragged-remote: without the package the code in the folder gives the same model; without either, an error says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_format, verify
from finllm_prune.checkpoints.quantizer import REMOTE_LURE
from finllm_prune.errors import ProofError
from tests.conftest import FAMILIES
from tests.test_families import logits
from tests.test_ragged import uneven

WITHOUT_US = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "finllm_prune":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification as Auto, pipeline
ids = load_file("ids.safetensors")
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_code_loads_as_ragged_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    returned = find_format("ragged-remote")(uneven(family), tokenizer, tmp_path / "saved")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(reloaded) is type(returned)
    assert torch.equal(logits(reloaded), logits(returned))
    assert verify(tmp_path / "saved")["format"] == "ragged-remote"
    reloaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(returned))
    assert "auto_map" not in (tmp_path / "again" / "config.json").read_text()
    code = tmp_path / "saved" / "modeling_ragged.py"
    code.write_text(code.read_text() + "\n")
    with pytest.raises(ProofError, match=r"modeling_ragged\.py is missing or is not the file that was proved"):
        verify(tmp_path / "saved")


def without_us(folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """In a process that has no finllm_prune."""
    return subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US + "\n".join(lines)],
        cwd=folder, text=True, capture_output=True, check=False,
        # As many threads as here, for these decide how products are summed up.
        env={"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.full), "deberta-v2"])
def test_without_the_package_the_code_gives_the_same_logits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    returned = find_format("ragged-remote")(uneven(family), tokenizer, tmp_path / "saved")
    ids = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    done = without_us(
        tmp_path,
        "model = Auto.from_pretrained('saved', trust_remote_code=True)",
        "model.save_pretrained('again')",
        "again = Auto.from_pretrained('again', trust_remote_code=True)",
        "with torch.no_grad(): save_file({'first': model(ids['ids']).logits, 'again': again(ids['ids']).logits}, 'logits')",
        "pipeline('text-classification', model='saved', trust_remote_code=True, device='cpu')('Profit rose.')",
        "assert 'finllm_prune' not in sys.modules",
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = returned(ids).logits
    found = load_file(tmp_path / "logits")
    assert torch.equal(found["first"], expected)
    assert torch.equal(found["again"], expected)
    failed = without_us(tmp_path, "Auto.from_pretrained('saved', ignore_mismatched_sizes=True)")
    assert failed.returncode == 1
    assert REMOTE_LURE in failed.stderr.splitlines()[-1]
