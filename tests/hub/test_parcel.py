"""What a push takes along and what it refuses, before anything is sent."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from finllm_prune.errors import InputError, ProofError
from finllm_prune.export import export
from finllm_prune.hub.parcel import hub_card, pack
from finllm_prune.hub.push import Hub
from tests.hub.finished import report, write_output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_output(tmp_path_factory.mktemp("whole") / "out", tokenizer)


@pytest.fixture
def out(tmp_path: Path, whole: Path) -> Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def test_the_best_plain_format_lies_at_the_root(out: Path) -> None:
    parcel = pack(out, "org/name")
    assert parcel.places == {"compact": "", "masked": "masked"}
    assert parcel.files["model.safetensors"] == out / "compact" / "model.safetensors"
    assert parcel.files["masked/model.safetensors"] == out / "masked" / "model.safetensors"
    assert {"README.md", "recipe.yaml", "plots/density.png", "finllm_prune.json", "masked/finllm_prune.json"} <= set(
        parcel.files
    )
    assert not [path for path in parcel.files if "dense" in path or "report" in path or "recorder" in path]
    assert pack(out, "org/name", ["masked"]).places == {"masked": ""}
    assert pack(out / "compact", "org/name").places == {"compact": ""}, "the report lies beside it"
    with pytest.raises(InputError, match="--format: there is no onnx here, but compact, masked"):
        pack(out, "org/name", ["onnx"])


def test_what_export_writes_can_be_pushed(out: Path, tmp_path: Path) -> None:
    export(out, tmp_path / "served", ["packed", "masked"])
    assert pack(tmp_path / "served", "org/name").places == {"masked": "", "packed": "packed"}
    report(out, passed=False)
    export(out, tmp_path / "served", ["packed"], overwrite=True)
    with pytest.raises(InputError, match="failed gates: agreement"):
        pack(tmp_path / "served", "org/name")


def test_what_is_no_success_is_refused_or_told_first(out: Path) -> None:
    (out / "report.json").unlink()
    with pytest.raises(
        InputError, match=r"no report tells whether this model passed any gate; .* --allow-failed-gates"
    ):
        pack(out, "org/name")
    card = pack(out, "org/name", allow_failed_gates=True).files["README.md"]
    assert isinstance(card, bytes)
    assert card.decode().partition("\n---\n\n")[2].startswith("**NO REPORT tells")
    for content, words in (
        ({"passed": False, "gates": {}}, "collapsed: one class"),
        ({"passed": True, "gates": {"mcc": {"passed": False, "value": 0.1, "threshold": 0.5}}}, "failed gates: mcc"),
        ({"gates": {}}, "is damaged"),
        ([], "is damaged"),
    ):
        (out / "report.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=words):
            pack(out, "org/name")


def test_formats_of_two_models_are_not_one_repository(
    out: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = write_output(tmp_path / "other", tokenizer, ("ragged",), seed=1)
    shutil.copytree(other / "ragged", out / "ragged")
    with pytest.raises(InputError, match="compact and ragged are formats of two models; push one of them by --format"):
        pack(out, "org/name")
    report(out / "ragged", passed=False)
    with pytest.raises(InputError, match="failed gates: agreement"):
        pack(out, "org/name")
    assert pack(out, "org/name", ["compact", "masked"]).places == {"compact": "", "masked": "masked"}


def test_a_damaged_recipe_is_one_sentence(out: Path) -> None:
    (out / "compact" / "recipe.yaml").write_text("{")
    with pytest.raises(InputError, match=r"recipe.yaml is not readable"):
        pack(out, "org/name")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("clients.csv", "looks like data"), ("masked/train.jsonl", None), ("masked/.env", "looks like a secret"),
        ("id_rsa", "looks like a secret"), ("compact/notes.md", "does not know"), ("plots/raw.parquet", "looks like data"),
        ("plots/deep/density.png", "does not know"), ("masked/plots/data.txt", "looks like data"),
        ("checkpoints/prune/state", "belongs to a run under way"), ("masked/optimizer.pt", "belongs to a run under way"),
        ("masked/trainer_state.json", "belongs to a run under way"), ("checkpoint-12/model", "belongs to a run under way"),
        ("compact.partial/config.json", "belongs to a run under way"), ("masked/theirs.py", None),
    ],
)  # fmt: skip
def test_an_unknown_file_is_not_taken_along_silently(out: Path, place: str, words: str | None) -> None:
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("x")
    with pytest.raises(InputError if words else ProofError, match=words or "is not a file that was proved"):
        pack(out, "org/name")


def test_a_run_under_way_is_no_model(out: Path) -> None:
    out.rename(out.with_name("out.partial"))
    with pytest.raises(InputError, match="is an unfinished run"):
        pack(out.with_name("out.partial"), "org/name")


def test_a_link_could_lead_anywhere(out: Path, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_text("mine")
    (out / "compact" / "plots" / "density.png").unlink()
    (out / "compact" / "plots" / "density.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(InputError, match="is a link"):
        pack(out, "org/name")


SECRETS = ["hf_" + "A1" * 17, "AKIA" + "Q" * 16, "ghp_" + "b2" * 18, "-----BEGIN RSA PRIVATE " + "KEY-----"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "recipe.yaml"])
def test_a_token_in_a_text_is_found(out: Path, name: str, secret: str) -> None:
    (out / "compact" / name).write_text(yaml.safe_dump({"model": f"x {secret} y"}))
    with pytest.raises(InputError, match=f"{name} holds what looks like a token") as caught:
        pack(out, "org/name")
    assert secret not in str(caught.value)


def test_a_proof_that_does_not_hold(out: Path) -> None:
    (out / "masked" / "config.json").write_text("{}")
    with pytest.raises(ProofError, match="is not the file that was proved"):
        pack(out, "org/name")


def test_the_recipe_tells_no_folders_of_this_machine(out: Path) -> None:
    content = pack(out, "org/name").files["recipe.yaml"]
    assert isinstance(content, bytes)
    assert yaml.safe_load(content) == {"model": "model", "output": "outputs/mine"}


def test_a_card_says_where_each_format_lies() -> None:
    card = hub_card(
        "---\na: b\n---\n# out\n\nGood.\n\n## Use\n\nx\n", "org/name", {"compact": "", "onnx": "onnx"}, None
    )
    assert card.startswith("---\na: b\n---\n\n# out\n\nGood.\n\n## In this repository\n\n- compact: `AutoModel")
    assert "- onnx: `onnx/model.onnx`, for onnxruntime\n\n## Use" in card
    assert hub_card("text\n", "org/name", {}, "FAILED.").startswith(
        "**FAILED. Pushed with --allow-failed-gates.**\n\ntext"
    )


@pytest.mark.parametrize(
    "repo_id",
    [
        "name",
        "a/b/c",
        "org/",
        "/name",
        "org/na me",
        "org/..",
        "../x",
        "org/name.git",
        "org/a--b",
        "",
        "org/" + "x" * 97,
    ],
)
def test_an_invalid_repository_is_refused_at_once(repo_id: str) -> None:
    with pytest.raises(InputError, match=r"hub\.repo_id: '.*' (is no Hub id|names no owner)"):
        Hub(repo_id)
