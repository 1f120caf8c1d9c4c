"""What the columns of queries are for: slices, splits made anew, names that are masked."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets

from finllm_prune.errors import InputError
from finllm_prune.tasks.beir import Judged, Retrieval
from finllm_prune.tasks.masking import Mask, without_names
from finllm_prune.tasks.splitting import Split, divided


def column_of(data: Retrieval, column: str, queries: Sequence[str], key: str) -> list[Any]:
    """A column of these queries: numbers, or texts; None where a query has none.

    Raises:
        InputError: no query has it; ``key`` of the task asked for it.
    """
    values = _cells(data, column, queries, key)
    numbers = all(value is None or isinstance(value, int | float) for value in values)
    return values if numbers else [None if value is None else str(value) for value in values]


def _cells(data: Retrieval, column: str, queries: Sequence[str], key: str) -> list[Any]:
    """A column of these queries as it came; see ``column_of``."""
    known = list(dict.fromkeys(name for row in data.columns.values() for name in row))
    if column not in known:
        raise InputError(
            f"task.{key}: queries of {data.source} have no column '{column}' but {', '.join(known)}; name one of these"
        )
    return [data.columns[query].get(column) for query in queries]


def divided_queries(data: Retrieval, split: Split) -> tuple[Retrieval, dict[str, Any]]:
    """All judged queries in splits made anew, with their judgements and candidates; and what these are, for the report.

    Raises:
        InputError: a query has nothing to divide by, or candidates are given for some of them alone.
    """
    whole: Judged = {}
    for judged in data.judged.values():
        for query, passages in judged.items():
            whole[query] = whole.get(query, {}) | passages
    keys: list[Any] = [None] * len(whole)
    if split.by is not None:
        values = column_of(data, split.by, list(whole), "split.by")
        keys = split.keys(values, split.is_time(values))
        if empty := [query for query, key in zip(whole, keys, strict=True) if key is None]:
            raise InputError(
                f"task.split.by: {len(empty)} queries of {data.source} have nothing to divide by in column '{split.by}', the "
                f"first '{empty[0]}'; fill it in, or take out their judgements"
            )
    pools = {query: pool for found in data.candidates.values() for query, pool in found.items()}
    if pools and (without := sum(query not in pools for query in whole)):
        raise InputError(
            f"task.split: {without} of {len(whole)} queries of {data.source} have no given candidates, and others have; give "
            "them for all, or for none, and BM25 finds them"
        )
    parts, fact = divided({"all": datasets.Dataset.from_dict({"query": list(whole)})}, keys, split)
    judged_anew = {name: {query: whole[query] for query in rows["query"]} for name, rows in parts.items()}
    return replace(data, judged=judged_anew, candidates=dict.fromkeys(judged_anew, pools) if pools else {}), fact


def masked_texts(data: Retrieval, mask: Mask | None, numbers: bool) -> tuple[Retrieval, dict[str, int]]:
    """Queries and passages without names and, if asked, without ``numbers``; and in how many of each there was a name."""
    masker = None
    if mask is not None:
        masker = mask.masker_of(
            [] if mask.column is None else _cells(data, mask.column, list(data.queries), "mask.column")
        )
    texts = {"queries": data.queries, "passages": data.passages}
    tables = {name: datasets.Dataset.from_dict({"text": list(each.values())}) for name, each in texts.items()}
    changed, counts = without_names(tables, masker, numbers)
    anew = {name: dict(zip(each, changed[name]["text"], strict=True)) for name, each in texts.items()}
    return replace(data, queries=anew["queries"], passages=anew["passages"]), counts
