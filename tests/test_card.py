"""The card of a run: what stands in it, that its code runs and its metadata is read, and what people may say afterwards."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from transformers import PreTrainedTokenizerFast

from finllm_prune.checkpoints import verify
from finllm_prune.checkpoints.manifest import sha256
from finllm_prune.errors import InputError
from finllm_prune.hub.card import write_card
from finllm_prune.hub.governance import license_conflict, license_notes
from finllm_prune.prepare import read
from finllm_prune.recipe import parse
from finllm_prune.run import run
from tests import small
from tests.conftest import LABELS, Call, tiny_model


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("card")
    tiny_model(layers=1, seed=1).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    for split in small.SPLITS:
        rows = [{**row, "sector": "banks" if number % 2 else "oil|gas"} for number, row in enumerate(small.rows(split))]
        small.write_jsonl(home / "data" / f"{split}.jsonl", rows)
    (home / "data" / "README.md").write_text("---\nlicense: cc-by-nc-sa-3.0\n---\n")
    return {
        "model": {"name": str(home / "model"), "license": "apache-2.0"},
        "task": {"name": "sentiment", "dataset": str(home / "data"), "max_length": 32},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]},
        "dense": {"training": {"max_steps": 12, "learning_rate": 1e-2}},
        "training": {
            "max_steps": 6, "learning_rate": 2e-3, "per_device_train_batch_size": 24, "use_cpu": True, "disable_tqdm": True,
        },
        "evidence": {"slices": ["length", "sector"], "sample": 5, "margin": 0.2},
        "gates": {"agreement": 0.0, "macro_f1": 0.999},
        "governance": {"intended_use": "Triage of news by <analysts>"},
        "output": str(home / "out"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(content: dict[str, Any]) -> Path:
    """The output of a run; tests that write take a copy."""
    with pytest.MonkeyPatch.context() as patch:
        small.few_resamples(patch)
        run(parse(content))
    return Path(content["output"])


def figures_of(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return figures


def test_a_card_tells_what_was_measured_what_is_open_and_what_licenses_forbid(finished: Path) -> None:
    card, figures = (finished / "README.md").read_text(), figures_of(finished)
    evidence, machine = figures["evidence"], figures["machine"]
    first = card.split("\n---\n")[1].strip().splitlines()
    assert first[2].startswith(
        "**LICENSE CONFLICT: apache-2.0 is declared for this model, but the data is under cc-by-nc-sa-3.0"
    )
    assert first[4] == "**FAILED gates: macro_f1.**"
    words = {"not worse": "It is not worse", "not shown": "That it is not worse", "worse": "It is worse"}[
        evidence["verdict"]
    ]
    assert f"**{words} than the dense model by more than 20 points of accuracy" in card
    for name in ("ece", "brier"):
        shown = " | ".join(f"{evidence['calibration'][kind][name]:.3f}" for kind in ("dense", "pruned"))
        assert f" | {shown} |" in card
    assert {row["part"]: row["units"] for row in evidence["slices"] if row["by"] == "sector"} == {
        "banks": 4,
        "oil|gas": 5,
    }
    assert "| sector: oil&#124;gas | 5 | " in card
    assert "of a random sample of 5 rows of the test split" in card
    assert "| one negation more | 5 of 5 | " in card
    assert (
        "The dense model was trained for 12 steps; the pruned one began as its copy and was trained for 6 steps more."
        in card
    )
    assert "| agreement ≥ 0 | " in card
    assert "| macro_f1 ≥ 0.999 | " in card
    assert f"Measured on {machine['processor']}, {machine['cores']} cores, {machine['threads']} thread" in card
    assert f"sha256 `{sha256(finished / 'recipe.yaml')}`" in card
    assert "| owner | **open**" in card
    assert "| intended use | Triage of news by &lt;analysts&gt; |" in card
    assert "- Non-commercial: the data is under cc-by-nc-sa-3.0, which forbids commercial use;" in card
    assert isinstance(json.loads((finished / "flips.json").read_text()), list)
    texts = [row["text"] for row in small.rows("test")]
    assert not any(text in content for text in texts for content in (card, json.dumps(figures)))


def test_what_people_say_later_is_shown_and_kept_and_nothing_measured_moves(
    finished: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert call("card", out, "governance.owner=Model Risk <b>", "governance.monitoring=[agreement below 0.9]") == 2
    assert "governance.monitoring: " in capsys.readouterr().err
    assert call("card", out, "governance.owner=Model Risk <b>") == 0
    assert call("card", out, "model.license=cc-by-nc-sa-3.0", "governance.contact=risk@example.com") == 0
    for name in ("", "masked", "compact"):
        card = (out / name / "README.md").read_text()
        assert "| owner | Model Risk &lt;b&gt; |" in card
        assert "| contact | risk@example.com |" in card
        assert "CONFLICT" not in card
        assert metadata_load(out / name / "README.md")["license"] == "cc-by-nc-sa-3.0"
    for name in ("masked", "compact"):
        assert verify(out / name)["format"] == name
    for name in ("report.json", "recipe.yaml"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    capsys.readouterr()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text('{"recipe": {"export": []}}')
    for folder, override, said in (
        (tmp_path / "old", "governance.owner=x", "is damaged, or of another version"),
        (out, "gates.macro_f1=0.1", "gates: unknown key"),
        (out, "model.name=other", "model.name: unknown key"),
        (out / "masked", "governance.owner=x", "is one format of a run; name the folder above it"),
        (tmp_path, "governance.owner=x", "there is no"),
    ):
        assert call("card", folder, override) == 2
        assert said in capsys.readouterr().err


def test_the_hub_s_own_reader_finds_the_metadata(finished: Path, tmp_path: Path) -> None:
    figures = figures_of(finished)
    figures["base_model"]["hub_id"], figures["data"]["hub_id"] = "org/base", "org/data"
    written = write_card(figures, tmp_path, [], {"governance": {"language": "de"}})
    data = ModelCard.load(written[0]).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/base", "finetune", "apache-2.0")
    assert (data.datasets, data.language, data.library_name) == ("org/data", "de", "transformers")
    assert data.pipeline_tag == "text-classification"
    assert data.eval_results is not None
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {name: round(figures[name]["pruned"], 4) for name in ("accuracy", "macro_f1", "mcc")}
    assert {result.dataset_type for result in data.eval_results} == {"org/data"}
    local = metadata_load(finished / "README.md")
    assert local is not None
    assert not {"base_model", "base_model_relation", "datasets", "language"} & set(local), (
        "folders of this machine are nobody else's, and nobody has said of which language they are"
    )
    figures["recipe"]["task"]["dataset"] = "builtin"
    assert ModelCard.load(write_card(figures, tmp_path, [])[0]).data.language == "en"


def test_a_run_that_was_asked_nothing_says_so(finished: Path, tmp_path: Path) -> None:
    card = write_card(figures_of(finished) | {"evidence": None}, tmp_path, [])[0].read_text()
    assert "measured no calibration, slices, robustness or non-inferiority" in card
    assert not any(f"### {name}" in card for name in ("Calibration", "Slices", "Robustness"))
    assert "| F1 per class |" in card


def test_a_card_says_that_the_target_was_missed(finished: Path, tmp_path: Path) -> None:
    missed = {"target": {"kind": "flops", "asked": 0.5, "predicted": 0.5, "measured": 0.7, "met": False}}
    given = figures_of(finished) | {"collapsed": False, "exported": {}}
    card = write_card(given | missed, tmp_path, [])[0].read_text()
    assert "**MISSED the target: flops 0.5 of the dense model's was asked.**" in card


def test_a_card_says_how_long_either_model_was_trained(finished: Path, tmp_path: Path) -> None:
    given = figures_of(finished)
    given["recipe"] |= {"dense": {"checkpoint": "elsewhere", "training": {}}, "recovery": {"num_train_epochs": 1}}
    given["recipe"]["training"] = {"num_train_epochs": 2.5}
    card = write_card(given, tmp_path, [])[0].read_text()
    assert "The dense model was taken as it is; the pruned one began as its copy and was trained for" in card
    assert "for 2.5 epochs more and 1 epoch of recovery." in card


@pytest.mark.parametrize(
    ("declared", "base", "data", "conflict", "notes"),
    [
        ("apache-2.0", "apache-2.0", "mit", False, []),
        ("apache-2.0", "cc-by-nc-4.0", None, True, ["Non-commercial: the base model"]),
        (
            "cc-by-nc-4.0",
            "cc-by-nc-4.0",
            "cc-by-sa-4.0",
            True,
            ["Non-commercial: the base model", "Share-alike: the data"],
        ),
        ("cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", None, False, ["Non-commercial: the base", "No derivatives: the base"]),
        (None, None, "gpl-3.0", False, ["Share-alike: the data"]),
        ("mit", "nvidia-open-model-license", "cc-by-4.0", False, []),
    ],
)
def test_licenses_in_plain_words(
    declared: str | None, base: str | None, data: str | None, conflict: bool, notes: list[str]
) -> None:
    sources = {"the base model": base, "the data": data}
    assert (license_conflict(declared, sources) is not None) == conflict
    for found, begin in zip(license_notes(sources), notes, strict=True):
        assert found.startswith(begin)


def test_names_that_cannot_be_read_are_refused_before_training(content: dict[str, Any]) -> None:
    asked = {"perturbations": [{"name": "companies", "names": "nowhere.txt"}]}
    with pytest.raises(InputError, match=r"^companies\.names: nowhere\.txt is no readable"):
        read(parse(content | {"evidence": asked}))


@pytest.mark.slow
def test_the_code_of_a_card_runs_in_a_fresh_process(finished: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (finished / "README.md").read_text(), re.DOTALL)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=finished.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert any(f"'label': '{label}'" in done.stdout for label in LABELS), done.stdout


def test_a_card_tells_what_a_model_learned_from(finished: Path, tmp_path: Path) -> None:
    figures = figures_of(finished)
    assert "distillation from dense: alpha 0.9, kl at temperature 2.0 of logits" in (finished / "README.md").read_text()
    figures["recipe"]["distillation"] |= {"teacher": "/home/me/outputs/fiqa/dense", "logits": "mse"}
    figures["recipe"]["cosines"] = {"encoder": "/home/me/minilm", "alpha": 0.7, "scale": 10.0}
    card = write_card(figures, tmp_path, [])[0].read_text()
    assert "distillation from fiqa/dense: alpha 0.9, mse of logits" in card
    assert "cosines of me/minilm, taught to the dense model and the pruned one: alpha 0.7" in card
    assert "/home" not in card
