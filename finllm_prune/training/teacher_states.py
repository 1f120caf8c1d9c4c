"""A teacher's hidden states of the training rows, computed once and mapped from disk."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DataCollator, PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.inference import PARTS, in_order, length, outputs_of
from finllm_prune.staging import free_bytes, staged
from finllm_prune.training.layers import real_tokens
from finllm_prune.training.teacher_logits import fingerprint_of, with_kept_logits

TEACHER_ROW = "teacher_row"  # a column of the training rows: where a row's states are
_FILE_BYTES = 2**28
# The range of fp32; its rounding is a thousandth of a state.
_DTYPE = torch.bfloat16

logger = logging.getLogger(__name__)


class KeptStates:
    """The hidden states of some of a teacher's blocks, for each training row; what a batch needs is read from the disk.

    Args:
        folder: safetensors files with a tensor (blocks, tokens, width) in bfloat16 for each row, by its number.
        blocks: of the teacher, in that order.
    """

    def __init__(self, folder: Path, blocks: Sequence[int]):
        self.blocks = list(blocks)
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._file = {int(row): file for file in files for row in file.keys()}  # noqa: SIM118  # it has no __iter__

    def of(self, rows: Tensor, mask: Tensor) -> dict[int, Tensor]:
        """Block -> (sequences, tokens, width), 0 where ``mask`` (sequences, tokens) is.

        Args:
            rows: the batch's ``teacher_row``.
        """
        kept = [self._file[row].get_tensor(str(row)) for row in rows.tolist()]
        tokens = torch.cat(kept, 1).to(mask.device)
        states = tokens.new_zeros(len(self.blocks), *mask.shape, tokens.shape[-1])
        states[:, mask.bool()] = tokens
        return dict(zip(self.blocks, states, strict=True))


def with_teacher_states(
    model: PreTrainedModel, rows: datasets.Dataset, collator: DataCollator, folder: Path, blocks: Sequence[int],
    batch_size: int = 64,
) -> tuple[datasets.Dataset, KeptStates]:  # fmt: skip
    """The rows with the columns ``teacher_logits`` and ``teacher_row``, and the hidden states that the latter point to.

    Args:
        model, rows, collator, folder, batch_size: as of ``with_teacher_logits``.
        blocks: of the teacher, whose states are kept.
    """
    blocks = sorted(set(blocks))
    fingerprint = fingerprint_of(model, rows, blocks)
    place = folder / f"teacher_states-{fingerprint[:16]}"

    def compute() -> Tensor:
        order: list[int] = []
        logits = []

        def states() -> Iterator[tuple[int, Tensor]]:
            answers = outputs_of(model, rows, collator, batch_size, "teacher", output_hidden_states=True)
            for numbers, batch, outputs in answers:
                logits.append(outputs["logits"].float().cpu())
                order.extend(numbers)
                of_batch = _by_row([outputs["hidden_states"][1 + block] for block in blocks], batch)
                del outputs  # before the next batch has its own
                yield from zip(numbers, of_batch, strict=True)

        with staged(place) as partial:
            _write(states(), partial)
        logger.info("The hidden states of %d blocks of the teacher are kept in %s.", len(blocks), place.name)
        return in_order(torch.cat(logits), order)

    rows = with_kept_logits(rows, folder, fingerprint, compute)
    return rows.add_column(TEACHER_ROW, list(range(len(rows)))), KeptStates(place, blocks)


def states_bytes(rows: datasets.Dataset, blocks: Sequence[int], width: int) -> int:
    """What the states of these rows take on disk."""
    return sum(map(length, rows["input_ids"])) * len(set(blocks)) * width * _DTYPE.itemsize


def refuse_no_room(needed: int, folder: Path) -> None:
    """Raises InputError where ``needed`` bytes are not free on the disk of ``folder``, what lies in it not counted."""
    free = free_bytes(folder) + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if needed > free:
        raise InputError(
            f"distillation.cache: the teacher's hidden states of all training rows take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free where {folder} is; set cache: false, or hidden: 0 and relations: 0 to keep "
            "logits alone"
        )


def _by_row(blocks: Iterable[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """(sequences, tokens, width) of each block -> (blocks, its tokens, width) for each row, padding left out."""
    mask = real_tokens(batch).bool()
    sequences = batch[PARTS].tolist() if PARTS in batch else [1] * len(mask)
    tokens = [int(of_row.sum()) for of_row in mask.split(sequences)]
    real = torch.stack([states[mask].to(_DTYPE).cpu() for states in blocks])
    return torch.split(real, tokens, 1)


def _write(states: Iterable[tuple[int, Tensor]], folder: Path) -> None:
    """So many rows to a file that no more than ``_FILE_BYTES`` wait in memory."""
    held: dict[str, Tensor] = {}
    files = waiting = 0
    for row, tensor in states:
        held[str(row)] = tensor.contiguous()
        waiting += tensor.nbytes
        if waiting >= _FILE_BYTES:
            save_file(held, folder / f"{files:05d}.safetensors")
            held, waiting, files = {}, 0, files + 1
    if held:
        save_file(held, folder / f"{files:05d}.safetensors")
