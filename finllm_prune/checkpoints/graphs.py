"""What no ONNX graph can be made of, told before one is made; no package of onnx is needed to know."""

from transformers import PreTrainedModel

from finllm_prune.checkpoints.ragged import smallest
from finllm_prune.errors import InputError
from finllm_prune.families import Family, find_architecture

GRAPH_BYTES = 2**31


def refuse_no_graph(model: PreTrainedModel, key: str, name: str, remedy: str, *, finished: bool = False) -> None:
    """What a served format cannot hold, or was never tried on.

    Args:
        key: what asked for it.
        name: of the format.
        remedy: the end of the sentence.
        finished: the model is pruned, so that only what is left of it counts.

    Raises:
        InputError: the model has no family, it writes, or it is too large.
    """
    if not isinstance(find_architecture(model.config.model_type), Family):
        raise InputError(
            f"{key}: {name} is made of models with a family, and {model.config.model_type} has none; {remedy}"
        )
    if model.can_generate():
        raise InputError(f"{key}: {name} serves classifiers and rerankers, not a model that writes; {remedy}")
    size = model.num_parameters() * 4
    if finished and size > GRAPH_BYTES:
        size = smallest(model).num_parameters() * 4
    if size > GRAPH_BYTES:
        raise InputError(
            f"{key}: an ONNX file holds at most 2 GB, and this model has {size / 1e9:.1f} GB in fp32; {remedy}"
        )
