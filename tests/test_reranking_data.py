"""The embedded reranking data: whole, without leakage between splits, and hard for a reader of words alone."""

import json
import re
from collections import Counter
from functools import cache
from statistics import median
from typing import Any

import pytest

from finllm_prune.tasks.task import BUILTIN

FOLDER = BUILTIN / "reranking"
SPLITS = ("train", "validation", "test")
HEADER = "query-id\tcorpus-id\tscore"


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@cache
def qrels(split: str) -> list[list[str]]:
    header, *lines = (FOLDER / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    assert header == HEADER
    return [line.split("\t") for line in lines]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"\d+", "0", text.lower()))


def test_there_are_enough_questions_and_passages() -> None:
    corpus, queries = rows("corpus.jsonl"), rows("queries.jsonl")
    assert len(corpus) >= 600
    assert len(queries) >= 150
    assert all(set(row) == {"_id", "title", "text"} and all(row.values()) for row in corpus)
    assert all(set(row) == {"_id", "text"} and all(row.values()) for row in queries)
    assert all(30 <= len(row["text"].split()) <= 90 for row in corpus)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_no_text_or_id_occurs_twice(name: str) -> None:
    assert max(Counter(row["_id"] for row in rows(name)).values()) == 1
    assert max(Counter(" ".join(words(row["text"])) for row in rows(name)).values()) == 1


def test_two_passages_share_at_most_one_run_of_eight_words() -> None:
    runs = [
        {tuple(text[i : i + 8]) for i in range(len(text) - 7)}
        for text in (words(r["text"]) for r in rows("corpus.jsonl"))
    ]
    owners: dict[tuple[str, ...], list[int]] = {}
    for passage, found in enumerate(runs):
        for run in found:
            owners.setdefault(run, []).append(passage)
    shared = Counter((a, b) for passages in owners.values() for a in passages for b in passages if a < b)
    assert max(shared.values(), default=0) <= 1, shared.most_common(3)


def test_every_judgement_points_to_a_question_and_a_passage_once() -> None:
    pairs = [(query, passage, grade) for split in SPLITS for query, passage, grade in qrels(split)]
    assert {query for query, _, _ in pairs} == {row["_id"] for row in rows("queries.jsonl")}
    assert {passage for _, passage, _ in pairs} <= {row["_id"] for row in rows("corpus.jsonl")}
    assert {grade for _, _, grade in pairs} == {"1", "2"}
    assert max(Counter((query, passage) for query, passage, _ in pairs).values()) == 1


def test_no_question_and_no_answer_lies_in_two_splits() -> None:
    for column in (0, 1):
        seen = Counter(found for split in SPLITS for found in {row[column] for row in qrels(split)})
        assert max(seen.values()) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_passages_that_do_not_answer_share_as_many_words_with_the_question_as_the_answer(split: str) -> None:
    texts = {row["_id"]: set(words(f"{row['title']} {row['text']}")) for row in rows("corpus.jsonl")}
    questions = {row["_id"]: set(words(row["text"])) for row in rows("queries.jsonl")}
    answers: dict[str, set[str]] = {}
    for query, passage, _ in qrels(split):
        answers.setdefault(query, set()).add(passage)
    distractors = []
    for query, relevant in answers.items():
        shared = {passage: len(questions[query] & text) for passage, text in texts.items()}
        best = max(shared[passage] for passage in relevant)
        distractors.append(sum(count >= best for passage, count in shared.items() if passage not in relevant))
    assert median(distractors) >= 2
