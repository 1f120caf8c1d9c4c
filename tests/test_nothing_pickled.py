"""Nothing is pickled: not in the code, and not in a folder that a command is given."""

import ast
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

import finllm_prune
from finllm_prune.cli import main
from tests.conftest import tiny_model

PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOURCES = sorted(Path(finllm_prune.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_file_pickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
            assert not {name.partition(".")[0] for name in names} & PICKLING
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save", "np.load", "numpy.load"), f"line {node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"line {node.lineno}"
            assert node.arg != "trust_remote_code" or ast.unparse(node.value) == "False", f"line {node.lineno}"
            assert (node.arg, ast.unparse(node.value)) != ("weights_only", "False")
            assert (node.arg, ast.unparse(node.value)) != ("use_safetensors", "False")


@pytest.fixture
def pickled(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder of old: its weights are a pickle."""
    folder, model = tmp_path / "old", tiny_model()
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_every_command_refuses_a_folder_of_pickled_weights(
    pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    tiny_model().save_pretrained(whole)
    recipe = tmp_path / "recipe.yaml"
    rules = [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]
    content = {"model": str(pickled), "task": "sentiment", "pruning": {"rules": rules}, "output": str(tmp_path / "out")}
    recipe.write_text(yaml.safe_dump(content))
    dense = [f"model={whole}", f"dense.checkpoint={pickled}"]
    for arguments in (
        ["run", recipe], ["run", recipe, *dense], ["evaluate", pickled], ["evaluate", whole, "--baseline", pickled],
        ["inspect", pickled], ["verify", pickled], ["export", pickled, tmp_path / "out", "--to", "masked"],
        ["delta", pickled, whole, tmp_path / "out"], ["delta", whole, pickled, tmp_path / "out"],
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["finllm-prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2, arguments
        [line] = capsys.readouterr().err.splitlines()
        assert (
            "holds no finllm_prune.json" in line
            if arguments[0] == "verify"
            else "holds pickled weights (.bin) only" in line
        )
    assert {path.name for path in tmp_path.iterdir()} == {"old", "whole", "recipe.yaml"}
