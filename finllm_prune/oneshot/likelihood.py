"""What a streamed model makes of texts: perplexity of windows, and the likelihood of each label behind a prompt.

All texts travel through a block together, so that the weights are read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finllm_prune.errors import InputError
from finllm_prune.judges import ClassJudge
from finllm_prune.oneshot.streamed import Streamed
from finllm_prune.oneshot.texts import Batch, batches
from finllm_prune.settings import build, mapping
from finllm_prune.tasks import Examples, find_task
from finllm_prune.tasks.classification import Classification
from finllm_prune.training import Pass


@dataclass(frozen=True)
class Asked:
    """Rows of token ids, of whose last tokens the log-probabilities are wanted.

    Args:
        rows: token ids.
        last: for each row, how many of its tokens count, fewer than it has.
        labels: the rows are so many continuations of each prompt; 0 where they are windows of texts.
    """

    rows: list[list[int]]
    last: list[int]
    labels: int = 0

    def batches(self, tokens: int) -> list[Batch]:
        """Of rows, in their order."""
        return batches(self.rows, tokens)

    def perplexity(self, sums: Tensor) -> "Perplexity":
        """Of rows that are windows of a text, by the log-likelihood of each."""
        return Perplexity(sums, torch.tensor(self.last))

    def log_likelihoods(self, model: Streamed, passes: Sequence[Pass]) -> Tensor:
        """The sum over each row's counted tokens, fp64, (rows,): ``passes`` are its batches behind the last block."""
        starts = [len(row) - count for row, count in zip(self.rows, self.last, strict=True)]
        targets = torch.tensor([token for row, start in zip(self.rows, starts, strict=True) for token in row[start:]])
        places = [
            (start - 1, len(row) - 1) for row, start in zip(self.rows, starts, strict=True)
        ]  # predict the next one
        hidden = (states[first:end] for states, (first, end) in zip(_rows(passes), places, strict=True))
        found, done = [], 0
        for logits in model.logits(_joined(hidden)):
            wanted = targets[done : done + len(logits)].to(logits.device)
            found.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().cpu())
            done += len(logits)
        return torch.stack([part.sum() for part in torch.cat(found).split(self.last)])


def windows_asked(windows: list[list[int]]) -> Asked:
    """Every token of a window but its first."""
    return Asked(windows, [len(window) - 1 for window in windows])


@dataclass(frozen=True, eq=False)
class Perplexity:
    """exp of the mean negative log-likelihood over all predicted tokens.

    Windows do not overlap, and the first token of each is not predicted; each other token counts once, so that a short last
    window weighs less. Intervals are 95 % bootstrap intervals over windows.

    Args:
        sums: (windows,), fp64, the log-likelihood of each.
        counts: (windows,), its predicted tokens.
    """

    sums: Tensor
    counts: Tensor

    @property
    def value(self) -> float:
        return float((-self.sums.sum() / self.counts.sum()).exp())

    def interval(self, dense: "Perplexity | None" = None) -> list[float]:
        """Of the perplexity, or of its ratio to that of another model of the same windows."""
        own = self._drawn()
        return [float(end) for end in np.percentile(own if dense is None else own / dense._drawn(), [2.5, 97.5])]

    def _drawn(self, resamples: int = 999) -> NDArray[np.float64]:
        windows = len(self.sums)
        draws = torch.from_numpy(np.random.default_rng(0).integers(windows, size=(resamples, windows)))
        drawn: NDArray[np.float64] = (-self.sums[draws].sum(1) / self.counts[draws].sum(1)).exp().numpy()
        return drawn


@dataclass(frozen=True)
class Labels:
    """Classification without training: the label whose words are the likeliest continuation of the prompt is predicted.

    Args:
        task: a task of one label for each text, as in a recipe of ``run``; its test split is asked about.
        prompt: with ``{text}`` in it; a prompt that is too long loses its beginning.
        answers: label -> what is written behind the prompt; by default a space and the label.
        normalise: whether the sum of an answer's log-probabilities is divided by its number of tokens.
        rows: the first so many of the test split; None takes all.
        tokens: the longest prompt with its answer.
    """

    task: dict[str, Any] = field(default_factory=lambda: {"name": "sentiment"})
    prompt: str = "{text}\nThe sentiment of this is"
    answers: dict[str, str] = field(default_factory=dict)
    normalise: bool = False
    rows: int | None = None
    tokens: int = 512

    def __post_init__(self) -> None:
        if "{text}" not in self.prompt:
            raise InputError("evaluate.labels.prompt: {text} is missing in it, where the text of a row is to stand")
        if self.tokens < 8 or (self.rows is not None and self.rows < 2):
            raise InputError("evaluate.labels: at least 8 tokens and 2 rows are needed")

    def load(self) -> Examples:
        """The data; raises InputError where it has no single label for each text, or another label than an answer."""
        task = self._task()
        examples = task.load()
        if not isinstance(task.judge(examples), ClassJudge):
            raise InputError("evaluate.labels.task: one label for each text is needed; remove scores and label_sets")
        if unknown := sorted(self.answers.keys() - set(examples.labels)):
            raise InputError(
                f"evaluate.labels.answers: the data has no label {unknown[0]} but {', '.join(examples.labels)}"
            )
        return examples

    def judge(self, examples: Examples) -> ClassJudge:
        """Who knows the labels of the rows that are asked."""
        right = np.array(list(examples.splits["test"]["label"])[: self.rows])
        return ClassJudge(right, examples.labels, self._task().metrics)

    def asked(self, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Asked:
        """Each label behind each prompt, the labels of a row one after the other."""
        rows, last = [], []
        answers = [self.answers.get(label, f" {label}") for label in examples.labels]
        for text in list(examples.splits["test"]["text"])[: self.rows]:
            prompt = self.prompt.replace("{text}", text)
            alone = tokenizer(prompt, verbose=False)["input_ids"]
            for answer in answers:
                # A tokenizer may end a text with a token of its own, and join an answer to its prompt.
                whole = tokenizer(prompt + answer, verbose=False)["input_ids"]
                same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
                if whole[-1:] == alone[-1:] == [tokenizer.sep_token_id]:
                    whole = whole[:-1]
                if not 0 < same < len(whole):
                    raise InputError(
                        f"evaluate.labels.answers: '{answer}' is no token behind the prompt; write another"
                    )
                rows.append(whole[-self.tokens :])
                last.append(min(len(whole) - same, len(rows[-1]) - 1))
        return Asked(rows, last, len(answers))

    def logits(self, asked: Asked, sums: Tensor) -> Tensor:
        """(rows, labels): what is compared."""
        worth = sums / torch.tensor(asked.last) if self.normalise else sums
        return worth.view(-1, asked.labels)

    def _task(self) -> Classification:
        settings = mapping(self.task, "evaluate.labels.task")
        name = settings.pop("name", "sentiment")
        task = build(find_task(name), settings, "evaluate.labels.task")
        if not isinstance(task, Classification) or task.pipeline_tag == "text-generation":
            raise InputError(f"evaluate.labels.task.name: {name} has no labels; name sentiment or filings")
        return task


def _rows(passes: Sequence[Pass]) -> list[Tensor]:
    """The hidden states of each row; padding comes behind."""
    return [row for step in passes for row in step.hidden]


def _joined(parts: Any, rows: int = 4096) -> Any:
    """Few long pieces for many short ones, of one row at least."""
    held: list[Tensor] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= rows:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)
