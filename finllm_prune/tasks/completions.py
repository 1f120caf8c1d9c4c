"""Batches of prompts with completions, and what of a language model's logits matters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from finllm_prune.inference import PARTS
from finllm_prune.tasks.asking import NOT_LEARNED

_SEQUENCES = 16  # at a time, where each token has a logit for each entry of a large vocabulary


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
