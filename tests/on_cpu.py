"""`finllm-prune run` as a rank of FSDP2 without GPUs: accelerate would silently turn FSDP into DDP on a CPU.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.on_cpu RECIPE training.use_cpu=true ...
"""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from finllm_prune.cli import main

asked = TrainingArguments.__post_init__


def as_on_gpus(arguments: TrainingArguments) -> None:
    asked(arguments)
    assert arguments.device.type == "cpu"  # asking makes accelerate's state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    TrainingArguments.__post_init__ = as_on_gpus
    sys.argv.insert(1, "run")
    main()
