"""Prompts and completions as tokens, of which a language model learns the completion's alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finllm_prune.errors import InputError, one_line

NOT_LEARNED = -100
TEXT = "{text}"  # the place of a row's text in a template
TURNS = '[{"role": '  # how the text of a row of several turns begins
_ROOM = 8  # tokens of a text that a prompt leaves room for

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
        if self.template is None and text.startswith(TURNS):
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


def _joined(prompt: list[int], completion: list[int], room: int, tail: int) -> Tokens:
    if len(prompt) > room:
        prompt = prompt[: room - tail] + prompt[len(prompt) - tail :]
    return Tokens(prompt + completion, len(prompt))


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _line(turn: Turn) -> str:
    return f"{turn['role'].capitalize()}: {turn['content']}"
