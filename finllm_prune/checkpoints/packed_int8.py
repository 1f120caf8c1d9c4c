"""packed-int8: as packed, with 8-bit values and a scale for each row. Loads after ``import finllm_prune``.

The smallest file, and the one format that changes the model: each row of a packed matrix is rounded to 255 steps. The proof
holds the file against the rounded model to the bit, and that one's logits against the model that was evaluated, within a
tenth of the latter's largest logit; the manifest records both figures. In memory the weights are floats again.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.packed import pack_all, without_units, write_packed
from finllm_prune.checkpoints.packing import unpack
from finllm_prune.checkpoints.proof import logit_difference, save_proved
from finllm_prune.errors import ProofError

TOLERANCE = 0.1


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the packed model; returns the rounded model that lies in ``folder``.

    Raises:
        ProofError: the rounding moves a logit by more than a tenth of the largest one; nothing is written then.
    """
    rounded = without_units(model)
    packed = pack_all(rounded, int8=True)
    for path, matrix in packed.items():
        linear = rounded.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(unpack(matrix, tuple(linear.weight.shape), linear.weight.dtype))
    difference, largest = logit_difference(model, rounded)
    if not difference <= TOLERANCE * largest:
        raise ProofError(
            f"{folder}: 8-bit values move the logits by {difference:.2g}, over a tenth of the largest, {largest:.2g}; "
            "use packed, which changes nothing"
        )
    more = {"rounding": {"logit_difference": difference, "tolerance": TOLERANCE * largest}}
    save_proved(
        rounded, tokenizer, folder, "packed-int8", rounded, lambda m, place: write_packed(m, place, packed), more
    )
    return rounded
