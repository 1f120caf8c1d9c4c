"""How sparse a model is, with the denominator said each time."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from finllm_prune.families import find_architecture


def layer_table(model: PreTrainedModel) -> list[dict[str, Any]]:
    """For every prunable linear layer: its path, shape and density (the part of non-zero weights)."""
    linears = find_architecture(model.config.model_type).linears(model)
    return [
        {
            "layer": path,
            "shape": list(linear.weight.shape),
            "density": float((linear.weight != 0).sum()) / linear.weight.numel(),
        }
        for path, linear in linears.items()
    ]


def place_of(layer: str) -> tuple[str, str]:
    """``a.layer.3.output.dense`` -> ``("a.layer.3", "output.dense")``; a name without a number is its own kind."""
    parts = layer.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def removed(dense: PreTrainedModel, model: PreTrainedModel) -> dict[str, float]:
    """The part of the dense model's non-zero weights that are zero or gone.

    Returns:
        "encoder_linear": of the weights of the encoder's linear layers, without biases; "all_parameters": of everything,
        biases and embeddings included. Tied weights are counted once.
    """

    def encoder(m: PreTrainedModel) -> int:
        linears = find_architecture(m.config.model_type).linears(m).values()
        return sum(int(linear.weight.count_nonzero()) for linear in linears)

    def everything(m: PreTrainedModel) -> int:
        return sum(int(parameter.count_nonzero()) for parameter in m.parameters())

    return {
        "encoder_linear": 1.0 - encoder(model) / encoder(dense),
        "all_parameters": 1.0 - everything(model) / everything(dense),
    }


def weight_bytes(folder: Path) -> int:
    """The size of the weights on disk: safetensors, or a graph with its weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".onnx"))
