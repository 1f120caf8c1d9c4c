"""Data by their Hub ids, in the layouts that they have there, from a real HTTP server: the shipped suite is read from it."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finllm_prune.tasks.task import BUILTIN
from tests.conftest import LABELS
from tests.hub.loopback import LoopbackHub
from tests.hub.shell import Shell

pytestmark = pytest.mark.slow

SUITE = Path(__file__).parents[2] / "recipes" / "suites" / "finance.yaml"
PROVISIONS = ["Adjustments", "Governing Laws", "Waivers"]
PINNED = "44023d2ee430a3be2d2ee573801616d9e1392fbd"
FIQA = "27a168819829fe9bcd655c2df245fb19452e8e06"
MTEB = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: qrels/train.jsonl}
  - {split: dev, path: qrels/dev.jsonl}
  - {split: test, path: qrels/test.jsonl}
- config_name: corpus
  data_files: [{split: corpus, path: corpus.jsonl}]
- config_name: queries
  data_files: [{split: queries, path: queries.jsonl}]
---
"""
BEIR = """---
configs:
- config_name: corpus
  data_files: [{split: corpus, path: corpus/corpus.parquet}]
- config_name: queries
  data_files: [{split: queries, path: queries/queries.parquet}]
---
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    return file.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def embedded(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (BUILTIN / path).read_text(encoding="utf-8").splitlines()]


def sentences(column: str) -> list[dict[str, Any]]:
    return [{column: row["text"], "label": LABELS.index(row["label"])} for row in embedded("sentiment/test.jsonl")[:60]]


def judgements(split: str) -> list[dict[str, Any]]:
    lines = (BUILTIN / "reranking" / "qrels" / f"{split}.tsv").read_text().splitlines()[1:16]
    return [
        {"query-id": query, "corpus-id": passage, "score": int(score)}
        for query, passage, score in (line.split("\t") for line in lines)
    ]


@pytest.fixture(scope="module")
def hub(hub: LoopbackHub) -> LoopbackHub:
    """With the sets that the suite names."""

    def add(name: str, files: dict[str, bytes], revision: str = "main", commit: str = "a" * 40) -> None:
        repo = hub.repos.get(f"datasets/{name}") or hub.create(f"datasets/{name}", private=False)
        repo.files[commit] = files
        repo.branches[revision] = [commit]

    readme = {"README.md": b"---\nlicense: cc-by-nc-sa-3.0\n---\n"}
    add("takala/financial_phrasebank", readme | {"financial_phrasebank.py": b"raise SystemExit"})
    add("owner/scripted", readme | {"scripted.py": b"raise SystemExit"})
    folders = {
        f"sentences_{name}/train/0000.parquet": parquet(sentences("sentence")[:rows])
        for name, rows in (("50agree", 60), ("allagree", 20))
    }
    add("takala/financial_phrasebank", folders, "refs/convert/parquet", "b" * 40)
    lines = jsonl(sentences("text"))
    add("mteb/FinancialPhrasebankClassification", {"train.jsonl": lines}, commit=PINNED)

    provisions = [{"text": f"Clause {n}: {PROVISIONS[n % 3]}.", "label": PROVISIONS[n % 3]} for n in range(30)]
    splits = {
        f"ledgar/{split}-00000-of-00001.parquet": parquet(provisions) for split in ("train", "validation", "test")
    }
    configs = b"---\nconfigs:\n- config_name: ledgar\n  data_files:\n" + b"".join(
        b"  - {split: %s, path: ledgar/%s-*}\n" % (split, split) for split in (b"train", b"validation", b"test")
    )
    add("coastalcph/lex_glue", {"README.md": configs + b"---\n"} | splits)

    corpus, queries = embedded("reranking/corpus.jsonl"), embedded("reranking/queries.jsonl")
    kinds = {"train": "train", "dev": "validation", "test": "test"}
    tables = {"corpus.jsonl": jsonl(corpus), "queries.jsonl": jsonl(queries)}
    tables |= {f"qrels/{name}.jsonl": jsonl(judgements(kind)) for name, kind in kinds.items()}
    add("mteb/fiqa", {"README.md": MTEB.encode()} | tables, commit=FIQA)
    parts = MTEB.replace("config_name: default", "config_name: en-qrels").replace("config_name: ", "config_name: en-")
    add("mteb/parts", {"README.md": parts.replace("en-en-", "en-").encode()} | tables)
    tables = {"corpus/corpus.parquet": parquet(corpus), "queries/queries.parquet": parquet(queries)}
    add("BeIR/fiqa", {"README.md": BEIR.encode()} | tables)
    tsv = {
        f"{kind}.tsv": pd.DataFrame(judgements(kind)).to_csv(sep="\t", index=False).encode() for kind in kinds.values()
    }
    add("BeIR/fiqa-qrels", tsv)
    return hub


def test_the_suite_of_hub_ids_is_read_as_it_is_shipped(
    shell: Shell, hub: LoopbackHub, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    models = {}
    for name, labels in {"words": LABELS, "parts": PROVISIONS, "order": ["relevance"]}.items():
        models[name] = tiny_folder(labels=labels).rename(tmp_path / name)
    named = [
        f"sets.{number}.{role}={models[name]}"
        for number, name in ((2, "parts"), (3, "order"))
        for role in ("model", "baseline")
    ]
    done = shell(
        "evaluate", models["words"], "--baseline", models["words"], "--suite", SUITE, "--json", tmp_path / "out.json",
        "speed=null", "resamples=3", *named,
    )  # fmt: skip
    assert done.code in (0, 3), done.all
    found = {each["name"]: each for each in json.loads((tmp_path / "out.json").read_text())["sets"]}
    queries = {row["query-id"] for row in judgements("test")}
    assert {name: each["units"] for name, each in found.items()} == {
        "Financial PhraseBank": 12, "Financial PhraseBank, all agree": 12, "LEDGAR": 30, "FiQA-2018": len(queries),
    }  # fmt: skip
    assert "refs/convert/parquet" in found["Financial PhraseBank"]["source"]
    assert PINNED in found["Financial PhraseBank, all agree"]["source"]
    assert FIQA in found["FiQA-2018"]["source"]
    assert {each["quality"]["agreement"] for each in found.values()} == {1.0}
    assert not any("financial_phrasebank.py" in call.line and call.line.startswith("GET") for call in hub.calls)


def test_beir_with_its_judgements_in_a_repository_of_their_own(
    shell: Shell, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_folder(labels=["relevance"])
    figures = {}
    for name in ("BeIR/fiqa", "mteb/fiqa"):
        out = tmp_path / f"{name.partition('/')[0]}.json"
        done = shell("evaluate", model, "--task", "reranking", "--dataset", name, "--max-length", 32, "--json", out)
        assert done.code == 0, done.all
        figures[name] = json.loads(out.read_text())
    assert figures["BeIR/fiqa"] == figures["mteb/fiqa"]
    assert figures["mteb/fiqa"]["ndcg_at_10"]["first_stage"] > 0.3, "BM25 knows what the words are"


def test_a_part_of_a_set_and_a_pin_that_judgements_elsewhere_would_miss(
    shell: Shell, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_folder(labels=["relevance"])
    sets = {"part": {"dataset": "mteb/parts", "config": "en"}, "pinned": {"dataset": "BeIR/fiqa", "revision": "a" * 40}}
    done = {}
    for name, keys in sets.items():
        task = {"name": "reranking", "max_length": 32, "candidates": 4, **keys}
        suite = {"sets": [{"name": name, "task": task, "perturbations": []}], "speed": False, "resamples": 3}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(suite))
        done[name] = shell("evaluate", model, "--baseline", model, "--suite", tmp_path / f"{name}.yaml")
    assert done["part"].code == 0, done["part"].all
    assert done["pinned"].code == 2
    assert "task.revision: the judgements of BeIR/fiqa lie in BeIR/fiqa-qrels" in done["pinned"].all


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("owner/scripted", "Dataset scripts are no longer supported"),
        ("nobody/nothing", "check the name and the network"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(
    shell: Shell, tiny_folder: Callable[..., Path], name: str, told: str
) -> None:
    done = shell("evaluate", tiny_folder(), "--task", "sentiment", "--dataset", name)
    assert done.code == 2
    assert told in done.all
    assert "Traceback" not in done.all
