"""A small retrieval set in BEIR's layout, made here."""

import json
from pathlib import Path

TOPICS = [
    "goodwill",
    "dividend",
    "covenant",
    "lease",
    "hedge",
    "pension",
    "tariff",
    "bond",
    "audit",
    "levy",
    "yield",
    "swap",
]
ASKED = ["what is said of the {}", "how is the {} treated", "which rule holds for the {}"]
TOLD = ["the {} is tested once a year", "in march the {} was paid", "a {} may be settled in cash", "no {} was booked"]
SPLIT_OF = ["train", "validation", "test"]


def write_set(folder: Path, more: dict[str, list[str]] | None = None) -> Path:
    """12 topics, 4 passages and 3 queries of each; the first two passages of a topic are relevant, the first one more so.

    Args:
        more: file -> lines that are added at its end.
    """
    (folder / "qrels").mkdir(parents=True)
    passages = [
        {"_id": f"{topic}{i}", "title": topic, "text": told.format(topic)}
        for topic in TOPICS
        for i, told in enumerate(TOLD)
    ]
    queries = [
        {"_id": f"q-{topic}{i}", "text": asked.format(topic)} for topic in TOPICS for i, asked in enumerate(ASKED)
    ]
    files = {"corpus.jsonl": [*map(json.dumps, passages)], "queries.jsonl": [*map(json.dumps, queries)]}
    for i, split in enumerate(SPLIT_OF):
        judged = [f"q-{topic}{i}\t{topic}{place}\t{2 - place}" for topic in TOPICS for place in (0, 1)]
        files[f"qrels/{split}.tsv"] = ["query-id\tcorpus-id\tscore", *judged]
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines + (more or {}).get(name, [])) + "\n", encoding="utf-8")
    return folder
