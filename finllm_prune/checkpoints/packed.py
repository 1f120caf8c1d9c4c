"""packed: zeros take one bit, also those of single weights and n:m. Loads after ``import finllm_prune``.

Smaller files only: in memory the zeros are there again, and the speed is that of ragged, on which it builds. A matrix that
would not be smaller stays as it is. Not covered: embeddings, norms and heads, which are never cut.
"""

import copy
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.packing import Packed, pack
from finllm_prune.checkpoints.proof import save_proved
from finllm_prune.checkpoints.quantizer import write
from finllm_prune.checkpoints.ragged import ragged
from finllm_prune.families import Family, find_architecture


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the packed model; returns the model that lies in ``folder``."""
    smaller = without_units(model)
    save_proved(model, tokenizer, folder, "packed", smaller, lambda m, place: write_packed(m, place, pack_all(m)))
    return smaller


def without_units(model: PreTrainedModel) -> PreTrainedModel:
    """A copy, as ragged makes it where the model's heads and neurons are known."""
    known = isinstance(find_architecture(model.config.model_type), Family)
    return ragged(model) if known else copy.deepcopy(model)


def pack_all(model: PreTrainedModel, int8: bool = False) -> dict[str, Packed]:
    """Path -> matrix, for the prunable linear layers that are smaller when packed."""
    linears = find_architecture(model.config.model_type).linears(model)
    packed = {path: pack(linear.weight, int8) for path, linear in linears.items()}
    return {path: matrix for path, matrix in packed.items() if matrix.bytes < linears[path].weight.nbytes}


def write_packed(model: PreTrainedModel, folder: Path, packed: dict[str, Packed]) -> None:
    """Config and weights, those of some layers packed."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for path, matrix in packed.items():
        del state[f"{path}.weight"]
        state |= {f"{path}.weight_{part}": tensor for part, tensor in matrix.tensors().items()}
    write(model, folder, state, len(packed))
