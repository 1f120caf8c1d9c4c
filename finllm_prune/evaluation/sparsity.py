"""How sparse a model is, with the denominator said each time."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from finllm_prune.families import find_family


def layer_table(model: PreTrainedModel) -> list[dict[str, Any]]:
    """For every prunable linear layer: its path, shape and density (the part of non-zero weights)."""
    linears = find_family(model.config.model_type).linears(model)
    return [
        {
            "layer": path,
            "shape": list(linear.weight.shape),
            "density": float((linear.weight != 0).sum()) / linear.weight.numel(),
        }
        for path, linear in linears.items()
    ]


def removed(dense: PreTrainedModel, model: PreTrainedModel) -> dict[str, float]:
    """The part of the dense model's weights that are zero or gone: of the encoder's linear layers, of all parameters.

    Tied weights are counted once. Biases count in "all_parameters" only.
    """

    def linear_nonzero(m: PreTrainedModel) -> int:
        layers = find_family(m.config.model_type).linears(m).values()
        return sum(int((linear.weight != 0).sum()) for linear in layers)

    def pruned_away(m: PreTrainedModel) -> int:
        layers = find_family(m.config.model_type).linears(m).values()
        return sum(int((linear.weight == 0).sum()) for linear in layers)

    def size(m: PreTrainedModel) -> int:
        return sum(parameter.numel() for parameter in m.parameters())

    encoder = sum(linear.weight.numel() for linear in find_family(dense.config.model_type).linears(dense).values())
    return {
        "encoder_linear": 1.0 - linear_nonzero(model) / encoder,
        "all_parameters": 1.0 - (size(model) - pruned_away(model)) / size(dense),
    }


def weight_bytes(folder: Path) -> int:
    """The size of the weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
