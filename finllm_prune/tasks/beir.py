"""Retrieval data in BEIR's layout (Thakur et al. 2021, https://arxiv.org/abs/2104.08663): passages, queries, and judgements."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from finllm_prune.errors import InputError, one_line
from finllm_prune.tasks.rows import BadRows, Choice, writable
from finllm_prune.tasks.splitting import SPLITS
from finllm_prune.tasks.task import of_hub, refuse_hub_keys

# What a split is called where: the first name that is there is taken.
_NAMES = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}
_JUDGEMENT = "is no judgement: query id, passage id and a whole number, with tabs between them"

Judged = dict[str, dict[str, int]]
Pools = dict[str, list[str]]


@dataclass(frozen=True)
class Retrieval:
    """What was read, good rows only.

    Args:
        passages, queries: id -> text; a passage's title stands before its text.
        judged: split -> query id -> passage id -> relevance, 0 or more.
        candidates: split -> query id -> passage ids, best first, where a first stage was given.
        columns: query id -> its row as it came, with whatever columns the data has.
        source: where the rows come from, in words.
        bad_rows: file -> what is wrong -> rows left out.
        left_out: each of these rows; see ``BadRows.left_out``.
        unanswerable: split -> queries left out because nothing is relevant to them, where there are some.
    """

    passages: dict[str, str]
    queries: dict[str, str]
    judged: dict[str, Judged]
    candidates: dict[str, Pools]
    columns: dict[str, dict[str, Any]]
    source: str
    bad_rows: dict[str, dict[str, int]]
    left_out: list[dict[str, Any]]
    unanswerable: dict[str, int]

    def of(self, queries: dict[str, set[str]]) -> "Retrieval":
        """With these queries of each split alone."""
        judged = {split: {q: v for q, v in each.items() if q in queries[split]} for split, each in self.judged.items()}
        return replace(self, judged=judged)


class Table(NamedTuple):
    """Rows as they were read, with the line of each where lines are known; a text in place of a row says why there is none."""

    path: Path
    rows: Sequence[dict[str, Any] | list[str] | str]
    lines: list[int] | None = None


def read_beir(
    dataset: str, builtin: Path, choice: Choice, config: str | None = None, revision: str | None = None
) -> Retrieval:
    """``builtin``, a local folder or a Hub id.

    A folder holds ``corpus.jsonl`` and ``queries.jsonl`` (each may be .gz), ``qrels/{train,validation or dev,test}.tsv``, and
    maybe ``candidates/<split>.tsv`` of another first stage: query id, passage id, best first. On the Hub both
    ``BeIR/fiqa`` (with ``BeIR/fiqa-qrels``) and ``mteb/fiqa`` (configs corpus, queries and default) are read, and folders
    into which such a repository was downloaded. ``config`` and ``revision`` are of a Hub id: a part that has the configs
    ``<config>-corpus``, ``<config>-queries`` and ``<config>-qrels``; a branch or commit.

    Raises:
        InputError: something is not there, or a row is bad and bad rows are refused.
    """
    refuse_hub_keys(dataset, config, revision)
    if dataset == "builtin":
        tables, source = _folder(builtin), "the questions and passages that finllm-prune embeds"
    elif (folder := Path(dataset)).is_dir():
        is_copy = not any(folder.glob("corpus.jsonl*")) and (folder / "README.md").is_file()
        tables, source = _hub(dataset) if is_copy else _folder(folder), f"the local folder {folder.name}"
    else:
        named = " ".join(part for part in (dataset, config, revision and f"at {revision}") if part)
        tables, source = _hub(dataset, config, revision), f"{named} of the Hugging Face Hub"
    if "qrels/test" not in tables:
        raise InputError(f"task.dataset: {source} has no test split of its judgements (qrels/test.tsv); add one")
    return _checked(tables, source, choice)


def _checked(tables: dict[str, Table], source: str, choice: Choice) -> Retrieval:
    bad = BadRows(
        {name: table.path for name, table in tables.items()}, {name: len(table.rows) for name, table in tables.items()},
        lines={name: table.lines for name, table in tables.items() if table.lines is not None},
    )  # fmt: skip
    passages, queries = (_texts(tables[name].rows, name, bad) for name in ("corpus", "queries"))
    judged: dict[str, Judged] = {}
    candidates: dict[str, Pools] = {}
    for name, table in tables.items():
        kind, _, split = name.partition("/")
        if kind == "qrels":
            judged[split] = _judgements(table.rows, name, bad, passages, queries)
        elif kind == "candidates":
            candidates[split] = _pools(table.rows, name, bad, passages, queries)
    counts = bad.settle(choice)
    answerable = {split: _answerable(judged[split], tables[f"qrels/{split}"]) for split in SPLITS if split in judged}
    rows = [row for row in reversed(tables["queries"].rows) if isinstance(row, dict)]  # the first row of an id is taken
    columns = {str(row.get("_id", row.get("id"))): row for row in rows}
    return Retrieval(
        passages, queries, answerable, candidates, columns, source, counts, bad.left_out(),
        {split: lost for split, kept in answerable.items() if (lost := len(judged[split]) - len(kept))},
    )  # fmt: skip


def _texts(rows: Sequence[Any], name: str, bad: BadRows) -> dict[str, str]:
    """Id -> title and text."""
    texts: dict[str, str] = {}
    for number, row in enumerate(rows):
        if isinstance(row, str):
            bad.add(name, number, "unreadable", row)
            continue
        key = row.get("_id", row.get("id"))
        parts = [row[part].strip() for part in ("title", "text") if isinstance(row.get(part), str)]
        if not writable(f"{key} {' '.join(parts)}"):
            bad.add(name, number, "unreadable", "holds half of a sign (a lone surrogate, as \\ud83d)")
        elif key is None or key == "":
            bad.add(name, number, "no id", "has no '_id'")
        elif str(key) in texts:
            bad.add(name, number, "duplicate id", f"has the id {str(key)!r} a second time")
        elif not any(parts):
            bad.add(name, number, "no text", "has no text")
        else:
            texts[str(key)] = " ".join(part for part in parts if part)
    return texts


def _known(
    rows: Sequence[Any], name: str, bad: BadRows, passages: dict[str, str], queries: dict[str, str]
) -> Iterator[tuple[int, str, str, list[str]]]:
    """Row number, query, passage and the other fields of rows that name both."""
    for number, row in enumerate(rows):
        if isinstance(row, str):
            bad.add(name, number, "unreadable", row)
        elif len(row) < 2:
            bad.add(name, number, "broken line", "has no query id and passage id with a tab between them")
        elif row[0] not in queries:
            bad.add(name, number, "unknown query", f"names the query {row[0]!r}, which is not there")
        elif row[1] not in passages:
            bad.add(name, number, "unknown passage", f"names the passage {row[1]!r}, which is not there")
        else:
            yield number, row[0], row[1], row[2:]


def _judgements(rows: Sequence[Any], name: str, bad: BadRows, *known: dict[str, str]) -> Judged:
    judged: Judged = {}
    for number, query, passage, rest in _known(rows, name, bad, *known):
        if len(rest) != 1 or not rest[0].removeprefix("-").isdecimal():
            bad.add(name, number, "broken line", _JUDGEMENT)
        elif passage in judged.get(query, {}):
            bad.add(name, number, "duplicate judgement", f"judges {query!r} and {passage!r} a second time")
        else:
            judged.setdefault(query, {})[passage] = max(0, int(rest[0]))
    return judged


def _pools(rows: Sequence[Any], name: str, bad: BadRows, *known: dict[str, str]) -> Pools:
    pools: dict[str, dict[str, None]] = {}
    for number, query, passage, _ in _known(rows, name, bad, *known):
        if passage in pools.get(query, {}):
            bad.add(name, number, "duplicate candidate", f"names {query!r} and {passage!r} a second time")
        pools.setdefault(query, {})[passage] = None
    return {query: list(pool) for query, pool in pools.items()}


def _answerable(judged: Judged, table: Table) -> Judged:
    """Without the queries for which nothing is relevant: no ranking of their candidates is better than another."""
    kept = {query: passages for query, passages in judged.items() if any(passages.values())}
    if not kept:
        raise InputError(f"task.dataset: {table.path} names no relevant passage of any query; mend the data")
    return kept


def _folder(folder: Path) -> dict[str, Table]:
    tables = {
        name: _lines(_present(folder, [f"{name}.jsonl", f"{name}.jsonl.gz"]), _record) for name in ("corpus", "queries")
    }
    for kind in ("qrels", "candidates"):
        for split, names in _NAMES.items():
            paths = [path for name in names if (path := folder / kind / f"{name}.tsv").is_file()]
            if paths:
                tables[f"{kind}/{split}"] = _without_header(
                    _lines(paths[0], lambda text: text.rstrip("\r\n").split("\t"))
                )
    return tables


def _present(folder: Path, names: list[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"task.dataset: {folder} holds no {' or '.join(names)}; the layout is BEIR's: corpus, queries, qrels/<split>.tsv"
    )


def _lines(path: Path, parse: Callable[[str], dict[str, Any] | list[str] | str]) -> Table:
    rows: list[dict[str, Any] | list[str] | str] = []
    lines = []
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    lines.append(number)
                    try:
                        rows.append(parse(line.decode("utf-8-sig" if number == 1 else "utf-8")))
                    except UnicodeDecodeError:
                        rows.append("holds bytes that are not UTF-8")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"task.dataset: {path} cannot be read ({one_line(error)}); bring it anew") from error
    return Table(path, rows, lines)


def _record(text: str) -> dict[str, Any] | str:
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    return row if isinstance(row, dict) else "is no JSON object"


def _without_header(table: Table) -> Table:
    """A first line whose first field is a name of ids, as BEIR's ``query-id``, is none of the rows."""
    assert table.lines is not None
    first = table.rows[0] if table.rows else ""
    has_header = isinstance(first, list) and first[0] in ("query-id", "query_id", "qid")
    return Table(table.path, table.rows[1:], table.lines[1:]) if has_header else table


def _hub(name: str, part: str | None = None, revision: str | None = None) -> dict[str, Table]:
    """The two layouts that are usual there."""
    configs = of_hub(name, lambda: datasets.get_dataset_config_names(name, revision=revision))
    begin = "" if part is None else f"{part}-"
    if missing := [config for config in (f"{begin}corpus", f"{begin}queries") if config not in configs]:
        raise InputError(
            f"task.dataset: {name} has the configs {', '.join(configs)} and not {missing[0]}, so it is not in BEIR's "
            "layout; name another, or a local folder"
        )
    tables = {}
    for config in ("corpus", "queries"):
        splits = of_hub(name, partial(datasets.load_dataset, name, f"{begin}{config}", revision=revision))
        tables[config] = Table(Path(name), [row for rows in splits.values() for row in rows])
    own = next((config for config in (part or "default", f"{begin}qrels") if config in configs), None)
    if own is None and revision is not None:
        raise InputError(
            f"task.revision: the judgements of {name} lie in {name}-qrels, whose commits are others; name a set that holds its "
            "own (as mteb/fiqa), or download both and name the folder"
        )
    place, options = (f"{name}-qrels", {}) if own is None else (name, {"name": own, "revision": revision})
    judged = of_hub(name, lambda: datasets.load_dataset(place, **options))
    for split, names in _NAMES.items():
        for found in [each for each in names if each in judged][:1]:
            columns = [list(judged[found][column]) for column in ("query-id", "corpus-id", "score")]
            rows = [[str(query), str(passage), f"{score:g}"] for query, passage, score in zip(*columns, strict=True)]
            tables[f"qrels/{split}"] = Table(Path(name), rows)
    return tables
