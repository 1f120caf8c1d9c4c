"""Retrieval data: the layouts that are read, and every broken row with its file and line."""

import gzip
import json
from pathlib import Path

import pytest

from finllm_prune.errors import InputError
from finllm_prune.tasks.beir import read_beir
from finllm_prune.tasks.candidates import BM25, training_lists
from tests.rankings import TOPICS, write_set

BROKEN = [
    ("corpus.jsonl", '{"_id": "empty", "title": "", "text": " "}', "has no text", "no text", 49),
    (
        "corpus.jsonl",
        '{"_id": "goodwill0", "text": "again"}',
        "has the id 'goodwill0' a second time",
        "duplicate id",
        49,
    ),
    ("corpus.jsonl", '{"text": "nameless"}', "has no '_id'", "no id", 49),
    ("queries.jsonl", '{"_id": "cut", "text": "what', "is no JSON object", "unreadable", 37),
    ("qrels/train.tsv", "q-goodwill0\tgoodwill2", "is no judgement", "broken line", 26),
    ("qrels/train.tsv", "q-goodwill0\tgoodwill2\tgood", "is no judgement", "broken line", 26),
    ("qrels/test.tsv", "q-nobody\tgoodwill2\t1", "names the query 'q-nobody', which is not there", "unknown query", 26),
    (
        "qrels/test.tsv",
        "q-lease2\tnowhere\t1",
        "names the passage 'nowhere', which is not there",
        "unknown passage",
        26,
    ),
    (
        "qrels/test.tsv",
        "q-lease2\tlease0\t1",
        "judges 'q-lease2' and 'lease0' a second time",
        "duplicate judgement",
        26,
    ),
]


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    data = read_beir(str(write_set(tmp_path / "set")), tmp_path, "refuse")
    assert len(data.passages) == 48
    assert data.passages["goodwill0"] == "goodwill the goodwill is tested once a year"
    assert {name: len(judged) for name, judged in data.judged.items()} == {"train": 12, "validation": 12, "test": 12}
    assert data.judged["test"]["q-lease2"] == {"lease0": 2, "lease1": 1}
    assert data.bad_rows == {}


def test_compressed_files_dev_splits_and_given_candidates_are_read(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    corpus = folder / "corpus.jsonl"
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    corpus.unlink()
    (folder / "qrels" / "validation.tsv").rename(folder / "qrels" / "dev.tsv")
    (folder / "candidates").mkdir()
    (folder / "candidates" / "test.tsv").write_text(
        "query-id\tcorpus-id\trank\nq-lease2\tswap1\t1\nq-lease2\tlease0\t2\n"
    )
    data = read_beir(str(folder), tmp_path, "refuse")
    assert len(data.passages) == 48
    assert len(data.judged["validation"]) == 12
    assert data.candidates == {"test": {"q-lease2": ["swap1", "lease0"]}}


@pytest.mark.parametrize(("file", "line", "said", "kind", "number"), BROKEN)
def test_a_broken_row_is_named_or_counted(
    tmp_path: Path, file: str, line: str, said: str, kind: str, number: int
) -> None:
    folder = write_set(tmp_path / "set", {file: [line]})
    with pytest.raises(InputError) as refused:
        read_beir(str(folder), tmp_path, "refuse")
    assert f"{file}, line {number}, {said}" in str(refused.value)
    assert "task.bad_rows: skip" in str(refused.value)
    data = read_beir(str(folder), tmp_path, "skip")
    assert data.bad_rows == {file.removesuffix(".jsonl").removesuffix(".tsv"): {kind: 1}}
    assert [(Path(row["file"]).name, row["line"], row["kind"]) for row in data.left_out] == [
        (Path(file).name, number, kind)
    ]
    assert (len(data.passages), len(data.queries)) == (48, 36)
    assert data.passages["goodwill0"].startswith("goodwill the goodwill")
    assert data.judged["test"]["q-lease2"] == {"lease0": 2, "lease1": 1}


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    lines = (folder / "corpus.jsonl").read_bytes().splitlines()
    (folder / "corpus.jsonl").write_bytes(b"\n".join([lines[0], b'{"_id": "x", "text": "caf\xe9"}', *lines[1:]]))
    with pytest.raises(InputError, match=r"corpus\.jsonl, line 2, holds bytes that are not UTF-8"):
        read_beir(str(folder), tmp_path, "refuse")
    assert len(read_beir(str(folder), tmp_path, "skip").passages) == 48


def test_judgements_of_a_passage_that_is_skipped_are_counted_too(tmp_path: Path) -> None:
    more = {"corpus.jsonl": ['{"_id": "void", "text": ""}'], "qrels/train.tsv": ["q-goodwill0\tvoid\t1"]}
    data = read_beir(str(write_set(tmp_path / "set", more)), tmp_path, "skip")
    assert data.bad_rows == {"corpus": {"no text": 1}, "qrels/train": {"unknown passage": 1}}


def test_queries_without_anything_relevant_are_counted(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", {"queries.jsonl": ['{"_id": "vain", "text": "what of nothing"}']})
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("vain\tlease0\t0\nvain\tlease1\t-1\n")
    data = read_beir(str(folder), tmp_path, "refuse")
    assert (data.bad_rows, data.left_out, data.unanswerable) == ({}, [], {"test": 1})
    assert "vain" not in data.judged["test"]


def test_a_repository_in_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match=r"has the configs default and not corpus, so it is not in BEIR's layout"):
        read_beir(str(tmp_path / "set"), tmp_path, "refuse")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("corpus.jsonl", "holds no corpus.jsonl or corpus.jsonl.gz; the layout is BEIR's"),
        ("qrels/test.tsv", "has no test split of its judgements"),
    ],
)
def test_a_missing_file_is_said(tmp_path: Path, broken: str, said: str) -> None:
    folder = write_set(tmp_path / "set")
    (folder / broken).unlink()
    with pytest.raises(InputError, match=said):
        read_beir(str(folder), tmp_path, "refuse")


def test_a_split_without_anything_relevant_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "qrels" / "test.tsv").write_text("q-lease2\tlease0\t0\n")
    with pytest.raises(InputError, match=r"test\.tsv names no relevant passage"):
        read_beir(str(folder), tmp_path, "refuse")


@pytest.mark.parametrize("layout", ["mteb", "beir"])
def test_both_layouts_of_the_hub_are_read(tmp_path: Path, layout: str) -> None:
    """From folders with the repositories' files: ``datasets`` reads their configs as it reads the Hub's."""
    local = read_beir(str(write_set(tmp_path / "set")), tmp_path, "refuse")
    home, judgements = tmp_path / "org" / "fin", tmp_path / "org" / "fin-qrels"
    configs: dict[Path, dict[str, dict[str, list[dict[str, object]]]]] = {home: {}, judgements: {}}
    for config, texts in (("corpus", local.passages), ("queries", local.queries)):
        configs[home][config] = {config: [{"_id": key, "title": "", "text": text} for key, text in texts.items()]}
    rows = {
        "dev" if name == "validation" else name: [
            {"query-id": query, "corpus-id": passage, "score": float(score)}
            for query, passages in judged.items()
            for passage, score in passages.items()
        ]
        for name, judged in local.judged.items()
    }
    configs[home if layout == "mteb" else judgements]["default"] = rows
    for folder, named in configs.items():
        folder.mkdir(parents=True)
        described = ["---", "configs:"]
        for config, splits in named.items():
            described += [f"- config_name: {config}", "  data_files:"]
            for split, lines in splits.items():
                described += [f"  - split: {split}", f"    path: {config}-{split}.jsonl"]
                (folder / f"{config}-{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "README.md").write_text("\n".join([*described, "---", ""]))
    data = read_beir(str(home), tmp_path, "refuse")
    assert (data.passages, data.queries, data.judged) == (local.passages, local.queries, local.judged)


def test_bm25_finds_what_shares_words(tmp_path: Path) -> None:
    data = read_beir(str(write_set(tmp_path / "set")), tmp_path, "refuse")
    queries = {query: data.queries[query] for query in data.judged["test"]}
    (found,) = BM25().search(data.passages, [queries], 4)
    for topic in TOPICS:
        assert set(found[f"q-{topic}2"]) == {f"{topic}{i}" for i in range(4)}
    (nothing,) = BM25().search(data.passages, [{"q": "zebra"}], 4)
    assert nothing == {"q": []}
    with pytest.raises(InputError, match=r"^task\.bm25: no passage holds a word"):
        BM25().search({"a": "of the", "b": "and"}, [queries], 4)


def test_lists_hold_what_is_relevant_and_others_of_the_pool() -> None:
    judged = {"a": {"p1": 2, "p2": 1, "p3": 0, "p4": 1}, "b": {"p1": 1}, "alone": {"p9": 1}}
    pools = {"a": ["p1", "p3", "p5", "p6", "p4", "p8"], "b": ["p7", "p1"], "alone": ["p9"]}
    texts = {f"p{i}": f"passage {i}" for i in range(1, 10)} | {"p8": "passage 4"}
    lists = training_lists(judged, pools, texts, positives=2, negatives=2)
    assert [each.query for each in lists] == ["a", "a", "b"]
    assert [each.passages[:2] for each in lists[:2]] == [["p1", "p2"], ["p4", lists[1].passages[1]]]
    assert lists[0].relevance == [2, 1, 0, 0]
    assert lists[2].passages == ["p1", "p7"]
    for each in lists[:2]:
        assert set(each.passages) - {"p1", "p2", "p4"} <= {"p3", "p5", "p6"}
    assert lists == training_lists(judged, pools, texts, positives=2, negatives=2)


def test_further_lists_of_a_passage_hold_negatives_of_their_own_until_the_pool_is_through() -> None:
    pool = [f"p{i}" for i in range(8)]
    texts = {passage: f"passage {passage}" for passage in pool}
    lists = training_lists({"a": {"p0": 1}}, {"a": pool}, texts, positives=1, negatives=3, draws=4)
    assert [each.passages[0] for each in lists] == ["p0"] * 4
    drawn = [set(each.passages[1:]) for each in lists]
    assert [len(each) for each in drawn] == [3] * 4  # a list holds no passage twice
    assert not drawn[0] & drawn[1]
    assert set.union(*drawn[:3]) == set(pool[1:])  # the third wraps around, seven being there
    assert lists[:1] == training_lists({"a": {"p0": 1}}, {"a": pool}, texts, positives=1, negatives=3)
    few = training_lists({"a": {"p0": 1}}, {"a": pool[:3]}, texts, positives=1, negatives=3, draws=2)
    assert [set(each.passages) for each in few] == [set(pool[:3])] * 2


def test_half_a_sign_is_a_bad_row_and_a_damaged_file_one_sentence(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "half", "text": "what is said of the swap \\ud83d"}\n')
    with pytest.raises(InputError, match=r"queries\.jsonl, line 37, holds half of a sign"):
        read_beir(str(folder), tmp_path, "refuse")
    assert "half" not in read_beir(str(folder), tmp_path, "skip").queries
    raw = bytearray(gzip.compress((folder / "corpus.jsonl").read_bytes()))
    raw[40] ^= 255
    raw[60] ^= 255
    (folder / "corpus.jsonl.gz").write_bytes(raw)
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"corpus\.jsonl\.gz cannot be read .*; bring it anew"):
        read_beir(str(folder), tmp_path, "skip")
