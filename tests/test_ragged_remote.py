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
ids = load_file("ids.safetensors")["ids"]
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


def test_python_s_cache_of_the_code_does_not_lie_in_the_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    find_format("ragged-remote")(uneven(), tokenizer, tmp_path / "saved")
    assert all(path.is_file() for path in (tmp_path / "saved").iterdir())


def without_us(folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """In a process that has no finllm_prune."""
    return subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US + "\n".join(lines)],
        cwd=folder, text=True, capture_output=True, check=False,
        # As many threads as here, for these decide how products are summed up.
        env={"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip


@pytest.mark.slow
def test_without_the_package_the_code_gives_the_same_logits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    families = ("bert", "deberta-v2", "qwen3")
    saved = {family: find_format("ragged-remote")(uneven(family), tokenizer, tmp_path / family) for family in families}
    ids = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    done = without_us(
        tmp_path,
        f"for family in {families!r}:",
        "    model = Auto.from_pretrained(family, trust_remote_code=True)",
        "    model.save_pretrained(family + '-again')",
        "    again = Auto.from_pretrained(family + '-again', trust_remote_code=True)",
        "    with torch.no_grad(): save_file({'first': model(ids).logits, 'again': again(ids).logits}, family + '-logits')",
        "    pipeline('text-classification', model=family, trust_remote_code=True, device='cpu')('Profit rose.')",
        "    try: Auto.from_pretrained(family, ignore_mismatched_sizes=True)",
        "    except OSError as error: print(str(error).splitlines()[-1])",
        "assert 'finllm_prune' not in sys.modules",
    )
    assert done.returncode == 0, done.stderr
    assert [REMOTE_LURE in line for line in done.stdout.splitlines()] == [True] * len(families)
    for family, returned in saved.items():
        with torch.no_grad():
            expected = returned(ids).logits
        found = load_file(tmp_path / f"{family}-logits")
        assert torch.equal(found["first"], expected)
        assert torch.equal(found["again"], expected)
