"""What comes from others is only ever read: no code of theirs runs, and no path of theirs leads out of its folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_format, verify
from finllm_prune.checkpoints.manifest import MANIFEST, sha256
from finllm_prune.comparison import Compared, inert
from finllm_prune.errors import InputError, ProofError
from finllm_prune.hub.card import inert as inert_text
from finllm_prune.loading import load_tokenizer
from finllm_prune.recipe import Recipe, parse
from finllm_prune.tasks import find_task
from tests.conftest import Call, tiny_model

RECIPE = {
    "model": "x",
    "task": "sentiment",
    "pruning": {"rules": [{"target": "mlp", "sparsity": 0.5}]},
    "output": "out",
    "export": ["masked"],
}


@pytest.fixture
def hostile(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder whose config and tokenizer name code beside them, which would leave a trace."""
    folder = tmp_path / "hostile"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
    change(folder / "config.json", model_type="theirs", auto_map=dict.fromkeys(names, "theirs.Theirs"))
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]})
    return folder


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_no_command_runs_code_that_lies_beside_a_model_or_asks_whether_it_may(
    hostile: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt may be answered with yes"))
    recipe, data = tmp_path / "recipe.yaml", tmp_path / "data.csv"
    recipe.write_text(yaml.safe_dump(RECIPE | {"model": str(hostile), "output": str(tmp_path / "out")}))
    data.write_text("text\nProfit rose.\n")
    for arguments in (
        ["run", recipe], ["plan", recipe], ["evaluate", hostile], ["inspect", hostile],
        ["export", hostile, tmp_path / "out", "--to", "masked"], ["delta", hostile, hostile, tmp_path / "out"],
        ["trim", hostile, tmp_path / "out", "--texts", "builtin"],
        ["pull-and-compare", hostile, hostile, "--data", data],
    ):  # fmt: skip
        assert call(*arguments) == 2, arguments
        assert "custom code" in capsys.readouterr().err or arguments[0] in ("export", "delta")
    assert not (tmp_path / "ran").exists()
    assert "theirs" not in sys.modules


def test_a_tokenizer_with_code_is_not_run_either(hostile: Path, tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(hostile)
    load_tokenizer(str(hostile))
    assert not (tmp_path / "ran").exists()


def test_a_config_names_no_class_but_a_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("BertTokenizer", "pipeline", "utils.hub", "AutoProcessor"):
        change(tmp_path / "model" / "config.json", architectures=[name])
        assert call("trim", tmp_path / "model", tmp_path / "out", "--texts", "builtin") == 2
        assert f"{name} cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", "", "model\0"])
def test_a_manifest_leads_nowhere_else(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    find_format("masked")(tiny_model(), tokenizer, tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    hashes = json.loads((tmp_path / "model" / MANIFEST).read_text())["sha256"]
    change(tmp_path / "model" / MANIFEST, sha256=hashes | {name: sha256(tmp_path / "secret")})
    with pytest.raises(ProofError, match="is no file of this folder"):
        verify(tmp_path / "model")


def test_an_index_of_shards_names_proved_files_only(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "model"
    find_format("masked")(tiny_model(), tokenizer, folder)
    shutil.move(folder / "model.safetensors", tmp_path / "else.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"bert.pooler.dense.weight": "../else.safetensors"}}))
    hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
    del hashes["model.safetensors"]
    change(folder / MANIFEST, sha256=hashes | {index.name: sha256(index)})
    with pytest.raises(ProofError, match=r"'../else\.safetensors' is no file of this folder"):
        verify(folder)


@pytest.mark.parametrize(
    "text",
    ["model: !!python/object/apply:os.system ['true']", "!!python/name:os.system", "model: !!python/module:os"],
)
def test_a_recipe_makes_no_python_objects(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match="is not a readable YAML file"):
        Recipe.load(tmp_path / "bad.yaml")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(InputError, match="its value is not YAML"):
        Recipe.load(tmp_path / "good.yaml", ["model=!!python/name:os.system"])


@pytest.mark.parametrize(
    "name", ["os", "os.path", "..errors", "task", "rows.csv", "", "sentiment.TASK", "\0", 7, ["x"]]
)
def test_a_task_is_one_of_ours(name: object) -> None:
    with pytest.raises(InputError, match="unknown task"):
        find_task(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"export": ["../masked"]}, "export: unknown format"),
        ({"output": ".."}, "output: "),
        (
            {"training": {"hub_token": "hf_" + "a" * 30}},
            "training.hub_token: this is set by `hf auth login` or HF_TOKEN",
        ),
        ({"training": {"output_dir": "/"}}, "training.output_dir: this is set by output"),
        ({"hub": {"repo_id": "org/name", "token": "hf_" + "a" * 30}}, "hub.token: unknown key"),
        ({"hub": "name"}, "hub.repo_id: 'name' names no owner"),
        ({"hub": "../name"}, "hub.repo_id: '../name' is no Hub id"),
        ({"hub": {"repo_id": "org/name", "revision": "-x"}}, "hub.revision: '-x' is no name of a branch"),
        ({"hub": {"repo_id": "org/name", "create_pr": True, "tag": "v1"}}, "hub.create_pr: a proposal is made to main"),
    ],
)
def test_a_recipe_keeps_to_its_output_and_holds_no_token(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(RECIPE | changes)
    assert words in str(caught.value)
    assert "aaa" not in str(caught.value)


def test_a_yaml_that_grows_without_end_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    for text in ("\n".join([*lines, "training: *a11"]), "training: &x {y: *x}", "[" * 3000, "x: " + "y" * 2_000_000):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(InputError, match=r"bomb.yaml"):
            Recipe.load(tmp_path / "bomb.yaml")


@pytest.mark.parametrize("cell", ["=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_written_csv_holds_no_formula(tmp_path: Path, cell: str) -> None:
    Compared({}, [], [(1, cell, "up", "down")]).write_flips(tmp_path / "flips.csv")
    text = (tmp_path / "flips.csv").read_text()
    assert "'" + cell.strip() in text or "'\t=1" in text or '"\'\n=1"' in text
    assert inert("Profit rose = good.") == "Profit rose = good."


def test_names_of_others_are_shown_in_a_card_and_neither_run_nor_laid_out() -> None:
    shown = inert_text({"<script>alert(1)</script>": ["a|b\n# Approved", '"); import os  #', 0.5, None]})
    assert shown == {
        "&lt;script&gt;alert(1)&lt;/script&gt;": ["a&#124;b # Approved", "&quot;); import os  #", 0.5, None]
    }
