"""The task reranking: rows, losses, judge, a whole run, and the same scores from CrossEncoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.evaluation import compare
from finllm_prune.inference import answer, logits_of
from finllm_prune.judges import RankingJudge
from finllm_prune.recipe import Recipe
from finllm_prune.settings import build
from finllm_prune.tasks import KEPT
from finllm_prune.tasks.masking import Mask
from finllm_prune.tasks.reranking import Reranking
from finllm_prune.tasks.splitting import Split
from finllm_prune.training import Distillation, Teacher, with_teacher_logits
from finllm_prune.training.logit_losses import margin_mse, mse
from tests.conftest import loud, tiny_model
from tests.rankings import TOPICS, write_set

JUDGED = {"a": {"p1": 2, "p2": 0, "p3": 1}, "b": {"p1": 1}, "c": {"p9": 1}}
ONE = ["relevance"]
POOLS = {"a": ["p1", "p2", "p3", "p4"], "b": ["p2", "p1"], "c": []}


def scorer(seed: int = 0) -> torch.nn.Module:
    return loud(tiny_model(seed=seed, labels=ONE))


@pytest.fixture
def task(tmp_path: Path) -> Reranking:
    return Reranking(str(write_set(tmp_path / "set")), max_length=24, negatives=2, candidates=4)


# The judge


def test_values_of_queries_are_those_of_the_papers() -> None:
    judge = RankingJudge(JUDGED, POOLS)
    answers = judge.answers(torch.tensor([0.9, 0.8, 0.1, -1.0, 3.0, 2.0])[:, None])
    ideal = ndcg_score([[2, 0, 1, 0]], [[0.9, 0.8, 0.1, -1.0]], k=10)
    assert answers["ndcg_at_10"] == pytest.approx([ideal, 1 / np.log2(3), 0.0])
    assert answers["mrr_at_10"] == pytest.approx([1.0, 0.5, 0.0])
    assert answers["map"] == pytest.approx([(1 + 2 / 3) / 2, 0.5, 0.0])
    assert answers["recall_at_10"] == pytest.approx([1.0, 1.0, 0.0])
    assert answers["recall_at_100"] == pytest.approx([1.0, 1.0, 0.0])
    assert judge.value("mrr_at_10", answers) == pytest.approx(0.5)
    assert judge.value("mrr_at_10", answers, np.array([0, 0, 1])) == pytest.approx(2.5 / 3)


def test_what_is_relevant_and_no_candidate_counts_as_missed() -> None:
    judge = RankingJudge({"a": {"p1": 1, "p7": 1}}, {"a": ["p1", "p2"]})
    answers = judge.answers(torch.tensor([[1.0], [0.0]]))
    assert judge.value("recall_at_10", answers) == 0.5
    assert judge.value("ndcg_at_10", answers) == pytest.approx(1 / (1 + 1 / np.log2(3)))


def test_recall_counts_what_lies_within_its_depth() -> None:
    judge = RankingJudge({"q": {"p3": 1, "p50": 1, "p150": 2, "gone": 1}}, {"q": [f"p{i}" for i in range(200)]})
    answers = judge.answers(torch.linspace(1, 0, 200)[:, None])
    assert (judge.value("recall_at_10", answers), judge.value("recall_at_100", answers)) == (0.25, 0.5)


def test_scores_that_are_no_numbers_come_last_and_equal_scores_are_a_collapse() -> None:
    judge = RankingJudge(JUDGED, POOLS)
    answers = judge.answers(torch.tensor([float("nan"), 1.0, 0.0, 0.5, 1.0, float("inf")])[:, None])
    assert answers["mrr_at_10"] == pytest.approx([1 / 3, 1.0, 0.0])
    assert not judge.collapsed(answers)
    assert judge.collapsed(judge.answers(torch.full((6, 1), 0.3)))


def test_dense_and_pruned_are_compared_by_queries() -> None:
    judged = {f"q{i}": {"p0": 1} for i in range(40)}
    judge = RankingJudge(judged, {query: ["p0", "p1", "p2"] for query in judged})
    good = torch.tensor([3.0, 2.0, 1.0] * 40)[:, None]
    bad = good.clone()
    bad[: 3 * 20 : 3] = 0.0  # the relevant passage of half of the queries comes last
    quality = compare(judge, good, bad, resamples=99)
    assert quality.unit == "query"
    assert quality.flips == {"worse": 20, "better": 0}
    assert quality.agreement == 0.5
    assert quality.paired_p < 0.001
    assert quality.retention["mrr_at_10"] == pytest.approx(2 / 3)
    assert (
        quality.metrics["mrr_at_10"]["pruned_interval"][0] < 2 / 3 < quality.metrics["mrr_at_10"]["pruned_interval"][1]
    )
    assert compare(judge, good, good, resamples=9).paired_p == 1.0


# Rows and losses


def test_training_rows_are_lists_and_the_others_pairs(task: Reranking, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = task.load()
    assert examples.facts["queries"] == {"train": 12, "validation": 12, "test": 12}
    assert examples.facts["first_stage"]["test"]["recall"] == 1.0
    train, test = (task.tokenize(examples.splits[name], tokenizer) for name in ("train", "test"))
    assert len(train) == 24  # a list for each relevant passage
    assert len(test) == 48
    assert sorted(train["labels"][0]) == [0, 0, 2]
    query, passages = examples.splits["train"]["text"][0], examples.splits["train"]["passages"][0]
    for ids, passage in zip(train["input_ids"][0], passages, strict=True):
        assert ids == tokenizer(query, passage, truncation=True, max_length=24)["input_ids"]
    batch = task.collator(tokenizer)([train[0], train[1]])
    assert batch["parts"].tolist() == [3, 3]
    assert batch["labels"].shape == (2, 3)
    assert "parts" not in task.collator(tokenizer)([test[0], test[1]])
    assert len(Reranking(task.dataset, max_length=24, negatives=1, draws=3).load().splits["train"]) == 72


def test_a_short_list_is_filled_up_and_teaches_as_it_is(task: Reranking, tokenizer: PreTrainedTokenizerFast) -> None:
    wide = Reranking(task.dataset, max_length=24, negatives=5, candidates=4)  # four candidates, two of them relevant
    rows = wide.tokenize(wide.load().splits["train"], tokenizer)
    assert rows["labels"][0] == [2, 0, 0, -100, -100, -100]
    collator, model = wide.collator(tokenizer), scorer()
    batch = collator([rows[0], rows[1]])
    scores = answer(model, batch, collator.gather)["logits"]
    assert scores.shape == (2, 6)
    narrow = [scores[i : i + 1, :3] for i in range(2)]
    for objective in ("bce", "pairwise", "ranknet", "listnet", "lambda"):
        loss = Reranking(task.dataset, negatives=5, objective=objective).loss(wide.load())
        assert loss is not None
        each = [loss(scores, batch["labels"][i : i + 1, :3]) for i, scores in enumerate(narrow)]
        torch.testing.assert_close(loss(scores, batch["labels"]), torch.stack(each).mean())


def test_margins_are_distilled_whatever_is_added_to_all_scores() -> None:
    student, teacher = (
        torch.tensor([[1.0, 0.0, 5.0], [2.0, 0.0, 0.0]]),
        torch.tensor([[3.0, 1.0, 9.0], [9.0, 9.0, 9.0]]),
    )
    relevance = torch.tensor([[1, 0, -100], [1, 0, 0]])
    # Margins 1 and 2; 2 and 0; 2 and 0.
    assert margin_mse(student, teacher, relevance).item() == pytest.approx((1 + 4 + 4) / 3)
    shifted = teacher + torch.tensor([[7.0], [-3.0]])
    assert margin_mse(student, shifted, relevance).item() == pytest.approx((1 + 4 + 4) / 3)


def test_squared_errors_are_of_the_passages_that_are_there() -> None:
    student, teacher = (
        torch.tensor([[1.0, 2.0, 0.0], [4.0, 4.0, 4.0]]),
        torch.tensor([[0.0, 0.0, 9.0], [4.0, 5.0, 6.0]]),
    )
    there = torch.tensor([[1, 0, -100], [0, 1, 0]])
    assert mse(student, teacher, there).item() == pytest.approx((1 + 4 + 0 + 1 + 4) / 5)
    assert mse(student[1], teacher[1]).item() == pytest.approx(5 / 3)


def test_a_teacher_of_one_output_teaches_margins_in_lists_and_values_elsewhere(
    task: Reranking, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = task.tokenize(task.load().splits["train"], tokenizer).select(range(4))
    collator, student, other = task.collator(tokenizer), scorer(0), scorer(1)
    batch = collator(list(rows))
    mine, theirs = (answer(model, batch, collator.gather)["logits"] for model in (student, other))
    teacher = Teacher(other, Distillation(alpha=1.0, hidden=0), [0, 1])
    loss = teacher.loss({"logits": mine, "loss": torch.zeros(())}, batch, collator.gather)
    torch.testing.assert_close(loss, margin_mse(mine, theirs, batch["labels"]))
    cached = with_teacher_logits(other, rows, collator, tmp_path)
    kept = teacher.loss({"logits": mine, "loss": torch.zeros(())}, collator(list(cached)), collator.gather)
    torch.testing.assert_close(kept, loss, rtol=1e-4, atol=1e-5)
    scores = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": torch.rand(12)}
    flat = teacher.loss({"logits": student(**scores).logits, "loss": torch.zeros(())}, scores)
    torch.testing.assert_close(flat, (student(**scores).logits - other(**scores).logits).square().mean())


def test_a_sample_copies_and_a_missing_validation_split(tmp_path: Path) -> None:
    more = {"queries.jsonl": [json.dumps({"_id": "again", "text": "WHAT is said of the goodwill"})]}
    folder = write_set(tmp_path / "set", more | {"qrels/test.tsv": ["again\tgoodwill0\t1"]})
    kept = Reranking(str(folder), deduplicate=True, candidates=4).load()
    assert kept.facts["dropped_copies"] == {"train": 1, "validation": 0, "test": 0}
    assert "q-goodwill0" not in kept.judged["train"]
    (folder / "qrels" / "validation.tsv").unlink()
    examples = Reranking(str(folder), train_rows=6, test_rows=4, candidates=4).load()
    assert examples.facts["queries"] == {"train": 5, "validation": 1, "test": 4}
    assert len(examples.splits["test"]) == 16
    assert not set(examples.judged["train"]) & set(examples.judged["validation"])
    assert examples.facts["leakage"]["test in train"]["exact"] == 0


def test_queries_that_teach_or_tell_nothing_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {"queries.jsonl": [json.dumps({"_id": name, "text": "zebra"}) for name in ("alone", "vain")]}
    more |= {"qrels/train.tsv": ["alone\tlease0\t1"], "qrels/test.tsv": ["vain\tlease0\t0"]}
    examples = Reranking(str(write_set(tmp_path / "set", more)), candidates=4).load()
    assert examples.facts["bad_rows"] == {}
    assert examples.facts["queries_left_out"] == {
        "test": {"no relevant passage": 1},
        "train": {"no candidate that is not relevant": 1},
    }
    assert examples.facts["queries"]["train"] == 13
    assert "queries of test are left out: 1 with no relevant passage." in caplog.text


def test_columns_of_queries_stay_beside_their_pairs(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    lines = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    told = [row | {"sector": TOPICS[i // 3], "year": 2000 + i} for i, row in enumerate(lines)]
    told[2]["sector"] = 7  # of q-goodwill2
    del told[5]["year"]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    plain = Reranking(str(folder), candidates=4).load()
    kept = Reranking(str(folder), candidates=4, keep_columns=["sector", "year"]).load()
    assert kept.fingerprint() == plain.fingerprint()
    rows = kept.splits["test"]
    sectors = dict(zip(rows["text"], rows[f"{KEPT}sector"], strict=True))
    assert sectors["which rule holds for the lease"] == "lease"
    assert sectors["which rule holds for the goodwill"] == "7", "a column is of numbers or of texts"
    assert rows[f"{KEPT}year"][:5] == [2002] * 4 + [None]
    with pytest.raises(
        InputError, match=r"^task\.keep_columns: queries of the local folder set have no column 'branch'"
    ):
        Reranking(str(folder), keep_columns=["branch"]).load()


def with_columns(folder: Path) -> Path:
    """The set, its queries dated by their number: three of each topic, a month apart."""
    write_set(folder)
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    told = [
        row | {"date": f"2026-{1 + i % 3:02}-{1 + i // 3:02}", "about": TOPICS[i // 3]} for i, row in enumerate(rows)
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return folder


def test_queries_are_divided_anew_by_date_with_their_candidates(tmp_path: Path) -> None:
    folder = with_columns(tmp_path / "set")
    task = Reranking(str(folder), candidates=4, split=Split(by="date", validation=0.25, test=0.25))
    examples = task.load()
    assert examples.facts["split"]["kind"] == "time"
    assert examples.facts["split"]["test"] == ["2026-03-04", "2026-03-12"]
    assert {name: len(judged) for name, judged in examples.judged.items()} == {"train": 18, "validation": 9, "test": 9}
    assert all(query.endswith("2") for query in examples.judged["test"])
    assert examples.judged["test"]["q-lease2"] == {"lease0": 2, "lease1": 1}
    assert len(examples.splits["test"]) == 36
    (folder / "candidates").mkdir()
    lines = [f"q-{topic}{i}\tswap1\n" for topic in TOPICS for i in range(3)]
    (folder / "candidates" / "test.tsv").write_text("".join(lines))
    assert set(task.load().splits["test"]["pair"]) == {"swap in march the swap was paid"}
    (folder / "candidates" / "test.tsv").write_text("".join(lines[5:]))
    with pytest.raises(InputError, match=r"^task\.split: 5 of 36 queries .* have no given candidates"):
        task.load()
    content = (folder / "queries.jsonl").read_text().replace('"date": "2026-01-01"', '"date": "soon"')
    (folder / "queries.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"^task\.split\.by: 1 queries .* column 'date', the first 'q-goodwill0'"):
        task.load()


def test_names_go_from_queries_and_passages(tmp_path: Path) -> None:
    folder = with_columns(tmp_path / "set")
    (tmp_path / "names.txt").write_text("goodwill\n")
    examples = Reranking(
        str(folder), candidates=4, mask=Mask(column="about", word="FIRM"), normalise_numbers=True
    ).load()
    assert examples.facts["masked"] == {"queries": 36, "passages": 48}
    assert set(examples.splits["validation"]["text"]) == {"how is the FIRM treated"}
    only = Reranking(str(folder), candidates=4, mask=Mask(names=str(tmp_path / "names.txt"))).load()
    assert only.facts["masked"] == {"queries": 3, "passages": 4}
    assert "how is the COMPANY treated" in only.splits["validation"]["text"]


def test_given_candidates_are_ranked_and_where_there_are_none_bm25_finds_them(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "candidates").mkdir()
    (folder / "candidates" / "test.tsv").write_text("q-lease2\tswap1\nq-lease2\tlease0\nq-lease2\tlease1\n")
    (folder / "candidates" / "train.tsv").write_text("".join(f"q-{topic}0\tswap1\n" for topic in TOPICS))
    (folder / "qrels" / "validation.tsv").unlink()
    examples = Reranking(str(folder), candidates=2).load()
    assert examples.splits["test"]["pair"][:] == [
        "swap in march the swap was paid",
        "lease the lease is tested once a year",
    ]
    assert examples.facts["first_stage"]["name"] == "the data's own first stage"
    assert examples.facts["first_stage"]["test"]["queries_without_candidates"] == 11
    assert examples.facts["first_stage"]["test"]["recall"] == pytest.approx(0.5 / 12)
    assert {passages[1] for passages in examples.splits["train"]["passages"]} == {"swap in march the swap was paid"}
    assert set(examples.splits["validation"]["pair"]) == {"swap in march the swap was paid"}


def test_a_set_for_evaluation_alone_says_so_to_a_run(task: Reranking) -> None:
    for split in ("train", "validation"):
        (Path(task.dataset) / "qrels" / f"{split}.tsv").unlink()
    examples = task.load()
    assert list(examples.splits) == ["test"]
    with pytest.raises(InputError, match="has no training split"):
        task.loss(examples)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"negatives": 0}, r"task\.negatives: at least one passage"),
        ({"draws": 0}, r"task\.draws: at least one list"),
        ({"max_length": 4}, r"task\.max_length: a query and a passage need"),
        ({"objective": "rank"}, r"task\.objective"),
        ({"bm25": {"b": 2}}, r"task\.bm25: k1 is not negative and b lies in 0\.\.1"),
        ({"bm25": {"k": 2}}, r"task\.bm25\.k"),
    ],
)
def test_knobs_that_do_not_fit_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(Reranking, settings, "task")


# Whole runs


def recipe(folder: Path, model: Path, out: Path) -> dict[str, object]:
    return {
        "model": str(model), "task": {"name": "reranking", "dataset": str(folder), "max_length": 24, "negatives": 2},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "taylor", "sparsity": 0.5}]},
        "training": {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "report_to": "none",
                     "train_sampling_strategy": "group_by_length", "use_cpu": True, "disable_tqdm": True,
                     "eval_strategy": "steps", "eval_steps": 3},
        "gates": {"ndcg_at_10_retention": 0.01}, "output": str(out),
    }  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path, tiny_folder, call) -> Path:
    model = tiny_folder()
    classifier = loud(AutoModelForSequenceClassification.from_pretrained(model))
    classifier.config.problem_type = "single_label_classification"  # as that of one that was fine-tuned before
    classifier.save_pretrained(model)
    written = recipe(write_set(tmp_path / "set"), model, tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(json.dumps(written))
    assert call("run", tmp_path / "recipe.yaml") == 0
    return tmp_path / "out"


def test_a_run_ranks_and_its_folders_are_cross_encoders(finished: Path, call, capsys) -> None:
    report = json.loads((finished / "report.json").read_text())
    ndcg = report["ndcg_at_10"]
    assert 0 < ndcg["pruned"] <= 1
    assert report["data"]["first_stage"]["name"] == "BM25 (k1 0.9, b 0.4)"
    assert ndcg["first_stage"] == report["data"]["first_stage"]["test"]["ndcg_at_10"]
    assert ndcg["dense_above_first_stage"] == pytest.approx(ndcg["dense"] - ndcg["first_stage"])
    low, high = ndcg["pruned_above_first_stage_interval"]
    assert low < ndcg["pruned_above_first_stage"] < high
    assert report["data"]["test_labels"] == {"relevant": 24, "others": 24}
    card = (finished / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card
    assert "CrossEncoder(" in card
    assert "F1" not in card
    assert "nDCG@10 of BM25" in card

    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    task = Reranking(str(finished.parent / "set"), max_length=24, candidates=4)
    rows = task.load().splits["test"]
    model, tokenizer = (
        auto.from_pretrained(finished / "compact") for auto in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    assert tokenizer.model_max_length == 24
    own = logits_of(model, task.tokenize(rows, tokenizer), task.collator(tokenizer))[:, 0]
    encoder = cross_encoder(str(finished / "compact"), device="cpu")
    pairs = [*zip(rows["text"], rows["pair"], strict=True)]
    torch.testing.assert_close(torch.tensor(encoder.predict(pairs)), own.sigmoid(), rtol=1e-4, atol=1e-5)

    capsys.readouterr()
    out = finished.parent / "figures.json"
    assert call("evaluate", finished / "compact", "--task", "reranking", "--dataset", task.dataset, "--json", out) == 0
    found = json.loads(out.read_text())["ndcg_at_10"]
    assert found["value"] == pytest.approx(ndcg["pruned"])
    assert found["above_first_stage_interval"] == pytest.approx([low, high])
    assert "nDCG@10 of BM25" in capsys.readouterr().out


def test_the_base_model_s_own_activation_goes_along(tmp_path: Path, tiny_folder) -> None:
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    folder = tiny_folder(labels=ONE)
    config = json.loads((folder / "config.json").read_text())
    written = config | {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    (folder / "config.json").write_text(json.dumps(written))
    task = Reranking()
    task.auto_class.from_pretrained(str(folder), **task.head_config(ONE)).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    encoder = cross_encoder(str(tmp_path / "saved"), device="cpu")
    assert isinstance(encoder.activation_fn, torch.nn.Identity)


def test_a_plan_is_made_of_lists(tmp_path: Path, tiny_folder, call, capsys) -> None:
    written = recipe(write_set(tmp_path / "set"), tiny_folder(labels=ONE), tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(json.dumps(written))
    assert call("plan", tmp_path / "recipe.yaml") == 0
    assert "training time" in capsys.readouterr().out


def test_classes_cannot_be_compared_where_there_is_one_output(tmp_path: Path, tiny_folder, call, capsys) -> None:
    written = recipe(write_set(tmp_path / "set"), tiny_folder(labels=ONE), tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(json.dumps(written | {"distillation": {"logits": "kl"}}))
    assert call("run", tmp_path / "recipe.yaml") == 2
    assert "distillation.logits: kl compares classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "recipes" / "reranking").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_recipes_are_read_and_hold_a_gate_on_the_order(path: Path) -> None:
    loaded = Recipe.load(path)
    assert isinstance(loaded.task, Reranking)
    assert "ndcg_at_10_retention" in loaded.gates
