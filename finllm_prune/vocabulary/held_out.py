"""What a smaller vocabulary does to texts that it was not made from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from finllm_prune.vocabulary.trimming import Trimmed


@dataclass(frozen=True)
class Change:
    """Texts before and after trimming.

    Args:
        texts: how many there are.
        tokens: of the whole vocabulary in them.
        changed: how many of these are no longer there: their words now fall into smaller pieces.
        tokens_after: of the smaller vocabulary.
        unknown: of ``tokens``, those that are unknown.
        unknown_after: the same of ``tokens_after``.
    """

    texts: int
    tokens: int
    changed: int
    tokens_after: int
    unknown: int
    unknown_after: int

    def __str__(self) -> str:
        part, longer = (
            f"{100 * count / max(1, self.tokens):.2f} %" for count in (self.changed, self.tokens_after - self.tokens)
        )
        return (
            f"{self.changed:,} of {self.tokens:,} held-out tokens change ({part}), {longer} more tokens, "
            f"{self.unknown_after:,} unknown (before: {self.unknown:,})"
        )


def held_out(tokenizer: PreTrainedTokenizerBase, trimmed: Trimmed, texts: Sequence[str]) -> Change:
    """Compare token by token: the same id at the same place of the text, or changed."""
    old = trimmed.old
    tokens = changed = tokens_after = unknown = unknown_after = 0
    for text in texts:
        before, after = _placed(tokenizer, text), _placed(trimmed.tokenizer, text)
        tokens += len(before)
        tokens_after += len(after)
        changed += sum((Counter(before) - Counter((start, end, old[token]) for start, end, token in after)).values())
        unknown += sum(token == tokenizer.unk_token_id for *_, token in before)
        unknown_after += sum(token == trimmed.tokenizer.unk_token_id for *_, token in after)
    return Change(len(texts), tokens, changed, tokens_after, unknown, unknown_after)


def _placed(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int, int]]:
    """(start, end, id) of each token, in characters of the text."""
    row = tokenizer(
        text, add_special_tokens=False, truncation=False, padding=False, verbose=False, return_offsets_mapping=True
    )
    return [(start, end, token) for (start, end), token in zip(row["offset_mapping"], row["input_ids"], strict=True)]
