"""Rows of prompts and completions, in the forms that TRL has for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from finllm_prune.errors import InputError
from finllm_prune.tasks.asking import Turn, turns_text
from finllm_prune.tasks.batchwise import Batch, rewritten
from finllm_prune.tasks.label_column import LabelColumn
from finllm_prune.tasks.task import Examples


@dataclass(frozen=True)
class InstructionExamples(Examples):
    """Rows to learn from have a ``completion``, others ``choices``: all completions of a closed set, or the right one.

    Args:
        choices: the closed set, by the index that is a row's ``label``; where it is empty, a label is the completion itself.
    """

    choices: list[str] = field(default_factory=list)

    def texts(self, split: str) -> list[str]:
        raise InputError("vocabulary: which tokens a language model is to write no texts tell; remove the key")

    def counts(self, split: str) -> dict[str, int]:
        return super().counts(split) if self.choices else {}

    def _names(self, label: Any) -> list[str]:
        return [self.choices[label]] if self.choices else [label]


class Completions(LabelColumn):
    """The column of completions that are not of a closed set."""

    @property
    def feature(self) -> Any:
        return datasets.Value("string")

    def read(self, values: Sequence[Any], labels: Sequence[str], feature: Any = None) -> list[Any]:
        return [value if isinstance(value, str) and value.strip() else None for value in values]

    def fault(self, value: Any, labels: Sequence[str]) -> tuple[str, str]:
        return (
            "no completion",
            "has no completion: no text in such a column, and no messages that end with the assistant's",
        )

    def names(self, tables: Mapping[str, datasets.Dataset], source: str) -> list[str]:
        return ["completion"]


def in_two(rows: datasets.Dataset) -> datasets.Dataset:
    """``prompt`` and ``completion`` as texts, of rows in one of TRL's forms; what is in neither form is left empty."""
    if "messages" not in rows.column_names and not {"prompt", "completion"} <= set(rows.column_names):
        return rows

    def read(batch: Batch, _: Sequence[int]) -> Batch:
        if "messages" in batch:
            whole = [_turns(value) for value in batch["messages"]]
            pairs: list[Any] = [(turns[:-1], turns[-1:]) for turns in whole]
        else:
            pairs = list(zip(batch["prompt"], batch["completion"], strict=True))
        rest = {name: values for name, values in batch.items() if name != "messages"}
        return rest | {
            "prompt": [_asked_in(prompt) for prompt, _ in pairs],
            "completion": [_answer_in(completion) for _, completion in pairs],
        }

    types = {name: feature for name, feature in rows.features.items() if name != "messages"}
    types |= dict.fromkeys(("prompt", "completion"), datasets.Value("string"))
    return rewritten(rows, read, datasets.Features(types))


def _asked_in(value: Any) -> str:
    turns = _turns(value)
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return turns_text(turns) if turns else value if isinstance(value, str) else ""


def _answer_in(value: Any) -> str | None:
    turns = _turns(value)
    if len(turns) == 1 and turns[0]["role"] == "assistant":
        return turns[0]["content"]
    return value if isinstance(value, str) else None


def _turns(value: Any) -> list[Turn]:
    """A list of ``{role, content}``, both texts; of anything else nothing."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return []
    turns = [{key: turn.get(key) for key in ("role", "content")} for turn in value]
    return turns if all(isinstance(text, str) for turn in turns for text in turn.values()) else []
