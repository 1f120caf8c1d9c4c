"""The output of a run, as small as it can be: two formats with card, recipe and report."""

import json
import shutil
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_format
from tests.conftest import loud, tiny_model

CARD = """---
language: en
library_name: transformers
---

# out

All gates of this run passed.

## Use

classify = pipeline("text-classification", model="out/compact")
"""


QUOTED = "The loss widened, our client said."  # a text of the data, which the files for people here may quote


def write_output(
    folder: Path, tokenizer: PreTrainedTokenizerFast, formats: tuple[str, ...] = ("masked", "compact"), seed: int = 0
) -> Path:
    model = loud(tiny_model(seed=seed))
    with torch.no_grad():
        for block in model.bert.encoder.layer:
            block.intermediate.dense.weight[32:] = 0
            block.intermediate.dense.bias[32:] = 0
            block.output.dense.weight[:, 32:] = 0
    for name in formats:
        find_format(name)(model, tokenizer, folder / name)
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "density.png").write_bytes(b"\x89PNG" + bytes(200))
    (folder / "README.md").write_text(CARD)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": "/home/me/deals/model", "output": "outputs/mine"}))
    report(folder, True)
    (folder / "recorder.parquet").write_bytes(b"PAR1")
    (folder / "runs" / "prune").mkdir(parents=True)
    (folder / "runs" / "prune" / "events.out.tfevents.1").write_bytes(b"logged")
    (folder / "governance.yaml").write_text("governance: {owner: Model Risk}\n")
    for name in ("report.html", "flips.json", "bad_rows.jsonl"):
        (folder / name).write_text(f'[{{"text": "{QUOTED}"}}]')
    model.save_pretrained(folder / "dense")
    for name in formats:
        shutil.copytree(folder / "plots", folder / name / "plots")
        for file in ("README.md", "recipe.yaml"):
            shutil.copy(folder / file, folder / name / file)
    return folder


def report(folder: Path, passed: bool) -> None:
    gate = {"threshold": 0.8, "value": 0.9 if passed else 0.7, "passed": passed}
    (folder / "report.json").write_text(json.dumps({"passed": passed, "gates": {"agreement": gate}}))
