"""Which engines of several processes are taken, how they are launched, and what is refused by name before training."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.pruning import L0, NM, Movement, Neuron, Rule, SecondOrder, SoftMovement, refuse_unsplittable
from finllm_prune.training.trainer import STATE_FILE, complete_checkpoint, refuse_unsupported
from tests.test_processes import ROOT
from tests.test_trainer import RULES, trainer

FSDP2 = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "multi_node"])
def test_the_files_for_accelerate_are_read_by_accelerate(name: str) -> None:
    file = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == ("FSDP" if name == "fsdp2" else "MULTI_GPU")
    assert config.num_processes == 8 * config.num_machines or config.num_machines == 1
    assert (config.fsdp_config or {}).get("fsdp_version") == (2 if name == "fsdp2" else None)
    told = file.read_text()
    assert "accelerate launch --config_file recipes/accelerate/" in told
    assert "torchrun" in told


def arguments(folder: Path, kind: DistributedType | None = None, **more: Any) -> TrainingArguments:
    args = TrainingArguments(str(folder), use_cpu=True, **more)
    assert args.distributed_state is not None
    if kind is not None:
        args.distributed_state = type("State", (), {"distributed_type": kind})()
    return args


def test_14_fsdp_without_gpus_is_refused_for_it_would_be_ddp(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"FSDP needs a GPU for each process .*recipes/accelerate/ddp.yaml"):
        refuse_unsupported(arguments(tmp_path, fsdp=True, fsdp_config=dict(FSDP2)))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"state_dict_type": "FULL_STATE_DICT"}, "fsdp_state_dict_type: SHARDED_STATE_DICT"),
        ({"cpu_offload": True}, "fsdp_offload_params: false"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_14_what_pruning_cannot_do_under_fsdp_is_refused_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], key: str
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # set by both libraries: undone afterwards
    with pytest.raises(InputError, match=key):
        refuse_unsupported(arguments(tmp_path, DistributedType.MULTI_GPU, fsdp=True, fsdp_config=FSDP2 | config))


def test_14_fsdp2_with_split_checkpoints_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    refuse_unsupported(arguments(tmp_path, DistributedType.MULTI_GPU, fsdp=True, fsdp_config=dict(FSDP2)))


def test_14_deepspeed_and_data_parallel_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"DeepSpeed ZeRO .*fsdp2.yaml"):
        refuse_unsupported(arguments(tmp_path, DistributedType.DEEPSPEED))
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(InputError, match=r"DataParallel.*accelerate launch"):
        refuse_unsupported(several)


def test_14_criteria_that_look_at_a_whole_matrix_are_refused_under_fsdp() -> None:
    refuse_unsplittable([Rule("mlp", 0.5, Neuron(), L0()), Rule("attention", 0.5, NM(), Movement())])
    for criterion in (SecondOrder(), SoftMovement(), L0(), Movement(moments="factored")):
        with pytest.raises(InputError, match=r"rules\.1\.criterion: .*launch with DDP"):
            refuse_unsplittable([Rule("mlp", 0.5, Neuron()), Rule("attention", 0.5, criterion=criterion)])


class Before(TrainerCallback):
    """Looks at the checkpoints when the Trainer has written its part of one and the Pruner has not."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seen.append(complete_checkpoint(args.output_dir, pruned=True))


def test_the_last_complete_checkpoint_goes_only_when_a_new_one_is_complete(tmp_path: Path) -> None:
    before = Before()
    every: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    trainer(tmp_path, RULES["neuron"], callbacks=[before], **every).train()
    names = [None if seen is None else Path(seen).name for seen in before.seen]
    assert names == [None, "checkpoint-4", "checkpoint-8"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]


def test_a_checkpoint_that_was_cut_short_does_not_count_as_the_newest(tmp_path: Path) -> None:
    """Of checkpoints 6, 9 and 12 the last two are not whole: 12 would outlive the new 9, the only whole one."""
    every: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, RULES["neuron"], **every).train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    for step in (9, 12):
        (tmp_path / f"checkpoint-{step}" / STATE_FILE).unlink()
    again = trainer(tmp_path, RULES["neuron"], **every, save_total_limit=1)
    again.args.resume_from_checkpoint = complete_checkpoint(str(tmp_path), pruned=True)
    seen = Before()
    again.callback_handler.callbacks.insert(0, seen)
    again.go_on()
    assert [Path(place or "").name for place in seen.seen] == ["checkpoint-6", "checkpoint-9"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]
