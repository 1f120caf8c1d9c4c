"""2:4 sparsity on the sparse tensor cores of NVIDIA GPUs: no file format, but what a model with such zeros becomes in memory.

After ``structure: n:m`` (2:4) any format that keeps its zeros will do::

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    use_sparse_cores(model)

For inference: such weights neither train nor save. Not covered: GPUs of other makers, CPUs, n:m other than 2:4.
"""

import logging
import warnings

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finllm_prune.families import find_architecture

logger = logging.getLogger(__name__)

CAPABILITY = (8, 0)  # Ampere: the first with sparse tensor cores


def use_sparse_cores(model: PreTrainedModel) -> list[str]:
    """Turn the 2:4 weights of a model into ``torch.sparse`` tensors in place, where device, dtype and shape allow it.

    Returns:
        The paths of the linear layers that were turned; none, with a warning in the log, where nothing was.
    """
    linears = find_architecture(model.config.model_type).linears(model)
    suited = {path: linear for path, linear in linears.items() if is_2_4(linear.weight)}
    if not suited:
        logger.warning("No weight is 2:4, so all stay dense; prune with structure: n:m and sparsity: 0.5.")
        return []
    if not _has_sparse_cores(model.device):
        logger.warning(
            "%d of %d linear layers are 2:4, but %s has no sparse tensor cores, so all stay dense; move the model to an "
            "NVIDIA GPU of compute capability 8.0 or more first.",
            len(suited), len(linears), model.device,
        )  # fmt: skip
        return []
    turned = [path for path, linear in suited.items() if _turn(linear)]
    level = logging.INFO if turned else logging.WARNING
    logger.log(
        level, "%d of %d linear layers run on sparse tensor cores; %d are 2:4.", len(turned), len(linears), len(suited)
    )
    return turned


def is_2_4(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive weights along the input axis are not zero."""
    return weight.ndim == 2 and weight.shape[1] % 4 == 0 and bool(((weight != 0).view(-1, 4).sum(1) <= 2).all())


def _has_sparse_cores(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= CAPABILITY
    )


def _turn(linear: nn.Linear) -> bool:
    """PyTorch itself says which dtypes and shapes its kernels take: fp32 or an odd number of rows are refused."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype")
            sparse = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.debug("a weight of shape %s stays dense: %s", tuple(linear.weight.shape), error)
        return False
    linear.weight = nn.Parameter(sparse, requires_grad=False)
    return True
