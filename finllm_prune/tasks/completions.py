"""Prompts and completions as tokens, of which a language model learns the completion's alone; and batches of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from finllm_prune.errors import InputError, one_line
from finllm_prune.inference import PARTS

NOT_LEARNED = -100
TEXT = "{text}"  # the place of a row's text in a template
_TURNS = '[{"role": '  # how the text of a row of several turns begins
_ROOM = 8  # tokens of a text that a prompt leaves room for
_SEQUENCES = 16  # at a time, where each token has a logit for each entry of a large vocabulary

Turn = dict[str, str]


class Tokens(NamedTuple):
    """A prompt and its completion: their ids, and where the completion begins."""

    ids: list[int]
    start: int

    @property
    def labels(self) -> list[int]:
        """What is learned, in the form that transformers has for it."""
        return [NOT_LEARNED] * self.start + self.ids[self.start :]


def turns_text(turns: list[Turn]) -> str:
    """Several turns as the text of one row."""
    return json.dumps([{"role": turn["role"], "content": turn["content"]} for turn in turns], ensure_ascii=False)


@dataclass(frozen=True)
class Asking:
    """Puts prompts and completions into a model's tokens.

    Args:
        tokenizer: its chat template is used, where it has one. Else a prompt stands as it is, several turns as lines of
            ``User: ...``, ``Assistant: ...``, and the end token behind the completion.
        limit: tokens of both. A completion keeps its first half of them at least, and the text in a prompt loses its end.
        template: puts a text into words; None takes it as the prompt.
        options: of the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    template: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def encode(self, texts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[list[Tokens]]:
        """Each text with each of its completions. The prompt's tokens are those that the model is given when it is to write.

        Raises:
            InputError: the prompt leaves no room for a text, or the chat template does not write one turn after the other.
        """
        prompts = [self._prompt(text) for text in texts]
        said = [
            self._whole(text, prompt, completion)
            for text, prompt, some in zip(texts, prompts, completions, strict=True)
            for completion in some
        ]
        wholes, least, tail = iter(self._ids(said)), *self._frame()
        found = []
        for prompt, some in zip(self._ids(prompts), completions, strict=True):
            pairs = [self._parted(prompt, ids, least) for ids in islice(wholes, len(some))]
            room = self.limit - max(len(completion) for _, completion in pairs)  # all completions see the same prompt
            found.append([_joined(asked, completion, room, tail) for asked, completion in pairs])
        return found

    @property
    def _chats(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _turns(self, text: str) -> list[Turn]:
        if self.template is None and text.startswith(_TURNS):
            turns: list[Turn] = json.loads(text)
            return turns
        return [{"role": "user", "content": text if self.template is None else self.template.replace(TEXT, text)}]

    def _prompt(self, text: str) -> str:
        turns = self._turns(text)
        if self._chats:
            return self._said(turns, add_generation_prompt=True)
        return turns[0]["content"] if len(turns) == 1 else "\n".join([*map(_line, turns), "Assistant:"])

    def _whole(self, text: str, prompt: str, completion: str) -> str:
        turns = self._turns(text)
        if not self._chats:
            worded = self.template is not None or len(turns) > 1
            return prompt + (" " if worded and not prompt[-1].isspace() else "") + completion
        whole = self._said([*turns, {"role": "assistant", "content": completion}])
        if not whole.startswith(prompt):
            raise InputError(
                "task.chat_template: with this tokenizer's template an answer does not begin where the prompt for it ends; "
                "set task.chat_template_kwargs (as enable_thinking: false), or task.chat_template: false"
            )
        return whole

    def _said(self, turns: list[Turn], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **self.options, **options))
        except TemplateError as error:
            raise InputError(
                f"task.chat_template: this tokenizer's template refuses the turns {', '.join(t['role'] for t in turns)} "
                f"({one_line(error)}); leave such rows out, or set task.chat_template: false"
            ) from None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """A chat template writes the special tokens itself."""
        begin = [] if self._chats else [i for i in self.tokenizer("")["input_ids"] if i == self.tokenizer.bos_token_id]
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [begin + ids for ids in rows]

    def _frame(self) -> tuple[int, int]:
        """Tokens of a prompt with hardly a text in it, and how many of them come behind the text."""
        one, other = self._ids([self._prompt("0"), self._prompt("1 2 3 4")])
        if len(one) + _ROOM > self.limit:
            raise InputError(f"task.max_length: the prompt alone has {len(one) - 1} of {self.limit} tokens; raise it")
        return len(one), _common(one[::-1], other[::-1])

    def _parted(self, prompt: list[int], whole: list[int], least: int) -> tuple[list[int], list[int]]:
        """Where tokens of the two run into one another, what both have in common is the prompt."""
        begin, end = _common(prompt, whole), self.tokenizer.eos_token_id
        completion = whole[begin:]
        if not self._chats:
            completion = completion + ([] if end is None else [end])
        elif end in completion:  # what a template writes behind it, no one waits for
            completion = completion[: len(completion) - completion[::-1].index(end)]
        most = max(min(self.limit // 2, self.limit - least), self.limit - begin)
        return whole[:begin], completion[:most]


class CompletionCollator:
    """Pads rows on the right, and asks the model for the logits that are learned from alone.

    A row of training is one sequence with its ``labels``. A row that is evaluated is one sequence for each completion, with the
    labels of each in ``parts`` and the number of the right one in ``labels``.

    Args:
        tokenizer: knows the padding token.
        width: the most tokens of a row.
        packing: training rows lie in one sequence, one behind the other, without padding; positions begin anew, by which
            transformers' masks keep them apart.
    """

    at_once = _SEQUENCES

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, packing: bool = False):
        self.padding = tokenizer.pad_token_id
        self.width = width
        self.packing = packing

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        evaluated = PARTS in rows[0]
        ids, labels = (
            [torch.tensor(values) for row in rows for values in (row[name] if evaluated else [row[name]])]
            for name in ("input_ids", PARTS if evaluated else "labels")
        )
        if self.packing and not evaluated:
            positions = torch.cat([torch.arange(len(each)) for each in ids])
            batch = {"input_ids": torch.cat(ids)[None], "position_ids": positions[None]}
            learned = torch.cat(labels)[None]
        else:
            real = [torch.ones_like(each) for each in ids]
            batch = {"input_ids": _padded(ids, self.padding), "attention_mask": _padded(real, 0)}
            learned = _padded(labels, NOT_LEARNED)
        following = F.pad(learned[:, 1:], (0, 1), value=NOT_LEARNED)
        kept = (following != NOT_LEARNED).any(0).nonzero()[:, 0]
        parts = following[:, kept]
        if evaluated:
            parts, learned = parts.unflatten(0, (len(rows), -1)), torch.tensor([row["labels"] for row in rows])
        return batch | {"logits_to_keep": kept, PARTS: parts, "labels": learned}

    def gather(self, logits: Tensor, parts: Tensor) -> Tensor:
        """What of the logits (sequences, kept, vocabulary) matters.

        Args:
            parts: the next token at each place, or -100. Shape (sequences, kept) in training, where the logits of these
                tokens are wanted, shape (tokens, vocabulary). Shape (rows, completions, kept) in evaluation: then the
                log-likelihood of each completion, (rows, completions), and where a row has one alone the columns of
                ``CompletionJudge``, (rows, 3 + width).
        """
        learned = parts != NOT_LEARNED
        if parts.ndim == 2:
            return logits[learned]
        found, right = logits[learned.flatten(0, 1)].float(), parts[learned]
        likelihoods = torch.zeros(parts.shape, device=logits.device)
        likelihoods[learned] = -F.cross_entropy(found, right, reduction="none")
        if parts.shape[1] > 1:
            return likelihoods.sum(-1)
        said = found.argmax(-1)
        counts = learned.sum((1, 2))
        rows = [F.pad(each, (0, self.width - len(each)), value=-1) for each in said.split(counts.tolist())]
        hits = [each.sum() for each in (said == right).split(counts.tolist())]
        figures = [likelihoods.sum((1, 2)), counts, torch.stack(hits)]
        return torch.cat([torch.stack(figures, 1), torch.stack(rows)], 1).float()


def completion_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over tokens, as transformers' own.

    Args:
        logits: of each token that is learned, shape (tokens, vocabulary).
        labels: token ids, or -100 where nothing is learned, shape (sequences, tokens).
    """
    following = labels[:, 1:]
    return F.cross_entropy(logits.float(), following[following != NOT_LEARNED])


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


def _joined(prompt: list[int], completion: list[int], room: int, tail: int) -> Tokens:
    if len(prompt) > room:
        prompt = prompt[: room - tail] + prompt[len(prompt) - tail :]
    return Tokens(prompt + completion, len(prompt))


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _line(turn: Turn) -> str:
    return f"{turn['role'].capitalize()}: {turn['content']}"
