"""evaluate --suite: from a YAML file to the table, the JSON and the page; what is left out, refused, and kept."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.evaluation.non_inferiority import holm
from finllm_prune.suite import Suite, evaluate_suite, page
from finllm_prune.suite.suite import parse
from tests import small
from tests.conftest import LABELS, Call, loud, tiny_model
from tests.rankings import write_set

NASTY = "<script>alert('x')</script> & \"Alder Creek Group\" is up 5%"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two models, the second one the first with its labels turned, and data with a column; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("suite")
    for name, labels in (("dense", LABELS), ("pruned", [*LABELS[1:], LABELS[0]])):
        model = loud(tiny_model(layers=1, seed=1))
        model.config.id2label, model.config.label2id = (
            dict(enumerate(labels)),
            {each: i for i, each in enumerate(labels)},
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    small.write_folder(folder / "data")
    rows = [
        {**row, "sector": "banks" if number % 2 else "energy & <b>"} for number, row in enumerate(small.rows("test"))
    ]
    rows.append({"text": NASTY, "label": "neutral", "sector": "banks"})
    for split in ("train", "test"):
        small.write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    small.write_jsonl(folder / "data" / "validation.jsonl", rows[:3])
    return folder


def asked(home: Path, **more: Any) -> dict[str, Any]:
    """A suite of two sets, which nothing makes slow."""
    task = {"name": "sentiment", "dataset": str(home / "data"), "max_length": 32}
    return {
        "sets": [
            {"name": "first", "task": task, "slices": ["length", "numbers", "negation", "sector"],
             "published": [{"model": "Araci <2019>", "metric": "accuracy", "value": 0.86, "source": "another split"}]},
            {"name": "second", "task": task, "slices": [], "perturbations": [], "margin": 0.02},
        ],
        "speed": {"rounds": 2},
        "resamples": 3,
        **more,
    }  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_from_a_file_to_the_table_the_json_and_the_page(
    home: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(asked(home)))
    files = ["--json", tmp_path / "out.json", "--html", tmp_path / "out.html"]
    code = call(
        "evaluate", home / "pruned", "gates.agreement=1.0", "--baseline", home / "dense",
        "--suite", tmp_path / "mine.yaml", *files,
    )  # fmt: skip
    assert code == 3, "a gate failed, and everything is written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "out.html", "out.json"]
    out = capsys.readouterr().out
    assert "not shown on first, second" in out
    assert "A gate failed: agreement on first, agreement on second." in out
    assert "Araci <2019>: accuracy" in " ".join(out.split())
    assert "Brier, dense → pruned" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["suite"]["gates"] == {"agreement": 1.0}
    first, second = found["sets"]
    assert [row["part"] for row in first["slices"] if row["by"] == "sector"] == ["banks", "energy & <b>"]
    assert {row["change"]: row["rows"] for row in first["robustness"]} == {
        "numbers": 1,
        "negations": 10,
        "companies": 0,
    }
    assert [set_["tested"]["margin"] for set_ in (first, second)] == [0.01, 0.02]
    for key, p in (
        ("not_worse", lambda each: each["tested"]["p"]),
        ("paired", lambda each: each["quality"]["paired_p"]),
    ):
        assert [each["corrected_p"][key] for each in (first, second)] == pytest.approx(holm([p(first), p(second)]))
    assert first["latency"]["tokens"] == pytest.approx(
        np.median([len(row["text"].split()) for row in small.rows("test")]), abs=20
    )
    seen = Page((tmp_path / "out.html").read_text())
    assert "Araci <2019>" in seen.text
    assert "sector: energy & <b>" in seen.text
    assert not {"script", "link", "img", "iframe"} & set(seen.tags)
    assert all(link.startswith("#") for link in seen.links), "no request leaves the page"
    assert not re.search(r"url\(|@import|https?:", (tmp_path / "out.html").read_text())


def test_the_figures_are_those_of_the_models(home: Path) -> None:
    report = evaluate_suite(parse(asked(home, speed=False)), str(home / "pruned"), str(home / "dense"))
    first = report.sets[0]
    assert first.units == 10
    assert first.headline == "accuracy"
    whole = first.quality.metrics["accuracy"]
    for by in ("length", "numbers", "negation", "sector"):
        parts = [part for part in first.slices if part["by"] == by]
        assert sum(part["units"] for part in parts) == 10
        for kind in ("dense", "pruned"):
            assert sum(part["units"] * part[kind] for part in parts) / 10 == pytest.approx(whole[kind])
    same = evaluate_suite(parse(asked(home, speed=False)), str(home / "dense"), str(home / "dense"))
    assert same.sets[0].quality.agreement == 1.0
    assert first.quality.agreement == 0.0, "the same outputs have other names"
    assert all(row["difference"] == 0 for row in same.sets[0].robustness if row["rows"])
    assert (
        report.to_dict()
        == evaluate_suite(parse(asked(home, speed=False)), str(home / "pruned"), str(home / "dense")).to_dict()
    )


def test_the_table_tells_what_others_published_and_what_was_left_out(home: Path, tmp_path: Path) -> None:
    data = shutil.copytree(home / "data", tmp_path / "data")
    with (data / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": " ", "label": "neutral", "sector": "banks"}) + "\n")
    suite = asked(home, speed=False)
    suite["sets"][0]["task"] = suite["sets"][0]["task"] | {"dataset": str(data), "bad_rows": "skip"}
    suite["sets"][0]["published"].append({"model": "BM25", "metric": "ndcg_at_10", "value": 0.2, "source": "a paper"})
    report = evaluate_suite(parse(suite), str(home / "pruned"), str(home / "dense"))
    heads, rows = report.table()
    table = {row[0]: row[1:] for row in rows}
    assert report.headline().endswith("second (margin 0.02)")
    assert table["not worse by 1 point"][1].endswith(" (margin 0.02)")
    assert "margin" not in table["not worse by 1 point"][0]
    assert heads == ["", "first", "second"]
    assert table["published"] == ["Araci <2019>: accuracy 0.860\nBM25: nDCG@10 0.200", ""]
    assert table["rows left out of the set"] == ["1", ""]
    assert report.to_dict()["sets"][0]["data"]["bad_rows"] == {"test": {"no text": 1}}
    calibration = report.sets[0].calibration
    assert calibration is not None
    assert table["Brier, dense → pruned"][0] == f"{calibration['dense'].brier:.3f} → {calibration['pruned'].brier:.3f}"


def test_texts_are_shown_only_where_that_is_asked_for_and_are_text(home: Path) -> None:
    suite = parse(asked(home, speed=False))
    hidden = evaluate_suite(suite, str(home / "pruned"), str(home / "dense"))
    texts = [row["text"] for row in small.rows("test")] + [NASTY]
    for content in (page(hidden), json.dumps(hidden.to_dict())):
        assert not any(text in content for text in texts)
    shown = evaluate_suite(suite, str(home / "pruned"), str(home / "dense"), show_texts=True)
    changed = shown.sets[0].changed
    assert changed
    for row in changed:
        assert row["lost"] == (row["dense"] == row["truth"])
        assert row["dense"] != row["pruned"]
    seen = Page(page(shown))
    assert all(row["text"] in seen.text for row in changed)
    assert "script" not in seen.tags


def test_a_set_of_other_classes_is_left_out_unless_it_names_its_models(home: Path) -> None:
    data = asked(home, speed=False)
    data["sets"].append({"name": "filings", "task": "filings"})
    report = evaluate_suite(parse(data), str(home / "pruned"), str(home / "dense"))
    assert [each.name for each in report.sets] == ["first", "second"]
    assert "but the data has business" in report.left_out["filings"]
    assert "filings</b> was left out" in page(report)
    data["sets"][2]["model"] = str(home / "pruned")
    with pytest.raises(InputError, match=r"^sets\.2 \(filings\): .*predicts negative"):
        evaluate_suite(parse(data), str(home / "pruned"), str(home / "dense"))
    with pytest.raises(InputError, match="none is left to measure"):
        evaluate_suite(parse({"sets": [{"name": "a", "task": "filings"}]}), str(home / "pruned"), str(home / "dense"))


def test_queries_are_units_of_all_their_candidates(
    home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for seed in (1, 2):
        loud(tiny_model(layers=1, seed=seed, labels=["relevance"])).save_pretrained(tmp_path / f"{seed}")
        tokenizer.save_pretrained(tmp_path / f"{seed}")
    task = {"name": "reranking", "dataset": str(write_set(tmp_path / "set")), "max_length": 24, "candidates": 4}
    models = {"model": str(tmp_path / "1"), "baseline": str(tmp_path / "2")}
    data = asked(home, speed=False, gates={"ndcg_at_10_retention": 0.0})
    data["sets"] = [data["sets"][1], {"name": "passages", "task": task, "slices": ["length", "negation"], **models}]
    report = evaluate_suite(parse(data), str(home / "pruned"), str(home / "dense"), show_texts=True)
    assert ["units", "10 rows", "12 queries"] in report.table()[1]
    _, ranked = report.sets
    assert (ranked.unit, ranked.units, ranked.headline, ranked.calibration) == ("query", 12, "ndcg_at_10", None)
    parts = {(row["by"], row["part"]): row["units"] for row in ranked.slices}
    assert parts == {("length", "up to 6 words"): 12, ("negation", "without"): 12}, "of the query's words alone"
    assert {row["change"]: row["rows"] for row in ranked.robustness} == {"numbers": 0, "negations": 12, "companies": 0}
    assert ranked.changed is not None
    assert len({row["text"] for row in ranked.changed}) == len(ranked.changed), "a query is told once"
    data["gates"] = {"mse": 0.5}
    with pytest.raises(InputError, match=r"gates\.mse: none of these sets measures it"):
        evaluate_suite(parse(data), str(home / "pruned"), str(home / "dense"))


def test_answers_that_are_kept_are_not_asked_for_again(
    home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    suite = parse(asked(home, speed=False))
    models = str(home / "pruned"), str(home / "dense")
    report = evaluate_suite(suite, *models, keep=tmp_path / "kept")
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 2 * (2 + 2), "both models: the data of both sets, and two changes that touched texts"
    stamps = [path.stat().st_mtime_ns for path in files]
    files[0].unlink()  # as a killed suite leaves it
    again = evaluate_suite(suite, *models, keep=tmp_path / "kept")
    assert again.to_dict() == report.to_dict()
    assert [path.stat().st_mtime_ns for path in files][1:] == stamps[1:]
    other = tmp_path / "other"
    loud(tiny_model(layers=1, seed=5)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    evaluate_suite(suite, str(other), models[1], keep=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 12, "another model is asked"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sets", [], "sets: a list of at least one"),
        ("gate", {}, "gate: unknown key; did you mean 'gates'"),
        ("gates", {"f1": 0.5}, "gates.f1: unknown key"),
        ("gates", {"latency_ratio": 0.5}, "gates.latency_ratio: no latency is measured"),
        ("non_inferiority", {"margin": 1.5}, "non_inferiority.margin: it lies between"),
        ("resamples", 0, "resamples: a whole number above 0"),
        ("sets.0.slice", [], "sets.0.slice: unknown key; did you mean 'slices'"),
        ("sets.0.task", "sentimental", "task 'sentimental'"),
        ("sets.0.task.max_length", 1, "sets.0.task.max_length: a text needs at least 3"),
        ("sets.0.task.textcolumn", "x", "sets.0.task.textcolumn: unknown key; did you mean 'text_column'"),
        ("sets.0.perturbations", ["typos"], "sets.0.perturbations.0: unknown name 'typos'"),
        ("sets.0.published", [{"model": "x"}], "sets.0.published.0.metric: field required"),
        ("sets.1.name", "first", "two of them are called 'first'"),
        ("sets.1.margin", -1, "sets.1.margin: it is above 0"),
        ("sets.1.margin", 50, "sets.1.margin: it lies between 0 and 1"),
        ("resamples", 10.5, "resamples: "),
        ("speed", {"rounds": 0}, "speed.rounds: at least one is needed, not 0"),
        ("speed", {"batch": 0}, "speed.batch: at least one is needed, not 0"),
    ],
)
def test_what_is_wrong_with_a_suite_is_one_sentence(
    home: Path, tmp_path: Path, key: str, value: object, said: str
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(asked(home, speed=False)))
    with pytest.raises(InputError, match=re.escape(said)) as error:
        Suite.load(tmp_path / "mine.yaml", [f"{key}={json.dumps(value)}"])
    assert str(error.value).startswith(f"{tmp_path / 'mine.yaml'}: ")


def test_a_column_that_is_not_there_is_named(home: Path) -> None:
    suite = parse(asked(home) | {"sets": [asked(home)["sets"][0] | {"slices": ["region"]}]})
    with pytest.raises(
        InputError, match=r"^sets\.0 \(first\): .*no column 'region' .*its columns are text, label, sector"
    ):
        evaluate_suite(suite, str(home / "pruned"), str(home / "dense"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "mine.yaml"], "name the dense model"),
        (["--html", "x.html"], "go with --suite"),
        (["--suite", "mine.yaml", "--baseline", "b", "--task", "filings"], "remove --task"),
        (["--suite", "mine.yaml", "--baseline", "b", "--html", "no/x.html"], "--html: there is no folder no"),
        (["--suite", "mine.yaml", "--baseline", "b"], "mine.yaml: there is no such suite"),
    ],
)
def test_options_that_do_not_go_together(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("evaluate", "model", *arguments) == 2
    assert said in capsys.readouterr().err


def test_every_suite_of_the_repo_can_be_read() -> None:
    files = sorted((Path(__file__).parents[1] / "recipes" / "suites").glob("*.yaml"))
    assert {path.stem for path in files} >= {"quickstart", "finance"}
    for path in files:
        assert Suite.load(path).sets


def test_what_cannot_be_measured_is_told_before_anything_is(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finllm_prune.suite.measuring.Saved.logits", None)
    models, names = (
        (str(home / "pruned"), str(home / "dense")),
        {"name": "companies", "names": str(tmp_path / "none.txt")},
    )
    data = asked(home, speed=False)
    data["sets"][1]["perturbations"] = [names]
    with pytest.raises(InputError, match=r"^sets\.1 \(second\): companies\.names: .* is no readable UTF-8 file"):
        evaluate_suite(parse(data), *models)
    (tmp_path / "kept").write_text("")
    with pytest.raises(InputError, match=r"^--keep: .* is a file; name a folder"):
        evaluate_suite(parse(asked(home, speed=False)), *models, keep=tmp_path / "kept")


def test_a_collapsed_model_is_told_in_the_terminal(
    home: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "dense", tmp_path / "same")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "same")
    with torch.no_grad():
        model.classifier.weight.zero_()
    model.save_pretrained(tmp_path / "same")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(asked(home, speed=False)))
    assert call("evaluate", tmp_path / "same", "--baseline", home / "dense", "--suite", tmp_path / "mine.yaml") in (
        0,
        3,
    )
    assert "first: the pruned model gives every text the same answer" in capsys.readouterr().out.replace("\n", " ")


def test_scores_are_told_in_their_own_unit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "validation", "test"):
        lines = [json.dumps({"text": f"Profit rose by {i}.", "label": 10.0 * i}) for i in range(12)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join([*lines, ""]))
    for name, seed in (("dense", 0), ("pruned", 1)):
        loud(tiny_model(layers=1, seed=seed, labels=["score"])).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    task = {"name": "sentiment", "dataset": str(tmp_path / "data"), "scores": {}, "max_length": 16}
    suite = parse({"sets": [{"name": "numbers", "task": task, "margin": 50}], "speed": False, "resamples": 20})
    report = evaluate_suite(suite, str(tmp_path / "pruned"), str(tmp_path / "dense"))
    told = {row[0].strip(): row[1] for row in report.table()[1]}
    difference = report.sets[0].tested.difference
    assert told["difference, points"] == f"{difference:+.3g} (negative squared error)"
    assert told["90 % interval"].count("error") == 0
    assert f"{difference:+.3f}".replace("-", "\u2212") in page(report)
    turned = evaluate_suite(suite, str(tmp_path / "dense"), str(tmp_path / "pruned"))
    worst = min(turned.sets[0].slices, key=lambda part: float(part["difference"]))
    assert worst["difference"] < 0
    told = {row[0].strip(): row[1] for row in turned.table()[1]}
    assert told["slice that pays most"] == f"{worst['by']}: {worst['part']} {worst['difference']:+.3g}"
